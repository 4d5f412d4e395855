//! The engine's door: a clonable handle that may be used from any thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use tokio::sync::{oneshot, watch};

use super::cache::BlockHasher;
use super::constrained::Constrained;
use super::core::{Command, Core, Submission};
use super::scheduler::{NewSequence, Scheduler, SchedulerOptions, SequenceId};
use super::{EngineConfig, EngineError, EngineRequest, EngineStats, PauseMode, SequenceStream};
use crate::config::{Pooling, SchedulingPolicy};
use crate::metrics::Metrics;
use crate::otlp::Tracer;
use crate::step::{Capacity, Executor};

/// Whether the engine can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    Healthy,
    /// Alive, but there has been work and no progress for this long.
    Stalled(Duration),
    /// It serves nothing any more.
    Stopped(Exit),
}

/// Why the engine's thread ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Drained, or every handle is gone.
    Finished,
    /// The device or the engine itself failed: the process should end with a non-zero code.
    Failed(String),
}

/// The only way to the engine. Clones share it; when the last handle and the last stream are dropped, it stops.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    exit: watch::Receiver<Option<Exit>>,
}

/// What the handles and the engine's thread both see.
#[derive(Debug)]
pub(super) struct Shared {
    pub config: EngineConfig,
    pub capacity: Capacity,
    pub metrics: Arc<Metrics>,
    hasher: BlockHasher,
    next_id: AtomicU64,
    draining: AtomicBool,
    /// Paused in a mode that refuses new requests.
    refusing: AtomicBool,
    paused: AtomicBool,
    queue: Mutex<Queue>,
    stats: Mutex<EngineStats>,
    started: Instant,
    /// Milliseconds after `started` at which the engine last made progress on the work it has; 0 = it has none.
    busy_since_ms: AtomicU64,
}

/// Requests that have not been admitted yet.
#[derive(Debug, Default)]
struct Queue {
    num_requests: usize,
    num_tokens: usize,
}

impl EngineHandle {
    /// Starts the engine's thread, which owns the executor until the engine stops.
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub fn start(
        executor: Box<dyn Executor>,
        config: EngineConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Self, std::io::Error> {
        let capacity = executor.capacity().clone();
        metrics.engine.set_cache_config(&[
            ("block_size", capacity.block_size.to_string()),
            ("num_gpu_blocks", capacity.num_blocks.to_string()),
            (
                "kv_cache_size_tokens",
                (capacity.num_blocks * capacity.block_size).to_string(),
            ),
            (
                "enable_prefix_caching",
                if config.prefix_caching { "True" } else { "False" }.to_owned(),
            ),
            ("prefix_caching_hash_algo", "sha256".to_owned()),
        ]);
        let hasher = BlockHasher::new(capacity.block_size);
        let options = SchedulerOptions {
            long_prefill_token_threshold: config.scheduler.long_prefill_token_threshold,
            chunked_prefill: config.scheduler.chunked_prefill,
            prefix_caching: config.prefix_caching,
        };
        let scheduler = Scheduler::new(options, &capacity, hasher.clone());
        let shared = Arc::new(Shared {
            config,
            capacity,
            metrics,
            hasher,
            next_id: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            queue: Mutex::default(),
            stats: Mutex::default(),
            started: Instant::now(),
            busy_since_ms: AtomicU64::new(0),
        });
        // Not bounded: `submit` must not block, aborts must always arrive, and what a request holds is bounded by the
        // queue limits, not by this channel.
        let (commands, inbox) = crossbeam_channel::unbounded();
        let (exit_sender, exit) = watch::channel(None);
        let core = Core::new(executor, scheduler, inbox, shared.clone());
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || core.run_to_exit(&exit_sender))?;
        Ok(Self { shared, commands, exit })
    }

    /// Queues a request.
    ///
    /// # Errors
    /// [`Invalid`](EngineError::Invalid): it can never run. [`Overloaded`](EngineError::Overloaded): the queue is full.
    /// [`Paused`](EngineError::Paused). [`Stopped`](EngineError::Stopped): the engine is over. While the engine drains, the
    /// stream ends at once with [`FinishReason::Abort`](super::FinishReason::Abort), as vLLM's requests do.
    pub fn submit(&self, request: EngineRequest) -> Result<SequenceStream, EngineError> {
        if self.exit.borrow().is_some() {
            return Err(EngineError::Stopped);
        }
        let constraint = Constrained::new(&request, self.shared.capacity.vocab_size);
        let mask_from = constraint.as_ref().and_then(|constraint| constraint.mask_from());
        let sequence = self.shared.prepare(&request, mask_from)?;
        if self.shared.draining.load(Ordering::Acquire) {
            return Ok(SequenceStream::aborted());
        }
        if self.shared.refusing.load(Ordering::Acquire) {
            return Err(EngineError::Paused);
        }
        self.shared.enqueue(request.prompt.len())?;
        let (stream, sink) = SequenceStream::new(sequence.id, self.commands.clone());
        let submission = Submission {
            sequence,
            constraint,
            sink,
            arrival: request.arrival,
            request_id: request.id,
            group: request.group,
            // Here, in the task that serves the request, because the caller's trace context is a property of that task.
            span: self.shared.config.tracer.as_ref().and_then(Tracer::begin),
        };
        match self.commands.send(Command::Submit(Box::new(submission))) {
            Ok(()) => Ok(stream),
            Err(_) => Err(EngineError::Stopped),
        }
    }

