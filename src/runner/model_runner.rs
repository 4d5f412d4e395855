//! The executor of one model on one backend.

use std::collections::VecDeque;
use std::sync::Arc;

use super::batch::{BatchBuilder, PlanError};
use crate::backend::{Backend, BackendError, SampleRequest, ScoreRequest};
use crate::model::layers::Workspace;
use crate::model::lfm2::text::{Cache, Lfm2Text};
use crate::step::{
    Capacity, DeviceTimes, Executor, ExecutorError, HiddenRow, RowOutput, RowTokens, SampledToken, StepOutput,
    StepPlan, Ticket, TokenId, TokenLogprobs, TokenMask,
};

/// A loaded model and its memory, ready to run steps.
pub struct Parts<B: Backend> {
    pub backend: B,
    pub model: Lfm2Text<B>,
    pub workspace: Workspace<B>,
    pub cache: Cache<B>,
    pub batch: B::Batch,
    pub sampler: B::Sampler,
    /// `[N, V]` f32, one for each step in flight: a step that waits for a mask keeps its logits.
    pub logits: Vec<B::Tensor>,
    /// N: rows of logits that one step computes at once.
    pub logit_rows: usize,
}

/// What the runner knows of a slot.
#[derive(Default)]
struct Slot {
    prompt: Option<Arc<[TokenId]>>,
    wants_prompt_logprobs: bool,
    /// A token was sampled since the slot started, so that it can be fed back.
    sampled: bool,
}

/// A step between `submit` and `collect`.
struct InFlight {
    ticket: u64,
    output: StepOutput,
    /// Index of the step's logits.
    logits: usize,
    /// Sampling that waits for masks: plan row and request.
    deferred: Vec<(usize, SampleRequest)>,
    missing_masks: usize,
    /// Calls of `sample` whose tokens were not read yet.
    unread: usize,
}

/// Runs plans on a backend. Errors of a plan leave the executor usable; errors of the backend say so themselves.
pub struct ModelRunner<B: Backend> {
    parts: Parts<B>,
    capacity: Capacity,
    builder: BatchBuilder,
    slots: Vec<Slot>,
    in_flight: VecDeque<InFlight>,
    /// Calls of `sample` that were not read yet, oldest first: ticket and plan rows.
    issued: VecDeque<(u64, Vec<usize>)>,
    next_ticket: u64,
    scores: Vec<(usize, u32, ScoreRequest)>,
    piece: Vec<ScoreRequest>,
    tokens: Vec<SampledToken>,
    /// `[T, H]` the step's final hidden states, where a row asks for some.
    hidden: Vec<f32>,
}

impl<B: Backend> ModelRunner<B> {
    /// `parts.logits` has `capacity.max_in_flight` tensors; `max_context` is the longest sequence in tokens.
    pub fn new(parts: Parts<B>, capacity: Capacity, max_context: usize) -> Self {
        Self {
            builder: BatchBuilder::new(capacity.clone(), max_context),
            slots: (0..capacity.max_num_seqs).map(|_| Slot::default()).collect(),
            in_flight: VecDeque::with_capacity(capacity.max_in_flight),
            issued: VecDeque::new(),
            next_ticket: 0,
            scores: Vec::new(),
            piece: Vec::new(),
            tokens: Vec::new(),
            hidden: Vec::new(),
            parts,
            capacity,
        }
    }

    /// For the start log.
    pub fn describe(&self) -> String {
        self.parts.backend.describe()
    }

    fn start_slots(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        for started in &plan.started {
            let Some(slot) = self.slots.get_mut(started.slot as usize) else {
                return Err(bug(format!(
                    "slot {} of {} is started",
                    started.slot, self.capacity.max_num_seqs
                )));
            };
            *slot = Slot {
                prompt: Some(started.prompt.clone()),
                wants_prompt_logprobs: started.sampling.prompt_logprobs.is_some(),
                sampled: false,
            };
            self.parts
                .backend
                .start_slot(&mut self.parts.sampler, started)
                .map_err(device)?;
        }
        Ok(())
    }

