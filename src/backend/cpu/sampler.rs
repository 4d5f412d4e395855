//! The sampling state of every slot, and the steps' samples until they are collected.

use std::collections::VecDeque;
use std::sync::Arc;

use super::pool::{Pool, Shards};
use super::sampling::{self, History, Scratch, TokenCounts};
use super::simd::Isa;
use crate::backend::{BackendError, Result, SampleRequest, ScoreRequest};
use crate::step::{SampledToken, SamplingParams, SlotId, StartedSlot, TokenId, TokenLogprobs};

/// Slots `0..slots`; samples wait in the order they were taken.
pub struct CpuSampler {
    isa: Isa,
    vocab: usize,
    max_rows: usize,
    slots: Vec<Option<Slot>>,
    /// Per thread.
    scratch: Vec<Scratch>,
    results: Vec<(TokenId, Option<TokenLogprobs>)>,
    waiting: VecDeque<Vec<SampledToken>>,
    /// Emptied vectors of `waiting`, to be filled again.
    spare: Vec<Vec<SampledToken>>,
}

struct Slot {
    params: Arc<SamplingParams>,
    output: Vec<TokenId>,
    /// Only with penalties.
    counts: Option<TokenCounts>,
}

fn fail(op: &'static str, message: String) -> BackendError {
    BackendError {
        op,
        message,
        fatal: false,
    }
}

impl CpuSampler {
    pub(super) fn new(isa: Isa, slots: usize, vocab: usize, max_rows: usize, threads: usize) -> Self {
        Self {
            isa,
            vocab,
            max_rows,
            slots: (0..slots).map(|_| None).collect(),
            scratch: (0..threads).map(|_| Scratch::default()).collect(),
            results: Vec::with_capacity(max_rows),
            waiting: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    pub(super) fn vocab(&self) -> usize {
        self.vocab
    }

    pub(super) fn start(&mut self, started: &StartedSlot) -> Result<()> {
        let room = self.slots.len();
        let Some(slot) = self.slots.get_mut(started.slot as usize) else {
            return Err(fail("start_slot", format!("slot {} of {room}", started.slot)));
        };
        let params = Arc::clone(&started.sampling);
        let counts = sampling::uses_penalties(&params).then(|| TokenCounts::new(&started.prompt, &started.output));
        *slot = Some(Slot {
            params,
            output: started.output.clone(),
            counts,
        });
        Ok(())
    }

    fn slot(&self, op: &'static str, slot: SlotId) -> Result<&Slot> {
        let state = self.slots.get(slot as usize).and_then(Option::as_ref);
        state.ok_or_else(|| fail(op, format!("slot {slot} was never started")))
    }

    pub(super) fn last_sampled(&self, slot: SlotId) -> Result<TokenId> {
        let output = &self.slot("feed_back", slot)?.output;
        output
            .last()
            .copied()
            .ok_or_else(|| fail("feed_back", format!("slot {slot} has sampled nothing yet")))
    }

    pub(super) fn sample(&mut self, pool: &mut Pool, logits: &[f32], requests: &[SampleRequest]) -> Result<()> {
        if requests.len() > self.max_rows {
            return Err(fail(
                "sample",
                format!("{} rows; room for {}", requests.len(), self.max_rows),
            ));
        }
        for request in requests {
            self.slot("sample", request.slot)?;
        }
        let mut results = std::mem::take(&mut self.results);
        results.clear();
        results.resize(requests.len(), (0, None));
        let mut scratch = std::mem::take(&mut self.scratch);
        {
            let (results, scratch) = (Shards::new(&mut results), Shards::new(&mut scratch));
            pool.run(requests.len(), |i, thread| {
                let request = &requests[i];
                let Ok(slot) = self.slot("sample", request.slot) else {
                    return;
                };
                let row = &logits[request.logit_row * self.vocab..][..self.vocab];
                let history = History {
                    output: &slot.output,
                    counts: slot.counts.as_ref(),
                    output_index: request.output_index,
                };
                // SAFETY: one result per task; a thread runs one task at a time.
                let (result, scratch) = unsafe { (&mut results.slice(i, 1)[0], &mut scratch.slice(thread, 1)[0]) };
                *result = sampling::sample(self.isa, row, &slot.params, &history, request.mask.as_ref(), scratch);
            });
        }
        let mut tokens = self.spare.pop().unwrap_or_default();
        for (request, (id, logprobs)) in requests.iter().zip(results.drain(..)) {
            if let Some(Some(slot)) = self.slots.get_mut(request.slot as usize) {
                slot.output.push(id);
                if let Some(counts) = &mut slot.counts {
                    counts.add_output(id);
                }
            }
            tokens.push(SampledToken { id, logprobs });
        }
        (self.results, self.scratch) = (results, scratch);
        self.waiting.push_back(tokens);
        Ok(())
    }

    /// Replaces `out` by the oldest uncollected samples.
    pub(super) fn take_sampled(&mut self, out: &mut Vec<SampledToken>) -> Result<()> {
        let mut tokens = self
            .waiting
            .pop_front()
            .ok_or_else(|| fail("sampled", "no sample is waiting".into()))?;
        out.clear();
        out.append(&mut tokens);
        self.spare.push(tokens);
        Ok(())
    }

    /// Replaces `out` by one entry per request.
    pub(super) fn score(
        &mut self,
        pool: &mut Pool,
        logits: &[f32],
        requests: &[ScoreRequest],
        out: &mut Vec<TokenLogprobs>,
    ) -> Result<()> {
        for request in requests {
            self.slot("score", request.slot)?;
        }
        out.clear();
        out.resize(
            requests.len(),
            TokenLogprobs {
                id: 0,
                logprob: 0.0,
                rank: 0,
                top: Vec::new(),
            },
        );
        let mut scratch = std::mem::take(&mut self.scratch);
        {
            let (out, scratch) = (Shards::new(out), Shards::new(&mut scratch));
            pool.run(requests.len(), |i, thread| {
                let request = &requests[i];
                let Ok(slot) = self.slot("score", request.slot) else {
                    return;
                };
                let row = &logits[request.logit_row * self.vocab..][..self.vocab];
                let top = slot.params.prompt_logprobs.unwrap_or(0);
                // SAFETY: one entry per task; a thread runs one task at a time.
                let (entry, scratch) = unsafe { (&mut out.slice(i, 1)[0], &mut scratch.slice(thread, 1)[0]) };
                *entry = sampling::score(self.isa, row, request.next_token, top, scratch);
            });
        }
        self.scratch = scratch;
        Ok(())
    }
}
