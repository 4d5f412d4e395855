//! One sequence inside the scheduler: its tokens, how far they are computed, and when it ends.

use std::collections::HashMap;
use std::sync::Arc;

use super::cache::{BlockHash, BlockTable};
use super::repetition::RepetitionTracker;
use super::{FinishReason, StopConditions};
use crate::config::Pooling;
use crate::step::{HiddenRow, SamplingParams, SlotId, TokenId, TokenLogprobs};

/// Numbers sequences in the order of their arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// By sequence, looked up several times a row and step. The ids are our own counter: nobody can choose them to collide.
pub(super) type SequenceMap<T> = HashMap<SequenceId, T, foldhash::fast::RandomState>;

/// What the scheduler must know to run a sequence.
#[derive(Clone, Debug)]
pub struct NewSequence {
    pub id: SequenceId,
    /// Lower runs first.
    pub priority: i64,
    pub prompt: Arc<[TokenId]>,
    pub sampling: Arc<SamplingParams>,
    pub stop: StopConditions,
    pub read_prefix_cache: bool,
    pub pooling: Option<Pooling>,
    /// The output token from which on each is sampled under a mask; none = never.
    pub mask_from: Option<usize>,
    /// Parent of the first block's hash.
    pub root: BlockHash,
    /// Hashes of the prompt's full blocks.
    pub hashes: Vec<BlockHash>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// In the queue: new, or preempted.
    Waiting,
    /// Holds a slot and blocks.
    Running,
    /// Over, but a step in flight still names its slot and blocks.
    Ended,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub id: SequenceId,
    pub priority: i64,
    pub prompt: Arc<[TokenId]>,
    /// Prompt and output as far as the host knows them.
    pub tokens: Vec<TokenId>,
    pub sampling: Arc<SamplingParams>,
    pub stop: StopConditions,
    pub read_prefix_cache: bool,
    pub pooling: Option<Pooling>,
    pub mask_from: Option<usize>,
    pub root: BlockHash,
    /// Hashes of the first full blocks of `tokens`.
    pub hashes: Vec<BlockHash>,

    pub phase: Phase,
    pub slot: Option<SlotId>,
    pub table: BlockTable,
    /// Position of the next token to feed; steps in flight included.
    pub num_computed: usize,
    /// End of the cached prefix: tokens before it are fed only to rebuild the conv states.
    pub replay_end: usize,
    /// No row has been planned since the slot was given.
    pub fresh: bool,
    pub rows_in_flight: usize,
    /// Tokens that submitted steps will sample and the host has not seen: 0 or 1.
    pub samples_in_flight: usize,

    /// Prompt tokens found in the prefix cache at the first admission; none before it.
    pub num_cached_tokens: Option<usize>,
    /// One entry per prompt token after the first, as far as computed; taken by the first event.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// `[H]` what the rows so far add up to, for a sequence that pools.
    pub hidden: Vec<f32>,
    repetition: Option<RepetitionTracker>,
}

impl Sequence {
    pub fn new(new: NewSequence) -> Self {
        Self {
            id: new.id,
            priority: new.priority,
            tokens: new.prompt.to_vec(),
            prompt: new.prompt,
            sampling: new.sampling,
            repetition: new.stop.repetition.map(RepetitionTracker::new),
            stop: new.stop,
            read_prefix_cache: new.read_prefix_cache,
            pooling: new.pooling,
            mask_from: new.mask_from,
            root: new.root,
            hashes: new.hashes,
            phase: Phase::Waiting,
            slot: None,
            table: BlockTable::default(),
            num_computed: 0,
            replay_end: 0,
            fresh: true,
            rows_in_flight: 0,
            samples_in_flight: 0,
            num_cached_tokens: None,
            prompt_logprobs: Vec::new(),
            hidden: Vec::new(),
        }
    }

    /// Place in the queue; the largest is preempted first.
    pub fn rank(&self) -> (i64, SequenceId) {
        (self.priority, self.id)
    }

    pub fn output(&self) -> &[TokenId] {
        &self.tokens[self.prompt.len()..]
    }