    /// Checks what `BatchBuilder` cannot know: the slots' histories.
    fn check_slots(&self, plan: &StepPlan) -> Result<(), ExecutorError> {
        for (i, row) in plan.rows.iter().enumerate() {
            let slot = self.slots.get(row.slot as usize);
            if slot.is_none_or(|slot| slot.prompt.is_none()) {
                return Err(bug(format!("row {i}: slot {} was not started", row.slot)));
            }
            if row.hidden == Some(HiddenRow::Sum) && row.replay > 0 {
                return Err(bug(format!("row {i} sums the hidden states of replayed tokens")));
            }
            if row.tokens == RowTokens::LastSampled && slot.is_some_and(|slot| !slot.sampled) {
                return Err(bug(format!("row {i}: slot {} has sampled nothing yet", row.slot)));
            }
        }
        Ok(())
    }

    fn run(&mut self, plan: &StepPlan, logits: usize, output: &mut StepOutput) -> Result<(), BackendError> {
        self.collect_scores(plan);
        let record = self.pad_to_graph() && self.scores.is_empty();
        let Parts {
            backend,
            model,
            workspace,
            cache,
            batch,
            sampler,
            logits: buffers,
            ..
        } = &mut self.parts;
        let layout = self.builder.layout();
        backend.set_batch(batch, layout)?;
        if layout.feedback.contains(&true) {
            backend.feed_back(batch, sampler)?;
        }
        if record {
            let rows = layout.num_rows();
            return backend.record(batch, logits, |backend, batch| {
                model.forward(backend, batch, rows, workspace, cache)?;
                model.logits(backend, batch, rows, workspace, &mut buffers[logits])
            });
        }
        model.forward(backend, batch, layout.num_tokens(), workspace, cache)?;

        self.read_hidden(plan, output)?;
        if !self.scores.is_empty() {
            self.score(logits, output)?;
        }
        let rows = self.builder.layout().logit_tokens.len();
        if rows > 0 {
            let Parts {
                backend,
                model,
                workspace,
                batch,
                logits: buffers,
                ..
            } = &mut self.parts;
            model.logits(backend, batch, rows, workspace, &mut buffers[logits])?;
        }
        Ok(())
    }

    /// Reads the final hidden states of the whole step: few steps ask for any, and those for most of them.
    fn read_hidden(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), BackendError> {
        if plan.rows.iter().all(|row| row.hidden.is_none()) {
            return Ok(());
        }
        let layout = self.builder.layout();
        let Parts { backend, workspace, .. } = &mut self.parts;
        backend.read(&workspace.normed, layout.num_tokens(), &mut self.hidden)?;
        let width = self.hidden.len() / layout.num_tokens();
        for (i, (row, out)) in plan.rows.iter().zip(&mut output.rows).enumerate() {
            let (first, end) = (layout.row_starts[i] as usize, layout.row_starts[i + 1] as usize);
            let states = match row.hidden {
                None => continue,
                Some(HiddenRow::Last) => &self.hidden[(end - 1) * width..end * width],
                Some(HiddenRow::Sum) => &self.hidden[first * width..end * width],
            };
            out.hidden = vec![0.0; width];
            for state in states.chunks_exact(width) {
                for (sum, value) in out.hidden.iter_mut().zip(state) {
                    *sum += value;
                }
            }
        }
        Ok(())
    }

    /// Pads a decode step to the next number of rows that the backend records; false where it records none.
    fn pad_to_graph(&mut self) -> bool {
        let layout = self.builder.layout();
        if !layout.is_decode() {
            return false;
        }
        let rows = layout.num_rows();
        let padded = self.parts.backend.graph_rows().iter().copied().find(|&n| n >= rows);
        match padded {
            Some(padded) if padded <= self.capacity.max_num_seqs => {
                self.builder.pad_rows(padded);
                true
            }
            _ => false,
        }
    }

