//! The contract between the engine, which plans steps without knowing a device, and an [`Executor`], which runs them.
//!
//! A step is one forward pass over rows of several sequences: decode rows of one token beside chunks of prefill.
//! Sequences live in *slots* (`0..max_num_seqs`): a slot owns the conv state and the sampling state (parameters, token
//! counts for penalties, the last sampled token) of one running sequence. KV lives in *blocks* that the engine numbers
//! and the executor stores; the engine never holds a pointer, the executor never decides who owns a block.
//!
//! Planning may run one step ahead of the device: a row may name [`RowTokens::LastSampled`] as its input, the token that
//! the previous step samples in the same slot and that the host has not seen yet.

use std::sync::Arc;

/// An id in the model's vocabulary.
pub type TokenId = u32;
/// Index of a running sequence's fixed state, `0..Capacity::max_num_seqs`.
pub type SlotId = u32;
/// Index of a KV block, `0..Capacity::num_blocks`.
pub type BlockId = u32;

/// What an executor can hold. Fixed after start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// KV blocks.
    pub num_blocks: usize,
    /// Tokens a KV block holds.
    pub block_size: usize,
    /// Slots: sequences that can run at once.
    pub max_num_seqs: usize,
    /// Tokens (replayed ones included) that one step may carry.
    pub max_num_batched_tokens: usize,
    /// Tokens before a cached prefix's end that must be replayed to rebuild the conv states exactly: conv layers × (taps − 1).
    pub conv_replay_tokens: usize,
    pub vocab_size: usize,
    /// Steps that may be submitted before the first is collected: 1 = plain loop, 2 = planning runs one step ahead.
    pub max_in_flight: usize,
}

/// Which logprobs a request sees (vLLM's `--logprobs-mode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogprobsMode {
    /// log-softmax of the model's logits, before penalties, masks and temperature.
    #[default]
    RawLogprobs,
    /// The model's logits.
    RawLogits,
    /// log-softmax after bias, masks, penalties, temperature and top-k/top-p.
    ProcessedLogprobs,
    /// The logits after the same.
    ProcessedLogits,
}

/// Most ids in `logit_bias` and `min_tokens_suppressed` together: what executors keep of a slot has a fixed size.
pub const MAX_EDITED_TOKENS: usize = 1024;
/// Most sequences in `bad_words`.
pub const MAX_BAD_WORDS: usize = 128;
/// Most tokens in `bad_words`.
pub const MAX_BAD_WORD_TOKENS: usize = 1024;

/// How a slot's tokens are chosen. Values are validated above the engine; ids are inside the vocabulary.
///
/// Order of application, as vLLM's: allowed ids, bad words, min_tokens, logit bias, penalties (repetition over prompt and
/// output, frequency and presence over output), grammar mask, temperature, min-p, top-k, top-p, sample.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 = greedy (top_p, top_k and min_p are then ignored).
    pub temperature: f32,
    /// (0, 1]; 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub top_k: u32,
    /// \[0, 1\]; 0 = off.
    pub min_p: f32,
    /// > 0; 1 = off.
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Random stream of the sequence. The draw for output token `i` depends on (seed, i) alone, never on neighbours.
    pub seed: u64,
    /// Added to the logits.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// If present, only these may be sampled.
    pub allowed_token_ids: Option<Vec<TokenId>>,
    /// Token sequences that may not be completed.
    pub bad_words: Vec<Vec<TokenId>>,
    /// Output tokens before which `min_tokens_suppressed` may not be sampled.
    pub min_tokens: u32,
    /// EOS and stop ids that `min_tokens` holds back.
    pub min_tokens_suppressed: Vec<TokenId>,
    /// Best alternatives to report for each sampled token (0 = only the sampled one), none = no logprobs.
    pub logprobs: Option<u32>,
    /// The same for each prompt token after the first.
    pub prompt_logprobs: Option<u32>,
    pub logprobs_mode: LogprobsMode,
}

impl Default for SamplingParams {
    /// vLLM's neutral defaults.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            min_tokens: 0,
            min_tokens_suppressed: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            logprobs_mode: LogprobsMode::RawLogprobs,
        }
    }
}

/// One forward pass, and what must be set up before it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    /// Slots that begin (or begin again, after preemption) with this step.
    pub started: Vec<StartedSlot>,
    /// Decode rows and prefill chunks, in the engine's order; at most one row per slot.
    pub rows: Vec<StepRow>,
}

