//! Decides what each step computes. A pure value: no clock, no device, no channel.
//!
//! The caller alternates [`Scheduler::plan`] (what to submit next) and [`Scheduler::complete`] (what a collected step
//! sampled), with at most one step between a plan and the completion of the one before it.

use std::collections::BTreeSet;

use super::FinishReason;
use super::cache::{BlockHasher, KvCache};
pub(super) use super::sequence::SequenceMap;
pub use super::sequence::{NewSequence, SequenceId};
use super::sequence::{Phase, Sequence};
use crate::step::{
    Capacity, RowTokens, SampleRow, SampledToken, SlotId, StartedSlot, StepOutput, StepPlan, StepRow, TokenLogprobs,
};

/// How the scheduler spends a step.
#[derive(Clone, Debug)]
pub struct SchedulerOptions {
    /// Prefill rows are cut to this many tokens per step; 0 = off.
    pub long_prefill_token_threshold: usize,
    /// A prompt may be spread over several steps.
    pub chunked_prefill: bool,
    pub prefix_caching: bool,
}

/// One step, and who is in it.
#[derive(Debug)]
pub struct PlannedStep {
    pub plan: StepPlan,
    /// One per plan row; [`Scheduler::complete`] wants them back.
    pub rows: Vec<PlannedRow>,
    pub admitted: Vec<Admitted>,
    /// Sequences that lost their blocks since the last plan, so that others could go on.
    pub preempted: Vec<SequenceId>,
}

/// What a plan row was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedRow {
    pub id: SequenceId,
    /// Position of the first token that is computed, not replayed.
    computed_start: usize,
    samples: bool,
    /// It hands back hidden states.
    pools: bool,
    /// It reaches the end of the sequence's tokens.
    ends: bool,
}

/// A sequence left the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    pub id: SequenceId,
    /// False when it comes back after preemption.
    pub first: bool,
    /// Tokens found in the prefix cache.
    pub num_cached_tokens: usize,
}

/// A sequence got a token, or its prompt is pooled.
#[derive(Debug)]
pub struct Progress {
    pub id: SequenceId,
    pub token: Option<SampledToken>,
    /// With the finish of a sequence that pools: `[H]`.
    pub hidden: Vec<f32>,
    /// With the first token, if the sequence asked for them.
    pub prompt_logprobs: Option<Vec<TokenLogprobs>>,
    pub num_cached_tokens: usize,
    pub finish: Option<FinishReason>,
}

/// An output that does not fit its plan: a bug in the executor.
#[derive(Debug, thiserror::Error)]
#[error("the step's output does not fit its plan: {0}")]
pub struct BadOutput(String);

#[derive(Debug)]
pub struct Scheduler {
    options: SchedulerOptions,
    capacity: Capacity,
    hasher: BlockHasher,
    cache: KvCache,
    sequences: SequenceMap<Sequence>,
    /// In the order of admission.
    running: Vec<SequenceId>,
    /// By rank: lower priority value, then arrival. A preempted sequence thus returns to its old place.
    waiting: BTreeSet<(i64, SequenceId)>,
    free_slots: Vec<SlotId>,
    /// Ended sequences that a step in flight still names.
    num_ended: usize,
    hold_admissions: bool,
    /// Not yet reported by a plan.
    preempted: Vec<SequenceId>,
}

/// The rows of a step while it is put together.
struct Draft {
    rows: Vec<(SequenceId, usize)>,
    /// Tokens the step may still carry.
    budget: usize,
}

impl Scheduler {
    /// `hasher` must be the one that made the sequences' hashes.
    pub fn new(options: SchedulerOptions, capacity: &Capacity, hasher: BlockHasher) -> Self {
        Self {
            cache: KvCache::new(capacity.num_blocks, capacity.block_size, options.prefix_caching),
            hasher,
            free_slots: (0..capacity.max_num_seqs as SlotId).rev().collect(),
            capacity: capacity.clone(),
            options,
            sequences: SequenceMap::default(),
            running: Vec::new(),
            waiting: BTreeSet::new(),
            num_ended: 0,
            hold_admissions: false,
            preempted: Vec::new(),
        }
    }

    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    pub fn num_free_slots(&self) -> usize {
        self.free_slots.len()
    }

    /// While held, sequences stay in the queue; running ones go on.
    pub fn hold_admissions(&mut self, hold: bool) {
        self.hold_admissions = hold;
    }

    /// Queues a sequence. It must fit the pool at its full length.
    pub fn add(&mut self, new: NewSequence) {
        let sequence = Sequence::new(new);
        self.waiting.insert(sequence.rank());
        self.sequences.insert(sequence.id, sequence);
    }

