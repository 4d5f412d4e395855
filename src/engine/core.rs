//! The engine's loop, on its own thread: commands, plan, submit, collect, deliver.
//!
//! The plain and the overlapped loop are the same: an executor with two steps in flight gets the next one before the
//! last is collected, one with a single step does not.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use tokio::sync::{oneshot, watch};

use super::constrained::{self, Constrained, DueMask};
use super::handle::{Exit, Shared};
use super::scheduler::{NewSequence, PlannedRow, PlannedStep, Progress, Scheduler, SequenceId, SequenceMap};
use super::stream::SequenceSink;
use super::trace::TracedRequest;
use super::{ChoiceGroup, EngineError, EngineStats, FinishReason, PauseMode, SequenceEvent, SequenceTiming};
use crate::metrics::{EngineMetrics, FinishedRequest};
use crate::otlp::SpanIds;
use crate::step::{Executor, ExecutorError, SamplingParams, Ticket, TokenMask};

/// What handles and streams ask of the engine.
#[derive(Debug)]
pub(super) enum Command {
    Submit(Box<Submission>),
    Abort(SequenceId),
    /// The client has all it wanted: a stop string ended its text after this many tokens.
    Stop {
        id: SequenceId,
        num_tokens: usize,
    },
    Pause {
        mode: PauseMode,
        reply: oneshot::Sender<()>,
    },
    Resume {
        reply: oneshot::Sender<()>,
    },
    ResetPrefixCache {
        preempt_running: bool,
        reply: oneshot::Sender<bool>,
    },
    /// None = all.
    AbortRequests {
        ids: Option<Vec<String>>,
        reply: oneshot::Sender<usize>,
    },
    Drain {
        deadline: Instant,
    },
}

#[derive(Debug)]
pub(super) struct Submission {
    pub sequence: NewSequence,
    pub constraint: Option<Box<Constrained>>,
    pub sink: SequenceSink,
    pub arrival: Instant,
    pub request_id: String,
    pub group: Arc<ChoiceGroup>,
    /// None = not traced.
    pub span: Option<SpanIds>,
}

pub(super) struct Core {
    executor: Box<dyn Executor>,
    scheduler: Scheduler,
    inbox: Receiver<Command>,
    shared: Arc<Shared>,
    clients: SequenceMap<Client>,
    /// Submitted steps, the oldest first.
    in_flight: VecDeque<InFlight>,
    /// For rows whose sequence has ended, or fails.
    any_token: TokenMask,
    stats: EngineStats,
    stats_log: StatsLog,
    paused: Option<PauseMode>,
    pause_replies: Vec<oneshot::Sender<()>>,
    drain_deadline: Option<Instant>,
}

struct InFlight {
    ticket: Ticket,
    rows: Vec<PlannedRow>,
    masks_due: Vec<DueMask>,
}

/// Who waits for a sequence, and its times.
struct Client {
    sink: SequenceSink,
    constraint: Option<Box<Constrained>>,
    request_id: String,
    group: Arc<ChoiceGroup>,
    span: Option<SpanIds>,
    sampling: Arc<SamplingParams>,
    num_prompt_tokens: usize,
    max_tokens: u32,
    num_generated: usize,
    num_preemptions: usize,
    num_cached_tokens: usize,
    arrival: Instant,
    /// None while it waits in the queue for the first time.
    admitted: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Core {
    pub fn new(
        executor: Box<dyn Executor>,
        scheduler: Scheduler,
        inbox: Receiver<Command>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            any_token: constrained::any_token(shared.capacity.vocab_size),
            executor,
            scheduler,
            inbox,
            shared,
            clients: SequenceMap::default(),
            in_flight: VecDeque::new(),
            stats: EngineStats::default(),
            stats_log: StatsLog::new(),
            paused: None,
            pause_replies: Vec::new(),
            drain_deadline: None,
        }
    }

