//! Sequences under a grammar: what they may sample next.

use std::sync::Arc;

use rayon::prelude::*;

use super::scheduler::{PlannedRow, SequenceId};
use crate::grammar::{Constraint, ConstraintState, Violation};
use crate::step::{SamplingParams, StepPlan, TokenId, TokenMask};

/// Fewer masks are computed on the engine's own thread: handing them over takes about as long as one of them.
const MIN_PARALLEL_MASKS: usize = 4;

/// A sequence's grammar, and what else decides its mask.
#[derive(Debug)]
pub(super) struct Constrained {
    state: ConstraintState,
    /// Output tokens before which `suppressed` may not be sampled, where there is a choice.
    min_tokens: usize,
    suppressed: Vec<TokenId>,
}

/// A row that was submitted with `needs_mask`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DueMask {
    pub row: usize,
    pub id: SequenceId,
    /// Tokens that the sequence's grammar must have seen.
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
    pub fn new(constraint: &Constraint, sampling: &SamplingParams) -> Self {
        Self {
            state: ConstraintState::new(constraint),
            min_tokens: sampling.min_tokens as usize,
            suppressed: sampling.min_tokens_suppressed.clone(),
        }
    }

    /// What the executor samples by. `min_tokens` is applied to the mask instead: when the grammar leaves nothing but EOS, the
    /// two together would forbid everything.
    pub fn sampling(params: &Arc<SamplingParams>) -> Arc<SamplingParams> {
        if params.min_tokens == 0 {
            return params.clone();
        }
        Arc::new(SamplingParams {
            min_tokens: 0,
            min_tokens_suppressed: Vec::new(),
            ..SamplingParams::clone(params)
        })
    }

    /// # Errors
    /// The sequence cannot go on.
    pub fn push(&mut self, token: TokenId) -> Result<(), Violation> {
        self.state.push(token)
    }

    /// The output is whole: the sequence ends, whatever its stop conditions say.
    pub fn is_complete(&self) -> bool {
        self.state.is_complete()
    }

    /// Whether the mask of the output token with this index can be computed.
    pub fn is_ready(&self, output_index: usize) -> bool {
        self.state.num_tokens() == output_index
    }

    /// # Errors
    /// The sequence cannot go on.
    pub fn mask(&mut self) -> Result<TokenMask, Violation> {
        let mask = self.state.mask()?;
        if self.state.num_tokens() >= self.min_tokens || self.suppressed.is_empty() {
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