    /// Output tokens, the unseen one included.
    pub fn planned_output_len(&self) -> usize {
        self.output().len() + self.samples_in_flight
    }

    /// Tokens, the unseen one included.
    pub fn planned_len(&self) -> usize {
        self.tokens.len() + self.samples_in_flight
    }

    /// Tokens to feed before the next can be sampled, or the prompt is pooled; 0 when nothing further will be.
    pub fn num_remaining(&self) -> usize {
        if self.pooling.is_none() && self.planned_output_len() >= self.stop.max_tokens as usize {
            0
        } else {
            self.planned_len() - self.num_computed
        }
    }

    /// Takes a sampled token; why the sequence ends with it, if it does.
    pub fn push(&mut self, id: TokenId) -> Option<FinishReason> {
        self.tokens.push(id);
        if let Some(repetition) = &mut self.repetition {
            repetition.note(&self.tokens[self.prompt.len()..]);
        }
        self.finish()
    }

    /// Why the sequence ends with its last token, if it does. EOS and stop ids come before the length, as in vLLM.
    fn finish(&self) -> Option<FinishReason> {
        let output = self.output();
        let &last = output.last()?;
        let may_stop = output.len() >= self.stop.min_tokens as usize;
        if may_stop && self.stop.eos == Some(last) {
            return Some(FinishReason::Stop(None));
        }
        if may_stop && self.stop.stop_token_ids.contains(&last) {
            return Some(FinishReason::Stop(Some(last)));
        }
        if output.len() >= self.stop.max_tokens as usize {
            return Some(FinishReason::Length);
        }
        let repeats = self.repetition.as_ref().is_some_and(RepetitionTracker::found);
        (may_stop && repeats).then_some(FinishReason::Repetition)
    }

    /// What a row must hand back of the hidden states; `ends`: it reaches the end of the tokens.
    pub fn hidden_row(&self, ends: bool) -> Option<HiddenRow> {
        match self.pooling? {
            Pooling::Last => ends.then_some(HiddenRow::Last),
            Pooling::Mean => Some(HiddenRow::Sum),
        }
    }

    /// Takes over the hidden states of a row.
    pub fn add_hidden(&mut self, states: Vec<f32>) {
        if self.hidden.is_empty() {
            self.hidden = states;
        } else {
            for (sum, state) in self.hidden.iter_mut().zip(states) {
                *sum += state;
            }
        }
    }

    /// The pooled prompt, once every row is in.
    pub fn take_pooled(&mut self) -> Vec<f32> {
        let mut pooled = std::mem::take(&mut self.hidden);
        if self.pooling == Some(Pooling::Mean) {
            let count = self.prompt.len() as f32;
            pooled.iter_mut().for_each(|value| *value /= count);
        }
        pooled
    }