    /// Runs until drained, abandoned or failed. A panic, the executor's or our own, counts as a failure of the device:
    /// nothing that was running can be trusted.
    pub fn run_to_exit(mut self, exit: &watch::Sender<Option<Exit>>) {
        let failure = match catch_unwind(AssertUnwindSafe(|| self.run())) {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.message),
            Err(panic) => Some(format!(
                "panic in the engine's thread: {}",
                panic_message(panic.as_ref())
            )),
        };
        let Some(message) = failure else {
            exit.send_replace(Some(Exit::Finished));
            return;
        };
        tracing::error!("the engine is dead: {message}");
        // First, so that whoever gets the error below finds the engine stopped.
        exit.send_replace(Some(Exit::Failed(message.clone())));
        for (_, client) in self.clients.drain() {
            client.fail(&self.shared, &message);
        }
    }

    fn run(&mut self) -> Result<(), ExecutorError> {
        let mut idle = false;
        loop {
            if !self.take_commands(idle) {
                return Ok(());
            }
            if !self.clients.is_empty() && self.paused.is_none() {
                self.shared.set_busy();
            }
            if self.drain_deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                self.cut_all();
            }
            self.fill_pipeline()?;
            match self.in_flight.pop_front() {
                Some(step) => {
                    self.finish_step(step)?;
                    self.shared.note_progress();
                    idle = false;
                }
                None => idle = true,
            }
            self.report();
            self.answer_pauses();
            if self.drain_deadline.is_some() && self.clients.is_empty() && self.in_flight.is_empty() {
                return Ok(());
            }
        }
    }

    /// Carries out what has been asked; when idle, sleeps until something is. False when nobody can ask any more.
    fn take_commands(&mut self, idle: bool) -> bool {
        if idle {
            // Sequences that cannot be planned are a stall, unless a pause holds them.
            if self.clients.is_empty() || self.paused.is_some() {
                self.shared.set_idle();
            }
            let wake_up = [self.drain_deadline, self.stats_log.due(&self.shared)]
                .into_iter()
                .flatten()
                .min();
            let command = match wake_up {
                Some(wake_up) => self.inbox.recv_deadline(wake_up),
                None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match command {
                Ok(command) => self.execute(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        while let Ok(command) = self.inbox.try_recv() {
            self.execute(command);
        }
        true
    }

    fn execute(&mut self, command: Command) {
        // An answer whose asker has gone is of no use to anyone.
        match command {
            Command::Submit(submission) => self.add(*submission),
            Command::Abort(id) => {
                self.scheduler.abort(id);
                if let Some(client) = self.clients.remove(&id) {
                    tracing::debug!(request_id = client.request_id, "aborted by the client");
                    client.leave_queue(&self.shared);
                }
            }
            Command::Stop { id, num_tokens } => {
                self.scheduler.abort(id);
                if let Some(mut client) = self.clients.remove(&id) {
                    // Tokens computed meanwhile belong to no answer.
                    client.num_generated = num_tokens;
                    client.record(&self.shared, "stop", Instant::now());
                }
            }
            Command::Pause { mode, reply } => {
                self.paused = Some(mode);
                self.scheduler.hold_admissions(true);
                if mode == PauseMode::Abort {
                    self.abort(|_| true);
                }
                self.pause_replies.push(reply);
            }
            Command::Resume { reply } => {
                self.paused = None;
                self.scheduler.hold_admissions(false);
                self.pause_replies.clear();
                let _ = reply.send(());
            }
            Command::ResetPrefixCache { preempt_running, reply } => {
                if preempt_running {
                    self.scheduler.preempt_all();
                }
                let _ = reply.send(self.scheduler.reset_prefix_cache());
            }
            Command::AbortRequests { ids, reply } => {
                let aborted = match ids {
                    None => self.abort(|_| true),
                    Some(ids) => self.abort(|request_id| ids.iter().any(|id| is_of_request(request_id, id))),
                };
                let _ = reply.send(aborted);
            }
            Command::Drain { deadline } => {
                self.drain_deadline = Some(self.drain_deadline.map_or(deadline, |earlier| earlier.min(deadline)));
            }
        }
    }

    fn add(&mut self, submission: Submission) {
        let Submission {
            sequence,
            constraint,
            sink,
            arrival,
            request_id,
            group,
            span,
        } = submission;
        let client = Client {
            sink,
            constraint,
            request_id,
            group,
            span,
            sampling: sequence.sampling.clone(),
            num_prompt_tokens: sequence.prompt.len(),
            max_tokens: sequence.stop.max_tokens,
            num_generated: 0,
            num_preemptions: 0,
            num_cached_tokens: 0,
            arrival,
            admitted: None,
            first_token: None,
            last_token: None,
        };
        self.clients.insert(sequence.id, client);
        self.scheduler.add(sequence);
    }

    /// Ends the sequences of the requests that `chosen` names, on the server's account; returns how many.
    fn abort(&mut self, chosen: impl Fn(&str) -> bool) -> usize {
        let mut clients = self.take(chosen);
        for client in &mut clients {
            client.record(&self.shared, "abort", Instant::now());
            client.sink.send(SequenceEvent {
                num_cached_tokens: client.num_cached_tokens,
                finish: Some(FinishReason::Abort),
                ..SequenceEvent::default()
            });
        }
        clients.len()
    }

    /// The drain's time is over: what is left fails, so that nobody takes a cut answer for a whole one.
    fn cut_all(&mut self) {
        for mut client in self.take(|_| true) {
            client.record(&self.shared, "abort", Instant::now());
            client.sink.fail(EngineError::ShuttingDown);
        }
    }

    /// Takes the chosen requests' sequences out of the schedule, and those who wait for them.
    fn take(&mut self, chosen: impl Fn(&str) -> bool) -> Vec<Client> {
        let ids: Vec<SequenceId> = self
            .clients
            .iter()
            .filter(|(_, client)| chosen(&client.request_id))
            .map(|(id, _)| *id)
            .collect();
        let mut taken = Vec::with_capacity(ids.len());
        for id in ids {
            self.scheduler.abort(id);
            if let Some(client) = self.clients.remove(&id) {
                client.leave_queue(&self.shared);
                taken.push(client);
            }
        }
        taken
    }

    /// Submits steps until the executor has as many as it takes.
    fn fill_pipeline(&mut self) -> Result<(), ExecutorError> {
        let max_in_flight = self.shared.capacity.max_in_flight.max(1);
        while self.paused != Some(PauseMode::Keep) && self.in_flight.len() < max_in_flight {
            let Some(step) = self.scheduler.plan() else { break };
            self.note_plan(&step);
            match self.executor.submit(&step.plan) {
                Ok(ticket) => {
                    self.in_flight.push_back(InFlight {
                        ticket,
                        masks_due: DueMask::of(&step.plan, &step.rows),
                        rows: step.rows,
                    });
                    self.supply_masks()?;
                }
                Err(error) if error.fatal => return Err(error),
                Err(error) => self.fail_rows(&step.rows, &error),
            }
        }
        Ok(())
    }

    /// Hands in the masks that can be computed: those of sequences whose last token is known. The others follow when the step
    /// before has been collected.
    fn supply_masks(&mut self) -> Result<(), ExecutorError> {
        match self.hand_in_masks() {
            Err(error) if !error.fatal => self.lose_steps(&error),
            done => done,
        }
    }

    fn hand_in_masks(&mut self) -> Result<(), ExecutorError> {
        for at in 0..self.in_flight.len() {
            let (mut owners, mut constraints) = (Vec::new(), Vec::new());
            let step = &mut self.in_flight[at];
            let mut pending = Vec::new();
            for due in std::mem::take(&mut step.masks_due) {
                let constraint = self.clients.get_mut(&due.id).map(|client| &mut client.constraint);
                match constraint {
                    Some(Some(constraint)) if !constraint.is_ready(due.output_index) => pending.push(due),
                    Some(constraint @ Some(_)) => {
                        owners.push(due);
                        constraints.extend(constraint.take());
                    }
                    // Its sequence has ended: what the row samples is dropped.
                    _ => self.executor.set_mask(&step.ticket, due.row, self.any_token.clone())?,
                }
            }
            step.masks_due = pending;
            let masks = constrained::masks(&mut constraints);
            for ((due, constraint), mask) in owners.into_iter().zip(constraints).zip(masks) {
                if let Some(client) = self.clients.get_mut(&due.id) {
                    client.constraint = Some(constraint);
                }
                let mask = match mask {
                    Ok(mask) => mask,
                    Err(violation) => {
                        self.fail_sequence(due.id, violation.0);
                        self.any_token.clone()
                    }
                };
                self.executor.set_mask(&self.in_flight[at].ticket, due.row, mask)?;
            }
        }
        Ok(())
    }

    /// Ends one sequence that cannot go on; no other notices.
    fn fail_sequence(&mut self, id: SequenceId, message: String) {
        self.scheduler.abort(id);
        if let Some(mut client) = self.clients.remove(&id) {
            tracing::debug!(request_id = client.request_id, "failed: {message}");
            client.leave_queue(&self.shared);
            client.record(&self.shared, "error", Instant::now());
            client.sink.fail(EngineError::Constraint(message));
        }
    }

    fn note_plan(&mut self, step: &PlannedStep) {
        let metrics = &self.shared.metrics.engine;
        self.stats.num_steps += 1;
        for id in &step.preempted {
            self.stats.num_preemptions += 1;
            metrics.num_preemptions.inc();
            if let Some(client) = self.clients.get_mut(id) {
                client.num_preemptions += 1;
                tracing::debug!(request_id = client.request_id, "preempted: out of KV blocks");
            }
        }
        let now = Instant::now();
        for admitted in step.admitted.iter().filter(|admitted| admitted.first) {
            let Some(client) = self.clients.get_mut(&admitted.id) else {
                continue;
            };
            client.admitted = Some(now);
            client.num_cached_tokens = admitted.num_cached_tokens;
            self.shared.dequeue(client.num_prompt_tokens);
            if self.scheduler.cache().prefix_caching() {
                self.stats.prefix_cache_queries += client.num_prompt_tokens as u64;
                self.stats.prefix_cache_hits += admitted.num_cached_tokens as u64;
                metrics.prefix_cache_queries.inc_by(client.num_prompt_tokens as u64);
                metrics.prefix_cache_hits.inc_by(admitted.num_cached_tokens as u64);
            }
        }
    }

    fn finish_step(&mut self, step: InFlight) -> Result<(), ExecutorError> {
        match self.executor.collect(step.ticket) {
            Ok(output) => {
                let progress = self
                    .scheduler
                    .complete(&step.rows, output)
                    .map_err(|bad| ExecutorError {
                        message: bad.to_string(),
                        fatal: true,
                    })?;
                self.deliver(progress);
                self.supply_masks()
            }
            Err(error) if error.fatal => Err(error),
            Err(error) => {
                self.fail_rows(&step.rows, &error);
                // Steps behind a lost one have read what it did not write.
                self.lose_steps(&error)
            }
        }
    }

    /// Fails what is in flight.
    fn lose_steps(&mut self, error: &ExecutorError) -> Result<(), ExecutorError> {
        while let Some(step) = self.in_flight.pop_front() {
            if let Err(second) = self.executor.collect(step.ticket)
                && second.fatal
            {
                return Err(second);
            }
            self.fail_rows(&step.rows, error);
        }
        Ok(())
    }

    fn fail_rows(&mut self, rows: &[PlannedRow], error: &ExecutorError) {
        let failed = self.scheduler.fail(rows);
        tracing::error!("a step failed and {} requests with it: {error}", failed.len());
        for id in failed {
            if let Some(client) = self.clients.remove(&id) {
                client.fail(&self.shared, &error.message);
            }
        }
    }

    /// Sends each new token to its client.
    fn deliver(&mut self, progress: Vec<Progress>) {
        let metrics = &self.shared.metrics.engine;
        let now = Instant::now();
        let num_generated = progress.iter().filter(|progress| progress.token.is_some()).count();
        let mut num_prompt_tokens = 0;
        metrics.generation_tokens.inc_by(num_generated as u64);
        let mut violations = Vec::new();
        for mut progress in progress {
            let Some(client) = self.clients.get_mut(&progress.id) else {
                continue;
            };
            if let (Some(constraint), Some(token)) = (&mut client.constraint, &progress.token)
                && progress.finish.is_none()
            {
                if let Err(violation) = constraint.push(token.id) {
                    violations.push((progress.id, violation.0));
                    continue;
                }
                self.scheduler.set_mask_from(progress.id, constraint.mask_from());
                if constraint.is_complete() {
                    self.scheduler.abort(progress.id);
                    progress.finish = Some(FinishReason::Stop(None));
                }
            }
            if client.first_token.is_none() {
                num_prompt_tokens += client.num_prompt_tokens;
            }
            match progress.token {
                Some(_) => client.note_token(metrics, now),
                None => client.note_prompt(metrics, now),
            }
            let event = SequenceEvent {
                tokens: progress.token.into_iter().collect(),
                hidden: progress.hidden,
                prompt_logprobs: progress.prompt_logprobs,
                num_cached_tokens: progress.num_cached_tokens,
                timing: progress.finish.as_ref().map(|_| client.timing()),
                finish: progress.finish,
            };
            // The metrics come first: who has read the last event finds the request in them.
            match event.finish.as_ref().map(finished_reason) {
                None => client.sink.send(event),
                Some(reason) => {
                    client.record(&self.shared, reason, now);
                    client.sink.send(event);
                    self.clients.remove(&progress.id);
                }
            }
        }
        self.stats.prompt_tokens += num_prompt_tokens as u64;
        self.stats.generation_tokens += num_generated as u64;
        metrics
            .iteration_tokens
            .observe((num_prompt_tokens + num_generated) as f64);
        for (id, message) in violations {
            self.fail_sequence(id, message);
        }
    }

    fn answer_pauses(&mut self) {
        let waits_for_running = self.paused == Some(PauseMode::Wait) && self.scheduler.num_running() > 0;
        if self.in_flight.is_empty() && !waits_for_running {
            for reply in self.pause_replies.drain(..) {
                let _ = reply.send(());
            }
        }
    }

    fn report(&mut self) {
        self.stats.num_running = self.scheduler.num_running();
        self.stats.num_waiting = self.scheduler.num_waiting();
        self.stats.kv_cache_usage = self.scheduler.cache().usage();
        self.shared.set_stats(&self.stats);
        let metrics = &self.shared.metrics.engine;
        metrics.num_requests_running.set(self.stats.num_running as f64);
        metrics.num_requests_waiting.set(self.stats.num_waiting as f64);
        metrics.num_requests_waiting_capacity.set(self.stats.num_waiting as f64);
        metrics.kv_cache_usage.set(self.stats.kv_cache_usage);
        self.stats_log.log_if_due(&self.shared, &self.stats);
    }
}

impl Client {
    fn note_token(&mut self, metrics: &EngineMetrics, now: Instant) {
        self.num_generated += 1;
        match self.last_token {
            Some(last) => metrics.inter_token_latency.observe((now - last).as_secs_f64()),
            None => {
                metrics
                    .time_to_first_token
                    .observe(now.saturating_duration_since(self.arrival).as_secs_f64());
                self.note_prompt(metrics, now);
            }
        }
        self.last_token = Some(now);
    }

    fn timing(&self) -> SequenceTiming {
        let between = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from),
            _ => Duration::ZERO,
        };
        SequenceTiming {
            queue: between(Some(self.arrival), self.admitted),
            prefill: between(self.admitted, self.first_token),
            decode: between(self.first_token, self.last_token),
        }
    }

    /// The whole prompt is computed.
    fn note_prompt(&mut self, metrics: &EngineMetrics, now: Instant) {
        self.first_token = Some(now);
        metrics.observe_prompt(self.num_prompt_tokens, self.num_cached_tokens);
    }

    /// A client that goes before its sequence was admitted gives its place in the queue back.
    fn leave_queue(&self, shared: &Shared) {
        if self.admitted.is_none() {
            shared.dequeue(self.num_prompt_tokens);
        }
    }

    fn fail(mut self, shared: &Shared, message: &str) {
        self.leave_queue(shared);
        self.record(shared, "error", Instant::now());
        self.sink.fail(EngineError::Device(message.to_owned()));
    }

    /// The sequence is over: its place in the metrics and, where it is traced, its span.
    fn record(&self, shared: &Shared, reason: &'static str, now: Instant) {
        let seconds = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => Some(to.saturating_duration_since(from).as_secs_f64()),
            _ => None,
        };
        let metrics = &shared.metrics.engine;
        let finished = FinishedRequest {
            reason,
            num_prompt_tokens: self.num_prompt_tokens,
            num_cached_tokens: self.num_cached_tokens,
            num_generated_tokens: self.num_generated,
            max_tokens: self.max_tokens,
            num_preemptions: self.num_preemptions,
            e2e_s: now.saturating_duration_since(self.arrival).as_secs_f64(),
            queue_s: seconds(Some(self.arrival), self.admitted),
            prefill_s: seconds(self.admitted, self.first_token),
            decode_s: seconds(self.first_token, self.last_token),
            inference_s: seconds(self.admitted, self.last_token),
        };
        metrics.observe_finished(&finished);
        if let Some(longest) = self.group.finish(self.num_generated) {
            metrics.observe_group(self.group.size(), longest);
        }
        if let (Some(ids), Some(tracer)) = (&self.span, &shared.config.tracer) {
            let ttft_s = seconds(Some(self.arrival), self.first_token);
            let request = TracedRequest {
                id: &self.request_id,
                n: self.group.size(),
                sampling: &self.sampling,
                arrival: self.arrival,
                ttft_s,
            };
            tracer.export(request.span(ids.clone(), &finished));
        }
    }
}