    /// Ends a sequence now; one that is unknown or over already is ignored.
    pub fn abort(&mut self, id: SequenceId) {
        self.end(id);
    }

    /// Moves the output token from which on a sequence is sampled under masks. One that is over is ignored.
    pub fn set_mask_from(&mut self, id: SequenceId, mask_from: Option<usize>) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.mask_from = mask_from;
        }
    }

    /// Sends every running sequence back to the queue.
    pub fn preempt_all(&mut self) {
        for id in self.running.clone() {
            self.preempt(id);
        }
    }

    /// Makes all cached prefixes unfindable. Refused while a sequence holds blocks, as in vLLM.
    pub fn reset_prefix_cache(&mut self) -> bool {
        let unused = self.cache.num_free_blocks() == self.capacity.num_blocks;
        if unused {
            self.cache.forget_prefixes();
        }
        unused
    }

    /// The next step: one row for each running decode, then the running prefills, then new sequences, in the order of
    /// their admission. None when there is nothing to compute.
    pub fn plan(&mut self) -> Option<PlannedStep> {
        let mut draft = Draft {
            rows: Vec::new(),
            budget: self.capacity.max_num_batched_tokens,
        };
        let num_preempted = self.preempted.len();
        self.plan_decodes(&mut draft);
        self.plan_prefills(&mut draft);
        // Blocks that a preemption has freed are for those that go on.
        let may_admit = self.preempted.len() == num_preempted || draft.rows.is_empty();
        let admitted = if may_admit { self.admit(&mut draft) } else { Vec::new() };
        let drafted = draft.rows;
        if drafted.is_empty() {
            return None;
        }

        let mut plan = StepPlan::default();
        let mut rows = Vec::with_capacity(drafted.len());
        for &(id, num_tokens) in &drafted {
            let (row, planned, started) = self.sequence(id).next_row(num_tokens);
            plan.started.extend(started);
            plan.rows.push(row);
            rows.push(planned);
        }
        // After all rows: a row of this step must not read what another row of this step writes.
        for (id, _) in drafted {
            self.publish(id);
        }
        Some(PlannedStep {
            plan,
            rows,
            admitted,
            preempted: std::mem::take(&mut self.preempted),
        })
    }

    /// Takes over the output of a submitted step. Rows of sequences that have ended since are dropped.
    ///
    /// # Errors
    /// The output does not fit the rows; nothing has been taken over.
    pub fn complete(&mut self, rows: &[PlannedRow], output: StepOutput) -> Result<Vec<Progress>, BadOutput> {
        self.check_output(rows, &output)?;
        let mut progress = Vec::with_capacity(rows.len());
        for (row, out) in rows.iter().zip(output.rows) {
            let sequence = self.sequence(row.id);
            sequence.rows_in_flight -= 1;
            if row.samples {
                sequence.samples_in_flight -= 1;
            }
            if sequence.phase == Phase::Ended {
                self.release_if_idle(row.id);
                continue;
            }
            if sequence.sampling.prompt_logprobs.is_some() {
                sequence.add_prompt_logprobs(row.computed_start, out.prompt_logprobs);
            }
            if row.pools && sequence.phase == Phase::Running {
                sequence.add_hidden(out.hidden);
                if row.ends {
                    progress.push(Progress {
                        id: row.id,
                        token: None,
                        hidden: sequence.take_pooled(),
                        prompt_logprobs: None,
                        num_cached_tokens: sequence.num_cached_tokens.unwrap_or(0),
                        finish: Some(FinishReason::Stop(None)),
                    });
                    self.publish(row.id);
                    self.end(row.id);
                    continue;
                }
            }
            let Some(token) = out.sampled else { continue };
            let finish = sequence.push(token.id);
            let first = sequence.output().len() == 1;
            progress.push(Progress {
                id: row.id,
                token: Some(token),
                hidden: Vec::new(),
                prompt_logprobs: (first && sequence.sampling.prompt_logprobs.is_some())
                    .then(|| std::mem::take(&mut sequence.prompt_logprobs)),
                num_cached_tokens: sequence.num_cached_tokens.unwrap_or(0),
                finish: finish.clone(),
            });
            self.publish(row.id);
            if finish.is_some() {
                self.end(row.id);
            }
        }
        Ok(progress)
    }

    /// A submitted step was lost: its sequences end, and no cached prefix is trusted any more. Returns the sequences that
    /// this call ended.
    pub fn fail(&mut self, rows: &[PlannedRow]) -> Vec<SequenceId> {
        let mut failed = Vec::new();
        for row in rows {
            let sequence = self.sequence(row.id);
            sequence.rows_in_flight -= 1;
            if row.samples {
                sequence.samples_in_flight -= 1;
            }
            if sequence.phase == Phase::Ended {
                self.release_if_idle(row.id);
            } else {
                failed.push(row.id);
                self.end(row.id);
            }
        }
        self.cache.forget_prefixes();
        failed
    }

    fn check_output(&self, rows: &[PlannedRow], output: &StepOutput) -> Result<(), BadOutput> {
        if rows.len() != output.rows.len() {
            return Err(BadOutput(format!("{} rows for {}", output.rows.len(), rows.len())));
        }
        for (i, (row, out)) in rows.iter().zip(&output.rows).enumerate() {
            if row.pools == out.hidden.is_empty() {
                return Err(BadOutput(format!("row {i} has {} hidden values", out.hidden.len())));
            }
            match &out.sampled {
                Some(token) if !row.samples => return Err(BadOutput(format!("row {i} sampled {} unasked", token.id))),
                Some(token) if token.id as usize >= self.capacity.vocab_size => {
                    return Err(BadOutput(format!(
                        "row {i} sampled {}, outside the vocabulary",
                        token.id
                    )));
                }
                None if row.samples => return Err(BadOutput(format!("row {i} has no sample"))),
                _ => {}
            }
        }
        Ok(())
    }

    fn plan_decodes(&mut self, draft: &mut Draft) {
        for id in self.running.clone() {
            if draft.budget > 0 && self.num_remaining_if_running(id) == 1 {
                self.place(draft, id, 1);
            }
        }
    }

    fn plan_prefills(&mut self, draft: &mut Draft) {
        for id in self.running.clone() {
            let remaining = self.num_remaining_if_running(id);
            if remaining > 1
                && let Some(num_tokens) = self.prefill_len(remaining, draft.budget)
            {
                self.place(draft, id, num_tokens);
            }
        }
    }

    fn num_remaining_if_running(&self, id: SequenceId) -> usize {
        self.sequences
            .get(&id)
            .filter(|s| s.phase == Phase::Running)
            .map_or(0, Sequence::num_remaining)
    }

    /// How many of `remaining` tokens a prefill row may carry; none when it has to wait for another step.
    fn prefill_len(&self, remaining: usize, budget: usize) -> Option<usize> {
        if !self.options.chunked_prefill {
            return (remaining <= budget).then_some(remaining);
        }
        let threshold = match self.options.long_prefill_token_threshold {
            0 => usize::MAX,
            threshold => threshold,
        };
        let num_tokens = remaining.min(threshold).min(budget);
        (num_tokens > 0).then_some(num_tokens)
    }

    /// Puts a row into the draft, preempting sequences of higher rank, in the end this one, until its blocks exist.
    fn place(&mut self, draft: &mut Draft, id: SequenceId, num_tokens: usize) {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else {
                return;
            };
            if self.cache.grow(&mut sequence.table, sequence.num_computed + num_tokens) {
                draft.rows.push((id, num_tokens));
                draft.budget -= num_tokens;
                return;
            }
            // Blocks of ended sequences come back with the step in flight: wait for it instead of throwing work away.
            if self.num_ended > 0 {
                return;
            }
            let victim = self
                .running
                .iter()
                .copied()
                .max_by_key(|id| self.sequences[id].rank())
                .unwrap_or(id);
            self.preempt(victim);
            if let Some(at) = draft.rows.iter().position(|&(drafted, _)| drafted == victim) {
                draft.budget += draft.rows.remove(at).1;
            }
            if victim == id {
                return;
            }
        }
    }

    /// Takes sequences from the queue while slots, blocks and budget last. The first that does not fit keeps the rest
    /// waiting, so that a long prompt is not overtaken for ever.
    fn admit(&mut self, draft: &mut Draft) -> Vec<Admitted> {
        let mut admitted = Vec::new();
        while !self.hold_admissions && draft.budget > 0 && !self.free_slots.is_empty() {
            let Some(&rank) = self.waiting.first() else {
                break;
            };
            let id = rank.1;
            let Some(sequence) = self.sequences.get_mut(&id) else {
                break;
            };
            // Preempted under a step in flight: its next token is still to come.
            if sequence.rows_in_flight > 0 {
                break;
            }
            self.hasher
                .extend(&sequence.root, &mut sequence.hashes, &sequence.tokens);
            let hit = if sequence.read_prefix_cache {
                self.cache.find_prefix(&sequence.hashes, sequence.tokens.len())
            } else {
                Vec::new()
            };
            // Room for the whole prompt, though this step may compute only its first chunk: admitting more than fits
            // would end in preemptions.
            if !self.cache.can_hold(&hit, sequence.tokens.len()) {
                break;
            }
            let num_cached_tokens = hit.len() * self.capacity.block_size;
            let start = num_cached_tokens.saturating_sub(self.capacity.conv_replay_tokens);
            let remaining = sequence.tokens.len() - start;
            let Some(num_tokens) = self.prefill_len(remaining, draft.budget) else {
                break;
            };
            let Some(slot) = self.free_slots.pop() else { break };

            let sequence = self.sequence(id);
            let first = sequence.num_cached_tokens.is_none();
            sequence.phase = Phase::Running;
            sequence.slot = Some(slot);
            sequence.fresh = true;
            sequence.num_computed = start;
            sequence.replay_end = num_cached_tokens;
            sequence.num_cached_tokens.get_or_insert(num_cached_tokens);
            let table = self.cache.attach(hit);
            self.sequence(id).table = table;
            self.waiting.remove(&rank);
            self.running.push(id);
            self.place(draft, id, num_tokens);
            admitted.push(Admitted {
                id,
                first,
                num_cached_tokens,
            });
        }
        admitted
    }

    /// Sends a running sequence back to the queue; it will recompute prompt and output.
    ///
    /// Its blocks are free at once, though a step in flight may still write to them: steps run in the order of
    /// submission, so whoever gets the blocks writes later. A token in flight is still taken over.
    fn preempt(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        sequence.phase = Phase::Waiting;
        sequence.num_computed = 0;
        sequence.hidden.clear();
        self.cache.release(&mut sequence.table);
        self.free_slots.extend(sequence.slot.take());
        self.waiting.insert(sequence.rank());
        self.running.retain(|&running| running != id);
        self.preempted.push(id);
    }

    fn end(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        match sequence.phase {
            Phase::Waiting => drop(self.waiting.remove(&sequence.rank())),
            Phase::Running => self.running.retain(|&running| running != id),
            Phase::Ended => return,
        }
        sequence.phase = Phase::Ended;
        self.num_ended += 1;
        self.release_if_idle(id);
    }

    /// Frees what an ended sequence holds once no step in flight names its slot.
    fn release_if_idle(&mut self, id: SequenceId) {
        if self.sequence(id).rows_in_flight > 0 {
            return;
        }
        if let Some(mut sequence) = self.sequences.remove(&id) {
            self.cache.release(&mut sequence.table);
            self.free_slots.extend(sequence.slot);
            self.num_ended -= 1;
        }
    }

    /// Lets others find the blocks that submitted steps have filled with tokens the host knows.
    fn publish(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        if sequence.phase != Phase::Running || !self.cache.prefix_caching() {
            return;
        }
        let num_filled = sequence.num_computed.min(sequence.tokens.len()) / self.capacity.block_size;
        if num_filled > sequence.hashes.len() {
            self.hasher
                .extend(&sequence.root, &mut sequence.hashes, &sequence.tokens);
        }
        self.cache.publish(&mut sequence.table, &sequence.hashes[..num_filled]);
    }

    /// A sequence that the scheduler itself has just named: a missing one is a bug here, caught by the engine's thread.
    fn sequence(&mut self, id: SequenceId) -> &mut Sequence {
        self.sequences.get_mut(&id).expect("a scheduled sequence is known")
    }
}