    /// Takes over the prompt logprobs of a row that computed (not replayed) the tokens from `computed_start` on. A resumed
    /// sequence computes some again: those are skipped.
    pub fn add_prompt_logprobs(&mut self, computed_start: usize, entries: Vec<TokenLogprobs>) {
        let known = self.prompt_logprobs.len();
        let wanted = self.prompt.len().saturating_sub(1);
        let skip = known.saturating_sub(computed_start);
        self.prompt_logprobs
            .extend(entries.into_iter().skip(skip).take(wanted - known.min(wanted)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::RepetitionDetection;

    fn sequence(output: &[TokenId], stop: StopConditions) -> Sequence {
        let mut sequence = Sequence::new(NewSequence {
            id: SequenceId(0),
            priority: 0,
            prompt: [1, 2, 3].into(),
            sampling: Arc::default(),
            stop,
            read_prefix_cache: true,
            pooling: None,
            mask_from: None,
            root: [0; 32],
            hashes: Vec::new(),
        });
        sequence.tokens.extend(output);
        sequence
    }

    #[test]
    fn the_primary_eos_has_no_stop_reason_and_the_others_have() {
        let stop = StopConditions {
            max_tokens: 3,
            min_tokens: 0,
            eos: Some(7),
            stop_token_ids: vec![7, 8],
            repetition: None,
        };
        assert_eq!(sequence(&[7], stop.clone()).finish(), Some(FinishReason::Stop(None)));
        assert_eq!(
            sequence(&[5, 8], stop.clone()).finish(),
            Some(FinishReason::Stop(Some(8)))
        );
        assert_eq!(sequence(&[5, 5], stop.clone()).finish(), None);
        assert_eq!(sequence(&[5, 5, 5], stop.clone()).finish(), Some(FinishReason::Length));
        assert_eq!(
            sequence(&[5, 5, 7], stop).finish(),
            Some(FinishReason::Stop(None)),
            "EOS wins over the length"
        );
    }

    #[test]
    fn min_tokens_holds_stops_back() {
        let stop = StopConditions {
            max_tokens: 9,
            min_tokens: 3,
            eos: Some(7),
            stop_token_ids: vec![8],
            repetition: None,
        };
        assert_eq!(sequence(&[7], stop.clone()).finish(), None);
        assert_eq!(sequence(&[7, 8], stop.clone()).finish(), None);
        assert_eq!(sequence(&[7, 8, 8], stop).finish(), Some(FinishReason::Stop(Some(8))));
    }

    #[test]
    fn a_repetition_ends_the_sequence_last_of_all() {
        let stop = StopConditions {
            max_tokens: 9,
            min_tokens: 5,
            eos: Some(7),
            stop_token_ids: vec![],
            repetition: Some(RepetitionDetection {
                min_pattern_size: 1,
                max_pattern_size: 1,
                min_count: 3,
            }),
        };
        let finishes = |stop: &StopConditions, output: &[TokenId]| {
            let mut sequence = sequence(&[], stop.clone());
            output
                .iter()
                .find_map(|&id| Some((sequence.push(id)?, sequence.output().len())))
        };
        assert_eq!(finishes(&stop, &[4; 9]), Some((FinishReason::Repetition, 5)));
        assert_eq!(finishes(&stop, &[4, 4, 4, 4, 7]), Some((FinishReason::Stop(None), 5)));
        let short = StopConditions { max_tokens: 5, ..stop };
        assert_eq!(finishes(&short, &[4; 9]), Some((FinishReason::Length, 5)));
    }

    #[test]
    fn nothing_is_planned_after_the_last_token_is_in_flight() {
        let stop = StopConditions {
            max_tokens: 2,
            ..StopConditions::default()
        };
        let mut sequence = sequence(&[5], stop);
        sequence.num_computed = 3;
        assert_eq!(sequence.num_remaining(), 1);
        sequence.num_computed = 4;
        sequence.samples_in_flight = 1;
        assert_eq!(sequence.num_remaining(), 0);
    }

    #[test]
    fn a_mean_is_the_rows_sum_over_the_tokens() {
        let mut sequence = sequence(&[], StopConditions::default());
        sequence.pooling = Some(Pooling::Mean);
        assert_eq!(sequence.num_remaining(), 3);
        assert_eq!(sequence.hidden_row(false), Some(HiddenRow::Sum));
        sequence.add_hidden(vec![1.0, 4.0]);
        sequence.add_hidden(vec![2.0, -1.0]);
        assert_eq!(sequence.take_pooled(), [1.0, 1.0]);
        sequence.pooling = Some(Pooling::Last);
        assert_eq!(
            (sequence.hidden_row(false), sequence.hidden_row(true)),
            (None, Some(HiddenRow::Last))
        );
    }

    #[test]
    fn prompt_logprobs_computed_twice_are_kept_once() {
        let entry = |id| TokenLogprobs {
            id,
            logprob: 0.0,
            rank: 1,
            top: Vec::new(),
        };
        let mut sequence = sequence(&[], StopConditions::default());
        sequence.add_prompt_logprobs(0, vec![entry(2)]);
        sequence.add_prompt_logprobs(0, vec![entry(2), entry(3)]);
        let ids: Vec<_> = sequence.prompt_logprobs.iter().map(|e| e.id).collect();
        assert_eq!(ids, [2, 3]);
    }
}