/// The sampling state of a slot is reset to this.
#[derive(Clone, Debug, PartialEq)]
pub struct StartedSlot {
    pub slot: SlotId,
    pub sampling: Arc<SamplingParams>,
    /// Prompt tokens (penalties count them, bad words look at them).
    pub prompt: Arc<[TokenId]>,
    /// Tokens already generated, when the sequence resumes after preemption.
    pub output: Vec<TokenId>,
}

/// The tokens that a row feeds to the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowTokens {
    /// Known ids; the first stands at `StepRow::start`.
    Known(Vec<TokenId>),
    /// One token: the one sampled last in this slot.
    LastSampled,
}

impl RowTokens {
    pub fn len(&self) -> usize {
        match self {
            RowTokens::Known(ids) => ids.len(),
            RowTokens::LastSampled => 1,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A contiguous piece of one sequence in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepRow {
    pub slot: SlotId,
    /// Position of the first token, counted from the sequence's start.
    pub start: usize,
    pub tokens: RowTokens,
    /// The first `replay` tokens only rebuild the conv states behind a cached prefix: attention reads their cached KV
    /// and writes none.
    pub replay: usize,
    /// The conv states of the slot are zero before this row (a sequence's start, or the start of a replay).
    pub reset_conv: bool,
    /// The sequence's blocks, position p in `block_table[p / block_size]`; covers every position up to the row's end.
    /// May be shared and longer than needed.
    pub block_table: Arc<[BlockId]>,
    /// Sample after the row's last token; none for a chunk that does not end its prompt.
    pub sample: Option<SampleRow>,
    /// Hand back final hidden states; only for sequences that sample nothing.
    pub hidden: Option<HiddenRow>,
}

/// Which of the final hidden states (after the last norm) a row hands back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HiddenRow {
    /// The state of the row's last token.
    Last,
    /// The sum over the tokens that the row computes; it replays none.
    Sum,
}

/// What sampling needs to know about the row beyond the slot's parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleRow {
    /// How many tokens the sequence has generated before this one, those in flight included.
    pub output_index: u32,
    /// Sampling waits for [`Executor::set_mask`] for this row; the forward does not.
    pub needs_mask: bool,
}

/// Most alternatives that the CUDA sampler reports with a token; the CPU's has no bound.
pub const MAX_LOGPROBS: usize = 128;

/// One bit per vocabulary id, bit `id % 32` of word `id / 32`; set = allowed. Missing words = not allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenMask(pub Arc<[u32]>);

/// Names a submitted step.
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket(pub u64);

/// One output per plan row, in the plan's order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    pub rows: Vec<RowOutput>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowOutput {
    /// Present exactly when the row asked for a sample.
    pub sampled: Option<SampledToken>,
    /// With `prompt_logprobs`: one entry for each prompt token that follows one of the row's (not replayed) tokens.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// `[H]` exactly when the row asked for hidden states.
    pub hidden: Vec<f32>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    pub id: TokenId,
    /// Present exactly when the slot asked for logprobs.
    pub logprobs: Option<TokenLogprobs>,
}

/// A token and its best alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    pub id: TokenId,
    pub logprob: f32,
    /// 1 = the most likely.
    pub rank: u32,
    /// The best alternatives, most likely first; equal values by lower id.
    pub top: Vec<(TokenId, f32)>,
}

/// The executor failed: the affected steps are lost. Always the device's or our fault, never the client's.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct ExecutorError {
    /// Names the operation or kernel.
    pub message: String,
    /// The executor can run no further step; the process should end with a non-zero code.
    pub fatal: bool,
}

/// Device time of decode steps, for benchmarks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DeviceTimes {
    pub steps: u64,
    pub forward_s: f64,
    pub sample_s: f64,
    /// Launches of the forwards.
    pub launches: u64,
}

/// Runs steps. Owned by the engine's thread.
pub trait Executor: Send {
    /// What the device did since the last call, without waiting for what it still does; the first call starts the measurement.
    /// None: the executor does not measure.
    fn device_times(&mut self) -> Option<DeviceTimes> {
        None
    }

    fn capacity(&self) -> &Capacity;

    /// Starts a step. Steps run in the order of submission; at most `max_in_flight` may be uncollected.
    ///
    /// The plan's rows fit `max_num_batched_tokens`, its slots and blocks are inside the capacity; a violation is a bug
    /// in the engine and an error, never memory corruption.
    fn submit(&mut self, plan: &StepPlan) -> Result<Ticket, ExecutorError>;

    /// Hands in the mask of a row that was submitted with `needs_mask`.
    fn set_mask(&mut self, ticket: &Ticket, row: usize, mask: TokenMask) -> Result<(), ExecutorError>;

    /// Waits for a step. Tickets are collected in the order of submission.
    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError>;
}
