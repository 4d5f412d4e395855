//! Sequences under a grammar or a thinking budget: what they may sample next.

use std::sync::Arc;

use rayon::prelude::*;

use super::EngineRequest;
use super::scheduler::{PlannedRow, SequenceId};
use super::thinking::ThinkingState;
use crate::grammar::{ConstraintState, Violation};
use crate::step::{SamplingParams, StepPlan, TokenId, TokenMask};

/// Fewer masks are computed on the engine's own thread: handing them over takes about as long as one of them.
const MIN_PARALLEL_MASKS: usize = 4;

/// What decides the masks of one sequence.
#[derive(Debug)]
pub(super) struct Constrained {
    grammar: Option<ConstraintState>,
    thinking: Option<ThinkingState>,
    num_tokens: usize,
    any_token: TokenMask,
    /// Output tokens before which `suppressed` may not be sampled, where there is a choice.
    min_tokens: usize,
    suppressed: Vec<TokenId>,
}

/// A row that was submitted with `needs_mask`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DueMask {
    pub row: usize,
    pub id: SequenceId,
    /// Tokens that the sequence's constraints must have seen.
    pub output_index: usize,
}

impl DueMask {
    /// The rows of a plan that wait for masks.
    pub fn of(plan: &StepPlan, rows: &[PlannedRow]) -> Vec<DueMask> {
        let rows = plan.rows.iter().zip(rows).enumerate();
        rows.filter_map(|(row, (step, planned))| {
            let sample = step.sample.as_ref().filter(|sample| sample.needs_mask)?;
            Some(DueMask {
                row,
                id: planned.id,
                output_index: sample.output_index as usize,
            })
        })
        .collect()
    }
}

impl Constrained {
    /// None: nothing restricts the request's tokens.
    pub fn new(request: &EngineRequest, vocab_size: usize) -> Option<Box<Self>> {
        let thinking = request.thinking_budget;
        if request.constraint.is_none() && thinking.is_none() {
            return None;
        }
        Some(Box::new(Self {
            grammar: request.constraint.as_ref().map(ConstraintState::new),
            thinking: thinking.map(|budget| ThinkingState::new(budget, &request.prompt)),
            num_tokens: 0,
            any_token: any_token(vocab_size),
            min_tokens: request.sampling.min_tokens as usize,
            suppressed: request.sampling.min_tokens_suppressed.clone(),
        }))
    }

    /// What the executor samples by. Under a grammar `min_tokens` is applied to the mask instead: when the grammar leaves
    /// nothing but EOS, the two together would forbid everything.
    pub fn sampling(request: &EngineRequest) -> Arc<SamplingParams> {
        if request.sampling.min_tokens == 0 || request.constraint.is_none() {
            return request.sampling.clone();
        }
        Arc::new(SamplingParams {
            min_tokens: 0,
            min_tokens_suppressed: Vec::new(),
            ..SamplingParams::clone(&request.sampling)
        })
    }

    /// The output token from which on each is sampled under a mask, as far as is known now; none = none will be.
    pub fn mask_from(&self) -> Option<usize> {
        if self.grammar.is_some() {
            return Some(0);
        }
        let before = self.thinking.as_ref()?.tokens_before_forced()?;
        Some(self.num_tokens.saturating_add(before))
    }

    /// # Errors
    /// The sequence cannot go on.
    pub fn push(&mut self, token: TokenId) -> Result<(), Violation> {
        self.num_tokens += 1;
        if self.forced().is_some_and(|forced| forced != token) {
            let message =
                "the other sampling parameters forbid the end of reasoning that thinking_token_budget asks for";
            return Err(Violation(message.to_owned()));
        }
        if let Some(thinking) = &mut self.thinking {
            thinking.push(token);
        }
        self.grammar.as_mut().map_or(Ok(()), |grammar| grammar.push(token))
    }

    /// What the thinking budget leaves; nothing is forced once a grammar has begun.
    fn forced(&self) -> Option<TokenId> {
        let thinking = self.thinking.as_ref()?;
        let may_reason = self.grammar.as_ref().is_none_or(ConstraintState::is_waiting);
        thinking.forced().filter(|_| may_reason)
    }

    /// The output is whole: the sequence ends, whatever its stop conditions say.
    pub fn is_complete(&self) -> bool {
        self.grammar.as_ref().is_some_and(ConstraintState::is_complete)
    }

    /// Whether the mask of the output token with this index can be computed.
    pub fn is_ready(&self, output_index: usize) -> bool {
        self.num_tokens == output_index
    }

    /// # Errors
    /// The sequence cannot go on.
    pub fn mask(&mut self) -> Result<TokenMask, Violation> {
        if let Some(forced) = self.forced() {
            return Ok(only(forced, self.any_token.0.len()));
        }
        let Some(grammar) = &mut self.grammar else {
            return Ok(self.any_token.clone());
        };
        let mask = grammar.mask()?;
        if self.num_tokens >= self.min_tokens || self.suppressed.is_empty() {
            return Ok(TokenMask(mask));
        }
        let mut words = mask.to_vec();
        for &id in &self.suppressed {
            if let Some(word) = words.get_mut(id as usize / 32) {
                *word &= !(1 << (id % 32));
            }
        }
        let has_choice = words.iter().any(|&word| word != 0);
        Ok(TokenMask(if has_choice { words.into() } else { mask }))
    }
}

/// Allows one token.
fn only(id: TokenId, num_words: usize) -> TokenMask {
    let mut words = vec![0; num_words];
    if let Some(word) = words.get_mut(id as usize / 32) {
        *word = 1 << (id % 32);
    }
    TokenMask(words.into())
}

/// The masks of several sequences, in their order.
pub(super) fn masks(sequences: &mut [Box<Constrained>]) -> Vec<Result<TokenMask, Violation>> {
    if sequences.len() < MIN_PARALLEL_MASKS {
        return sequences.iter_mut().map(|sequence| sequence.mask()).collect();
    }
    sequences.par_iter_mut().map(|sequence| sequence.mask()).collect()
}

/// Allows every token of a vocabulary.
pub(super) fn any_token(vocab_size: usize) -> TokenMask {
    let mut words = vec![u32::MAX; vocab_size.div_ceil(32)];
    if let Some(last) = words.last_mut()
        && !vocab_size.is_multiple_of(32)
    {
        *last = (1 << (vocab_size % 32)) - 1;
    }
    TokenMask(words.into())
}