    /// Where the spans of its sequences go.
    pub fn tracer(&self) -> Option<&Tracer> {
        self.shared.config.tracer.as_ref()
    }

    /// What the executor can hold.
    pub fn capacity(&self) -> &Capacity {
        &self.shared.capacity
    }

    /// How many tokens of a prompt of this length the prefix cache can hold: whole blocks.
    pub fn num_cacheable_tokens(&self, prompt_tokens: usize) -> usize {
        match self.shared.config.prefix_caching {
            true => prompt_tokens - prompt_tokens % self.shared.capacity.block_size.max(1),
            false => 0,
        }
    }

    pub fn health(&self) -> Health {
        if let Some(exit) = self.exit.borrow().clone() {
            return Health::Stopped(exit);
        }
        match self.shared.busy_for() {
            Some(busy) if busy > self.shared.config.stall_timeout => Health::Stalled(busy),
            _ => Health::Healthy,
        }
    }

    pub fn stats(&self) -> EngineStats {
        lock(&self.shared.stats).clone()
    }

    /// Lets accepted requests finish, aborts what is left at the deadline, and stops the engine. A second call may bring
    /// the deadline forward.
    pub async fn drain(&self, deadline: Instant) -> Exit {
        self.shared.draining.store(true, Ordering::Release);
        // Fails only when the engine has stopped already.
        let _ = self.commands.send(Command::Drain { deadline });
        self.stopped().await
    }

    /// Waits until the engine's thread is over.
    pub async fn stopped(&self) -> Exit {
        let gone = || Exit::Failed("the engine's thread vanished".into());
        self.exit
            .clone()
            .wait_for(Option::is_some)
            .await
            .map_or_else(|_| gone(), |exit| exit.clone().unwrap_or_else(gone))
    }

    /// Stops generation; returns when no step is running (in mode [`Wait`](PauseMode::Wait): no sequence either).
    ///
    /// # Errors
    /// [`EngineError::Stopped`].
    pub async fn pause(&self, mode: PauseMode) -> Result<(), EngineError> {
        self.shared.refusing.store(mode != PauseMode::Keep, Ordering::Release);
        self.hold(mode).await
    }

    /// As [`pause`](Self::pause), but new requests wait in every mode.
    ///
    /// # Errors
    /// [`EngineError::Stopped`].
    pub async fn sleep(&self, mode: PauseMode) -> Result<(), EngineError> {
        self.shared.refusing.store(false, Ordering::Release);
        self.hold(mode).await
    }

    async fn hold(&self, mode: PauseMode) -> Result<(), EngineError> {
        self.shared.paused.store(true, Ordering::Release);
        self.ask(|reply| Command::Pause { mode, reply }).await
    }

    /// Undoes [`pause`](Self::pause) and [`sleep`](Self::sleep).
    ///
    /// # Errors
    /// [`EngineError::Stopped`].
    pub async fn resume(&self) -> Result<(), EngineError> {
        self.ask(|reply| Command::Resume { reply }).await?;
        self.shared.refusing.store(false, Ordering::Release);
        self.shared.paused.store(false, Ordering::Release);
        Ok(())
    }

    pub fn is_paused(&self) -> bool {
        self.shared.paused.load(Ordering::Acquire)
    }

    /// Forgets all cached prefixes. False, and nothing happens, while sequences hold blocks; with `preempt_running` they
    /// give theirs back first and compute them again.
    ///
    /// # Errors
    /// [`EngineError::Stopped`].
    pub async fn reset_prefix_cache(&self, preempt_running: bool) -> Result<bool, EngineError> {
        self.ask(|reply| Command::ResetPrefixCache { preempt_running, reply })
            .await
    }

    /// Ends the sequences of these requests, or of all, with [`FinishReason::Abort`](super::FinishReason::Abort); returns
    /// how many. The sequences of a request with several choices are named `<id>-<index>`.
    ///
    /// # Errors
    /// [`EngineError::Stopped`].
    pub async fn abort_requests(&self, ids: Option<Vec<String>>) -> Result<usize, EngineError> {
        self.ask(|reply| Command::AbortRequests { ids, reply }).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).map_err(|_| EngineError::Stopped)?;
        answer.await.map_err(|_| EngineError::Stopped)
    }
}

