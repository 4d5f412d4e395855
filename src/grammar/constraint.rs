//! One sequence's way through a grammar.

use std::sync::Arc;

use llguidance::Matcher;

use super::Grammar;
use super::guard::Guard;

/// A grammar, and where in the output it begins.
#[derive(Clone, Debug)]
pub struct Constraint {
    pub grammar: Arc<Grammar>,
    pub start: Start,
}

impl PartialEq for Constraint {
    /// Grammars are the same when they are one.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.grammar, &other.grammar) && self.start == other.start
    }
}

/// Where a grammar begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// With the first token.
    Now,
    /// After the tokens that close the reasoning in which the output begins.
    AfterReasoning { close: Arc<[u32]> },
    /// With the first token, unless that opens reasoning; then after its end.
    MayReason { open: u32, close: Arc<[u32]> },
}

/// The sequence cannot go on under its grammar: a limit was reached, or the sampler was made to choose outside the mask.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Violation(pub String);

/// What is known of one sequence after its tokens so far.
pub struct ConstraintState {
    grammar: Arc<Grammar>,
    matcher: Matcher,
    /// For grammars that are JSON from end to end.
    guard: Option<Guard>,
    phase: Phase,
}

enum Phase {
    /// Nothing sampled yet, and the first token may open reasoning.
    Undecided {
        open: u32,
        close: Arc<[u32]>,
    },
    /// The last tokens, as many as `close` has.
    Reasoning {
        close: Arc<[u32]>,
        last: Vec<u32>,
    },
    Grammar,
    /// EOS came where the grammar allows it.
    Complete,
}

impl ConstraintState {
    pub fn new(constraint: &Constraint) -> Self {
        let grammar = constraint.grammar.clone();
        Self {
            matcher: grammar.matcher(),
            guard: grammar.guard(),
            phase: match &constraint.start {
                Start::Now => Phase::Grammar,
                Start::AfterReasoning { close } => Phase::Reasoning {
                    close: close.clone(),
                    last: Vec::new(),
                },
                Start::MayReason { open, close } => Phase::Undecided {
                    open: *open,
                    close: close.clone(),
                },
            },
            grammar,
        }
    }

    /// The output is whole, and EOS has been sampled.
    pub fn is_complete(&self) -> bool {
        matches!(self.phase, Phase::Complete)
    }

    /// Takes over a sampled token.
    ///
    /// # Errors
    /// The grammar does not allow it, or following it took more than the limits allow.
    pub fn push(&mut self, token: u32) -> Result<(), Violation> {
        match &mut self.phase {
            Phase::Undecided { open, close } if *open == token => {
                self.phase = Phase::Reasoning {
                    close: close.clone(),
                    last: Vec::new(),
                };
                Ok(())
            }
            Phase::Undecided { .. } => {
                self.phase = Phase::Grammar;
                self.consume(token)
            }
            Phase::Reasoning { close, last } => {
                if last.len() == close.len() {
                    last.remove(0);
                }
                last.push(token);
                if last[..] == close[..] {
                    self.phase = Phase::Grammar;
                }
                Ok(())
            }
            Phase::Grammar => self.consume(token),
            Phase::Complete => Ok(()),
        }
    }

    fn consume(&mut self, token: u32) -> Result<(), Violation> {
        if self.grammar.is_eos(token) && (self.matcher.is_stopped() || self.matcher.is_accepting().unwrap_or(false)) {
            self.phase = Phase::Complete;
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(|error| self.fail(&error))?;
        if let Some(guard) = &mut self.guard {
            guard.push(self.grammar.token_bytes(token));
        }
        Ok(())
    }

    /// The tokens that may come next, a bit per id (`id % 32` of word `id / 32`). Under a complete grammar that is EOS.
    ///
    /// # Errors
    /// Computing it took more than the limits allow.
    pub fn mask(&mut self) -> Result<Arc<[u32]>, Violation> {
        if matches!(self.phase, Phase::Reasoning { .. } | Phase::Complete) {
            return Ok(self.grammar.anything());
        }
        let bits = self.matcher.compute_mask_or_eos().map_err(|error| self.fail(&error))?;
        let mut mask: Arc<[u32]> = Arc::from(bits.as_slice());
        if let Some(words) = Arc::get_mut(&mut mask) {
            if let Some(guard) = &self.guard {
                guard.restrict(words);
            }
            if let Phase::Undecided { open, .. } = self.phase
                && let Some(word) = words.get_mut(open as usize / 32)
            {
                *word |= 1 << (open % 32);
            }
        }
        Ok(mask)
    }

    fn fail(&self, error: &anyhow::Error) -> Violation {
        // Its lexer is shared by every sequence under the grammar and may be full.
        self.grammar.set_spent();
        Violation(format!(
            "the structured output could not be continued: {}",
            super::compiler::first_line(error)
        ))
    }
}

impl std::fmt::Debug for ConstraintState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConstraintState").finish_non_exhaustive()
    }
}
