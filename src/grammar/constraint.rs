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
    /// After the reasoning in which the output begins.
    AfterReasoning(Reasoning),
    /// With the first token, unless that opens reasoning; then after it.
    MayReason { open: u32, reasoning: Reasoning },
}

/// What ends the reasoning before a grammar, beside EOS: a model that would end its turn there has not answered yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reasoning {
    /// These tokens, one after the other.
    pub close: Arc<[u32]>,
    /// This one: it begins a call in the model's own notation where the grammar makes calls. It may also come first.
    pub call: Option<u32>,
    /// Ends a call that the model may make instead of the constrained output: after it EOS ends the turn.
    pub call_end: Option<u32>,
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
        reasoning: Reasoning,
    },
    Reasoning(InReasoning),
    Grammar,
    /// EOS came where it may.
    Complete,
}

struct InReasoning {
    ends: Reasoning,
    /// The last tokens, as many as `ends.close` has.
    last: Vec<u32>,
    has_called: bool,
}

impl InReasoning {
    fn begin(ends: Reasoning) -> Phase {
        Phase::Reasoning(Self {
            ends,
            last: Vec::new(),
            has_called: false,
        })
    }

    /// Whether the token closes it.
    fn push(&mut self, token: u32) -> bool {
        self.last.push(token);
        if self.last.len() > self.ends.close.len() {
            self.last.remove(0);
        }
        self.has_called |= self.ends.call_end == Some(token);
        self.last[..] == self.ends.close[..] || self.ends.call == Some(token)
    }
}

impl ConstraintState {
    pub fn new(constraint: &Constraint) -> Self {
        let grammar = constraint.grammar.clone();
        Self {
            matcher: grammar.matcher(),
            guard: grammar.guard(),
            phase: match &constraint.start {
                Start::Now => Phase::Grammar,
                Start::AfterReasoning(reasoning) => InReasoning::begin(reasoning.clone()),
                Start::MayReason { open, reasoning } => Phase::Undecided {
                    open: *open,
                    reasoning: reasoning.clone(),
                },
            },
            grammar,
        }
    }

    /// The output is whole, and EOS has been sampled.
    pub fn is_complete(&self) -> bool {
        matches!(self.phase, Phase::Complete)
    }

    /// The grammar has not begun.
    pub fn is_waiting(&self) -> bool {
        matches!(self.phase, Phase::Undecided { .. } | Phase::Reasoning(_))
    }

    /// Takes over a sampled token.
    ///
    /// # Errors
    /// The grammar does not allow it, or following it took more than the limits allow.
    pub fn push(&mut self, token: u32) -> Result<(), Violation> {
        match &mut self.phase {
            Phase::Undecided { open, reasoning } if *open == token => {
                self.phase = InReasoning::begin(std::mem::take(reasoning));
                Ok(())
            }
            Phase::Undecided { reasoning, .. } => {
                let is_call = reasoning.call == Some(token);
                self.phase = Phase::Grammar;
                if is_call { Ok(()) } else { self.consume(token) }
            }
            Phase::Reasoning(reasoning) => {
                let is_eos = self.grammar.is_eos(token);
                if is_eos && reasoning.has_called {
                    self.phase = Phase::Complete;
                } else if reasoning.push(token) || is_eos {
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
        if matches!(self.phase, Phase::Reasoning(_) | Phase::Complete) {
            return Ok(self.grammar.anything());
        }
        let bits = self.matcher.compute_mask_or_eos().map_err(|error| self.fail(&error))?;
        let mut mask: Arc<[u32]> = Arc::from(bits.as_slice());
        if let Some(words) = Arc::get_mut(&mut mask) {
            if let Some(guard) = &self.guard {
                guard.restrict(words);
            }
            if let Phase::Undecided { open, reasoning } = &self.phase {
                for token in [Some(*open), reasoning.call].into_iter().flatten() {
                    if let Some(word) = words.get_mut(token as usize / 32) {
                        *word |= 1 << (token % 32);
                    }
                }
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