impl Shared {
    /// Turns a request into a sequence that is certain to fit.
    fn prepare(&self, request: &EngineRequest, mask_from: Option<usize>) -> Result<NewSequence, EngineError> {
        let invalid = |message: String| {
            Err(EngineError::Invalid {
                param: "prompt",
                message,
            })
        };
        let len = request.prompt.len();
        if len == 0 {
            return invalid("the prompt has no tokens".into());
        }
        let max_len = self.max_len();
        let longest = match request.pooling {
            None => max_len.saturating_sub(1),
            Some(_) => max_len,
        };
        if len > longest {
            return invalid(format!(
                "the prompt has {len} tokens; at most {longest} fit the context, the KV cache and a step"
            ));
        }
        if let Some(id) = request
            .prompt
            .iter()
            .find(|&&id| id as usize >= self.capacity.vocab_size)
        {
            return invalid(format!(
                "token id {id} is outside the vocabulary of {}",
                self.capacity.vocab_size
            ));
        }
        let mut stop = request.stop.clone();
        if stop.max_tokens == 0 && request.pooling.is_none() {
            return Err(EngineError::Invalid {
                param: "max_tokens",
                message: "max_tokens must be at least 1".into(),
            });
        }
        stop.max_tokens = stop.max_tokens.min(u32::try_from(max_len - len).unwrap_or(u32::MAX));
        let root = self.hasher.root(request.cache_salt.as_deref());
        let mut hashes = Vec::new();
        if self.config.prefix_caching {
            // Here and not in the engine's thread: hashing a long prompt takes longer than planning a step.
            self.hasher.extend(&root, &mut hashes, &request.prompt);
        }
        Ok(NewSequence {
            id: SequenceId(self.next_id.fetch_add(1, Ordering::Relaxed)),
            priority: match self.config.scheduler.policy {
                SchedulingPolicy::Fcfs => 0,
                SchedulingPolicy::Priority => request.priority,
            },
            prompt: request.prompt.clone(),
            sampling: Constrained::sampling(request),
            stop,
            // What is found in the cache has no hidden states and no logits.
            read_prefix_cache: request.read_prefix_cache
                && request.sampling.prompt_logprobs.is_none()
                && request.pooling != Some(Pooling::Mean),
            pooling: request.pooling,
            mask_from,
            root,
            hashes,
        })
    }

    /// Tokens of the longest sequence that always fits when it runs alone.
    fn max_len(&self) -> usize {
        let in_cache = self.capacity.num_blocks * self.capacity.block_size;
        let in_step = match self.config.scheduler.chunked_prefill {
            true => usize::MAX,
            false => self.capacity.max_num_batched_tokens,
        };
        self.config.max_model_len.min(in_cache).min(in_step)
    }

    fn enqueue(&self, num_tokens: usize) -> Result<(), EngineError> {
        let limits = &self.config.scheduler;
        let mut queue = lock(&self.queue);
        let full = |limit: Option<usize>, new| limit.is_some_and(|limit| new > limit);
        let reason = if full(limits.max_queued_requests, queue.num_requests + 1) {
            "max_num_queued_reqs"
        } else if full(limits.max_queued_tokens, queue.num_tokens + num_tokens) {
            "max_num_queued_tokens"
        } else {
            queue.num_requests += 1;
            queue.num_tokens += num_tokens;
            return Ok(());
        };
        drop(queue);
        self.metrics
            .engine
            .admission_rejections
            .with_label_values(&[reason])
            .inc();
        Err(EngineError::Overloaded(format!(
            "the waiting queue is full (--{})",
            reason.replace('_', "-")
        )))
    }

    /// A request left the queue: admitted or ended.
    pub fn dequeue(&self, num_tokens: usize) {
        let mut queue = lock(&self.queue);
        queue.num_requests = queue.num_requests.saturating_sub(1);
        queue.num_tokens = queue.num_tokens.saturating_sub(num_tokens);
    }

    pub fn set_stats(&self, stats: &EngineStats) {
        lock(&self.stats).clone_from(stats);
    }

    /// The engine waits for commands and owes nobody anything.
    pub fn set_idle(&self) {
        self.busy_since_ms.store(0, Ordering::Relaxed);
    }

    /// There is work; the clock of a stall starts unless it runs.
    pub fn set_busy(&self) {
        let since_ms = self.now_ms();
        let _ = self
            .busy_since_ms
            .compare_exchange(0, since_ms, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// A step is done: the clock of a stall starts again.
    pub fn note_progress(&self) {
        self.busy_since_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Never 0.
    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64 + 1
    }

    fn busy_for(&self) -> Option<Duration> {
        match self.busy_since_ms.load(Ordering::Relaxed) {
            0 => None,
            since_ms => Some(
                self.started
                    .elapsed()
                    .saturating_sub(Duration::from_millis(since_ms - 1)),
            ),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