    /// Finds the prompt tokens whose log-probabilities are wanted: plan row, token in the step, request.
    fn collect_scores(&mut self, plan: &StepPlan) {
        self.scores.clear();
        for (i, row) in plan.rows.iter().enumerate() {
            let slot = &self.slots[row.slot as usize];
            let (true, Some(prompt)) = (slot.wants_prompt_logprobs, &slot.prompt) else {
                continue;
            };
            let first = self.builder.layout().row_starts[i] as usize;
            for offset in row.replay..row.tokens.len() {
                let Some(&next_token) = prompt.get(row.start + offset + 1) else {
                    break;
                };
                let request = ScoreRequest {
                    logit_row: 0,
                    slot: row.slot,
                    next_token,
                };
                self.scores.push((i, (first + offset) as u32, request));
            }
        }
    }

    /// Scores in pieces that fit the logits buffer, then puts the sampling rows' tokens back into the batch.
    fn score(&mut self, logits: usize, output: &mut StepOutput) -> Result<(), BackendError> {
        let sampling_tokens = self.builder.layout().logit_tokens.clone();
        let Parts {
            backend,
            model,
            workspace,
            batch,
            sampler,
            logits: buffers,
            logit_rows,
            ..
        } = &mut self.parts;
        let mut scored: Vec<TokenLogprobs> = Vec::new();
        for piece in self.scores.chunks(*logit_rows) {
            self.builder.set_logit_tokens(piece.iter().map(|&(_, token, _)| token));
            backend.set_batch(batch, self.builder.layout())?;
            model.logits(backend, batch, piece.len(), workspace, &mut buffers[logits])?;
            self.piece.clear();
            let numbered = piece.iter().enumerate();
            self.piece
                .extend(numbered.map(|(logit_row, &(_, _, request))| ScoreRequest { logit_row, ..request }));
            scored.clear();
            backend.score(&buffers[logits], &self.piece, sampler, &mut scored)?;
            if scored.len() != piece.len() {
                return Err(miscount("score", piece.len(), scored.len()));
            }
            for (&(row, _, _), logprobs) in piece.iter().zip(scored.drain(..)) {
                output.rows[row].prompt_logprobs.push(logprobs);
            }
        }
        self.builder.set_logit_tokens(sampling_tokens);
        self.parts
            .backend
            .set_batch(&mut self.parts.batch, self.builder.layout())
    }

    /// Samples the rows that wait for nothing; lists the others.
    fn sample(&mut self, plan: &StepPlan, step: &mut InFlight) -> Result<(), BackendError> {
        let (mut rows, mut requests) = (Vec::new(), Vec::new());
        let mut logit_row = 0;
        for (i, row) in plan.rows.iter().enumerate() {
            let Some(sample) = &row.sample else { continue };
            let request = SampleRequest {
                logit_row,
                slot: row.slot,
                output_index: sample.output_index,
                mask: None,
            };
            logit_row += 1;
            if sample.needs_mask {
                step.deferred.push((i, request));
            } else {
                rows.push(i);
                requests.push(request);
            }
        }
        step.missing_masks = step.deferred.len();
        if rows.is_empty() {
            return Ok(());
        }
        self.issue(step, rows, &requests)
    }

    fn issue(&mut self, step: &mut InFlight, rows: Vec<usize>, requests: &[SampleRequest]) -> Result<(), BackendError> {
        let Parts {
            backend,
            sampler,
            logits,
            ..
        } = &mut self.parts;
        backend.sample(&logits[step.logits], requests, sampler)?;
        for request in requests {
            self.slots[request.slot as usize].sampled = true;
        }
        self.issued.push_back((step.ticket, rows));
        step.unread += 1;
        Ok(())
    }

    /// Reads the oldest sample into the step it belongs to.
    fn read_oldest(&mut self) -> Result<(), BackendError> {
        let Some((ticket, rows)) = self.issued.pop_front() else {
            return Err(miscount("sampled", 1, 0));
        };
        self.tokens.clear();
        self.parts.backend.sampled(&mut self.parts.sampler, &mut self.tokens)?;
        if self.tokens.len() != rows.len() {
            return Err(miscount("sampled", rows.len(), self.tokens.len()));
        }
        if let Some(step) = self.in_flight.iter_mut().find(|step| step.ticket == ticket) {
            step.unread -= 1;
            for (row, token) in rows.into_iter().zip(self.tokens.drain(..)) {
                step.output.rows[row].sampled = Some(token);
            }
        }
        Ok(())
    }

