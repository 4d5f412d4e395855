//! Requests become steps, without a device.
//!
//! [`EngineHandle`] is the only door: a request goes in, a stream of its tokens comes out, dropping the stream is the
//! abort. Behind it one thread owns the scheduler, the block accounting and the [`Executor`](crate::step::Executor).

pub mod cache;
mod constrained;
mod core;
mod handle;
mod repetition;
pub mod scheduler;
pub mod scripted;
mod sequence;
mod stream;
mod thinking;
mod trace;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

pub use handle::{EngineHandle, Exit, Health};
pub use repetition::RepetitionDetection;
pub use stream::SequenceStream;
pub use thinking::ThinkingBudget;

use crate::config::{Pooling, SchedulerConfig};
use crate::grammar::Constraint;
use crate::otlp::Tracer;
use crate::step::{SampledToken, SamplingParams, TokenId, TokenLogprobs};

/// What the engine needs besides the executor's [`Capacity`](crate::step::Capacity).
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Policy and queue limits. The step's size is the executor's to say.
    pub scheduler: SchedulerConfig,
    pub prefix_caching: bool,
    /// Context length in tokens, prompt and output together.
    pub max_model_len: usize,
    /// How often the statistics are logged while there is activity; none = never.
    pub log_stats_interval: Option<Duration>,
    /// Work without progress for longer makes [`Health::Stalled`].
    pub stall_timeout: Duration,
    /// Gets a span per sequence; none = no traces.
    pub tracer: Option<Tracer>,
}

impl EngineConfig {
    /// vLLM's ten seconds between statistics, five minutes for a step.
    pub fn new(scheduler: SchedulerConfig, prefix_caching: bool, max_model_len: usize) -> Self {
        Self {
            scheduler,
            prefix_caching,
            max_model_len,
            log_stats_interval: Some(Duration::from_secs(10)),
            stall_timeout: Duration::from_secs(300),
            tracer: None,
        }
    }
}

/// What the engine is doing, as of its last step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStats {
    pub num_running: usize,
    pub num_waiting: usize,
    /// 0..=1.
    pub kv_cache_usage: f64,
    pub num_steps: u64,
    pub num_preemptions: u64,
    /// Tokens looked up in the prefix cache, and found.
    pub prefix_cache_queries: u64,
    pub prefix_cache_hits: u64,
    /// Prompt tokens of finished prefills.
    pub prompt_tokens: u64,
    pub generation_tokens: u64,
}

/// How [`EngineHandle::pause`] treats what is there; vLLM's `/pause` modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseMode {
    /// Sequences freeze and go on after [`EngineHandle::resume`]; new ones queue.
    Keep,
    /// Running sequences finish, queued ones stay queued, new ones are refused.
    Wait,
    /// All sequences end with [`FinishReason::Abort`], new ones are refused.
    Abort,
}

/// One sequence to generate. `n` choices of one prompt are n requests; prefix caching shares their prompt.
#[derive(Clone, Debug)]
pub struct EngineRequest {
    /// For logs; need not be unique.
    pub id: String,
    /// Not empty, shorter than the model's context, every id inside the vocabulary.
    pub prompt: Arc<[TokenId]>,
    pub sampling: Arc<SamplingParams>,
    pub stop: StopConditions,
    /// Lower runs first under `--scheduling-policy priority`.
    pub priority: i64,
    /// Separates this request's prefix-cache entries from those with another salt.
    pub cache_salt: Option<String>,
    /// False: the request computes its whole prompt (prompt logprobs need it). Its blocks are still cached.
    pub read_prefix_cache: bool,
    /// What the output must look like.
    pub constraint: Option<Constraint>,
    /// The prompt's hidden states are the answer: the sequence ends with its prompt, `sampling` and `stop` play no part.
    pub pooling: Option<Pooling>,
    pub thinking_budget: Option<ThinkingBudget>,
    pub arrival: Instant,
    /// The choices it belongs to.
    pub group: Arc<ChoiceGroup>,
}

/// The sequences of one request's choices, which some metrics count as one.
#[derive(Debug)]
pub struct ChoiceGroup {
    size: u32,
    num_finished: AtomicU32,
    /// Tokens of the longest choice.
    longest: AtomicUsize,
}

impl ChoiceGroup {
    pub fn new(size: u32) -> Arc<Self> {
        Arc::new(Self {
            size,
            num_finished: AtomicU32::new(0),
            longest: AtomicUsize::new(0),
        })
    }

    fn size(&self) -> u32 {
        self.size
    }

    /// A choice is over; the longest one's tokens when it was the last.
    fn finish(&self, num_tokens: usize) -> Option<usize> {
        let longest = self.longest.fetch_max(num_tokens, Ordering::AcqRel).max(num_tokens);
        (self.num_finished.fetch_add(1, Ordering::AcqRel) + 1 == self.size).then_some(longest)
    }
}

/// When the engine itself ends a sequence. Stop strings are the text layer's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopConditions {
    /// Output tokens at which the sequence ends with [`FinishReason::Length`]; > 0, already clamped to the context.
    pub max_tokens: u32,
    /// Output tokens before which neither `eos` nor `stop_token_ids` end the sequence.
    pub min_tokens: u32,
    /// The model's primary EOS, none with `ignore_eos`. Its finish has no stop reason.
    pub eos: Option<TokenId>,
    /// Further ids that stop (the generation config's other EOS ids, the request's `stop_token_ids`).
    pub stop_token_ids: Vec<TokenId>,
    /// Ends an output that repeats itself; looked at last, as in vLLM.
    pub repetition: Option<RepetitionDetection>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// EOS (`None`) or one of `stop_token_ids`.
    Stop(Option<TokenId>),
    Length,
    /// [`StopConditions::repetition`] fired.
    Repetition,
    /// Ended by the server (drain), not by the client.
    Abort,
}

/// Tokens of one sequence since the last event, in order. The stopping token is included.
#[derive(Clone, Debug, Default)]
pub struct SequenceEvent {
    pub tokens: Vec<SampledToken>,
    /// Only in the first event: one entry per prompt token after the first.
    pub prompt_logprobs: Option<Vec<TokenLogprobs>>,
    /// Prompt tokens served from the prefix cache; valid from the first event on.
    pub num_cached_tokens: usize,
    /// With the finish of a request that pools: `[H]`.
    pub hidden: Vec<f32>,
    pub finish: Option<FinishReason>,
    /// With the finish of a sequence that got a token.
    pub timing: Option<SequenceTiming>,
}

/// Where a sequence's time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceTiming {
    /// From its arrival to its first step.
    pub queue: Duration,
    /// From its first step to its first token.
    pub prefill: Duration,
    /// From its first token to its last.
    pub decode: Duration,
}

/// Whose fault it is decides the HTTP status; the server alone knows which.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// The queue is full (`--max-num-queued-reqs`, `--max-num-queued-tokens`).
    #[error("the server is overloaded: {0}")]
    Overloaded(String),
    /// [`EngineHandle::pause`] refuses new requests.
    #[error("generation is paused")]
    Paused,
    /// The request can never run (needs more KV blocks than there are).
    #[error("{message}")]
    Invalid { param: &'static str, message: String },
    /// The output cannot go on under its grammar: a limit was reached, or the other sampling parameters forbid all that the
    /// grammar allows.
    #[error("{0}")]
    Constraint(String),
    /// The device failed under this request.
    #[error("the engine failed: {0}")]
    Device(String),
    /// The server's time is over and the request was not done.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The engine is shutting down or dead.
    #[error("the engine is not running")]
    Stopped,
}