/// Whether a sequence belongs to the request `id`: it has its name, or is one of its choices, `<id>-<index>`.
fn is_of_request(request_id: &str, id: &str) -> bool {
    match request_id.strip_prefix(id) {
        Some("") => true,
        Some(rest) => rest
            .strip_prefix('-')
            .is_some_and(|index| !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit())),
        None => false,
    }
}

/// The value of the label `finished_reason`.
fn finished_reason(finish: &FinishReason) -> &'static str {
    match finish {
        FinishReason::Stop(_) => "stop",
        FinishReason::Length => "length",
        FinishReason::Repetition => "repetition",
        FinishReason::Abort => "abort",
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// vLLM's periodic line, written only when tokens have been computed since the last one.
struct StatsLog {
    last: Instant,
    prompt_tokens: u64,
    generation_tokens: u64,
    active: bool,
}

impl StatsLog {
    fn new() -> Self {
        Self {
            last: Instant::now(),
            prompt_tokens: 0,
            generation_tokens: 0,
            active: false,
        }
    }

    /// When the next line must be written even if nothing happens.
    fn due(&self, shared: &Shared) -> Option<Instant> {
        let interval = shared.config.log_stats_interval?;
        self.active.then_some(self.last + interval)
    }

    fn log_if_due(&mut self, shared: &Shared, stats: &EngineStats) {
        let Some(interval) = shared.config.log_stats_interval else {
            return;
        };
        let prompt = stats.prompt_tokens - self.prompt_tokens;
        let generated = stats.generation_tokens - self.generation_tokens;
        let was_active = self.active;
        self.active = prompt + generated > 0;
        let elapsed = self.last.elapsed();
        if !was_active && self.active && elapsed > interval {
            // The pause before the first token is no part of the throughput.
            self.last = Instant::now();
            return;
        }
        if !self.active || elapsed < interval {
            return;
        }
        let hit_rate = 100.0 * stats.prefix_cache_hits as f64 / stats.prefix_cache_queries.max(1) as f64;
        tracing::info!(
            "Engine 000: Avg prompt throughput: {:.1} tokens/s, Avg generation throughput: {:.1} tokens/s, \
             Running: {} reqs, Waiting: {} reqs, GPU KV cache usage: {:.1}%, Prefix cache hit rate: {hit_rate:.1}%",
            prompt as f64 / elapsed.as_secs_f64(),
            generated as f64 / elapsed.as_secs_f64(),
            stats.num_running,
            stats.num_waiting,
            100.0 * stats.kv_cache_usage,
        );
        *self = Self {
            last: Instant::now(),
            prompt_tokens: stats.prompt_tokens,
            generation_tokens: stats.generation_tokens,
            active: false,
        };
    }
}