impl Sequence {
    /// Builds the row that feeds the next `num_tokens` tokens and counts them as computed.
    fn next_row(&mut self, num_tokens: usize) -> (StepRow, PlannedRow, Option<StartedSlot>) {
        let (start, end) = (self.num_computed, self.num_computed + num_tokens);
        let replay = self.replay_end.clamp(start, end) - start;
        let ends = end == self.planned_len();
        let samples = ends && self.pooling.is_none();
        let hidden = self.hidden_row(ends);
        let slot = self.slot.expect("a running sequence has a slot");
        let row = StepRow {
            slot,
            start,
            tokens: match self.tokens.get(start..end) {
                Some(known) => RowTokens::Known(known.to_vec()),
                None => RowTokens::LastSampled,
            },
            replay,
            reset_conv: self.fresh,
            block_table: self.table.share(),
            // The engine's loop hands the mask in between collecting the step before (which tells the grammar its last
            // token) and collecting this one.
            sample: samples.then(|| SampleRow {
                output_index: self.planned_output_len() as u32,
                needs_mask: self.mask_from.is_some_and(|from| self.planned_output_len() >= from),
            }),
            hidden,
        };
        let started = self.fresh.then(|| StartedSlot {
            slot,
            sampling: self.sampling.clone(),
            prompt: self.prompt.clone(),
            output: self.output().to_vec(),
        });
        self.fresh = false;
        self.num_computed = end;
        self.rows_in_flight += 1;
        self.samples_in_flight += usize::from(samples);
        (
            row,
            PlannedRow {
                id: self.id,
                computed_start: start + replay,
                samples,
                pools: hidden.is_some(),
                ends,
            },
            started,
        )
    }
}

#[cfg(test)]
mod tests;