    /// Takes a step out, together with what it still has to read.
    fn finish(&mut self, ticket: u64) -> Result<StepOutput, ExecutorError> {
        while self
            .in_flight
            .iter()
            .any(|step| step.ticket == ticket && step.unread > 0)
        {
            if let Err(error) = self.read_oldest() {
                self.in_flight.retain(|step| step.ticket != ticket);
                return Err(device(error));
            }
        }
        match self.in_flight.pop_front() {
            Some(step) if step.missing_masks > 0 => Err(bug(format!(
                "step {ticket} is collected while {} masks are missing",
                step.missing_masks
            ))),
            Some(step) => Ok(step.output),
            None => Err(bug(format!("step {ticket} is not in flight"))),
        }
    }
}

impl<B: Backend> Executor for ModelRunner<B> {
    fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    fn device_times(&mut self) -> Option<DeviceTimes> {
        self.parts.backend.device_times().ok().flatten()
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<Ticket, ExecutorError> {
        if self.in_flight.len() >= self.capacity.max_in_flight {
            return Err(bug(format!("{} steps are in flight already", self.in_flight.len())));
        }
        self.builder.build(plan).map_err(|PlanError(message)| bug(message))?;
        self.start_slots(plan)?;
        self.check_slots(plan)?;

        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let free = (0..self.parts.logits.len()).find(|&i| self.in_flight.iter().all(|step| step.logits != i));
        let Some(logits) = free else {
            return Err(bug("no logits buffer is free".into()));
        };
        let mut output = StepOutput {
            rows: Vec::with_capacity(plan.rows.len()),
        };
        output.rows.resize_with(plan.rows.len(), RowOutput::default);
        let mut step = InFlight {
            ticket,
            output,
            logits,
            deferred: Vec::new(),
            missing_masks: 0,
            unread: 0,
        };
        if !plan.rows.is_empty() {
            self.run(plan, logits, &mut step.output).map_err(device)?;
            self.sample(plan, &mut step).map_err(device)?;
        }
        self.in_flight.push_back(step);
        Ok(Ticket(ticket))
    }

    fn set_mask(&mut self, ticket: &Ticket, row: usize, mask: TokenMask) -> Result<(), ExecutorError> {
        let Some(index) = self.in_flight.iter().position(|step| step.ticket == ticket.0) else {
            return Err(bug(format!("step {} is not in flight", ticket.0)));
        };
        let step = &mut self.in_flight[index];
        match step.deferred.iter_mut().find(|(waiting, _)| *waiting == row) {
            Some((_, request)) if request.mask.is_none() => request.mask = Some(mask),
            _ => return Err(bug(format!("row {row} of step {} waits for no mask", ticket.0))),
        }
        step.missing_masks -= 1;
        if step.missing_masks > 0 {
            return Ok(());
        }
        let (rows, requests): (Vec<usize>, Vec<SampleRequest>) = step.deferred.drain(..).unzip();
        let Some(mut step) = self.in_flight.remove(index) else {
            return Ok(());
        };
        let issued = self.issue(&mut step, rows, &requests);
        self.in_flight.insert(index, step);
        issued.map_err(device)
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError> {
        match self.in_flight.front() {
            Some(oldest) if oldest.ticket == ticket.0 => self.finish(ticket.0),
            _ => Err(bug(format!("step {} is not the oldest in flight", ticket.0))),
        }
    }
}

/// The plan breaks the contract; the step is lost, the executor goes on.
fn bug(message: String) -> ExecutorError {
    ExecutorError {
        message: format!("invalid step: {message}"),
        fatal: false,
    }
}

fn device(error: BackendError) -> ExecutorError {
    ExecutorError {
        message: error.to_string(),
        fatal: error.fatal,
    }
}

fn miscount(op: &'static str, wanted: usize, got: usize) -> BackendError {
    BackendError {
        op,
        message: format!("{wanted} results expected, {got} returned"),
        fatal: true,
    }
}
