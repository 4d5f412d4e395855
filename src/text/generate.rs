//! Prompts in, text out.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::stream::{BoxStream, SelectAll, Stream, StreamExt};
use tokio::sync::Semaphore;

use super::detokenizer::Detokenizer;
use super::logprobs::text_logprobs;
use super::request_log::{self, OutputLog};
use super::sampling::check_edited_tokens;
use super::stop::StopBuffer;
use super::tokenizer::TokenizerError;
use super::{GenerateRequest, TextDelta, TextError, TextFinish, Tokenizer};
use crate::config::ModelConfig;
use crate::config::observability::RequestLogConfig;
use crate::engine::{
    ChoiceGroup, EngineHandle, EngineRequest, FinishReason, SequenceEvent, SequenceStream, StopConditions,
};
use crate::grammar::{Grammar, GrammarCompiler, GrammarError, GrammarSpec, Start, Vocabulary};
use crate::step::TokenId;

/// Grammars compiled at a time; more wait, this long.
const CONCURRENT_COMPILATIONS: usize = 2;
const COMPILATION_WAIT: Duration = Duration::from_secs(10);

/// What the model allows a prompt and its continuation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextLimits {
    /// Prompt and output tokens.
    pub max_model_len: usize,
    pub vocab_size: usize,
    /// Its finish has no stop reason.
    pub eos: Option<TokenId>,
    /// Further EOS ids; they stop too, with their id as the reason.
    pub extra_eos: Vec<TokenId>,
}

impl From<&ModelConfig> for TextLimits {
    fn from(model: &ModelConfig) -> Self {
        Self {
            max_model_len: model.max_model_len,
            vocab_size: model.vocab_size,
            eos: model.eos_token_id,
            extra_eos: model.extra_eos_token_ids.clone(),
        }
    }
}

/// Turns prompts into text. Clones share everything.
#[derive(Clone, Debug)]
pub struct TextEngine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    engine: EngineHandle,
    tokenizer: Arc<Tokenizer>,
    limits: TextLimits,
    log: RequestLogConfig,
    /// Made when the first grammar is asked for.
    grammars: OnceLock<Result<GrammarCompiler, GrammarError>>,
    compilations: Arc<Semaphore>,
}

impl TextEngine {
    pub fn new(engine: EngineHandle, tokenizer: Arc<Tokenizer>, limits: TextLimits) -> Self {
        Self::with_log(engine, tokenizer, limits, RequestLogConfig::default())
    }

    /// As [`new`](Self::new), with requests and outputs logged.
    pub fn with_log(
        engine: EngineHandle,
        tokenizer: Arc<Tokenizer>,
        limits: TextLimits,
        log: RequestLogConfig,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                engine,
                tokenizer,
                limits,
                log,
                grammars: OnceLock::new(),
                compilations: Arc::new(Semaphore::new(CONCURRENT_COMPILATIONS)),
            }),
        }
    }

    pub fn engine(&self) -> &EngineHandle {
        &self.shared.engine
    }

    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.shared.tokenizer
    }

    pub fn limits(&self) -> &TextLimits {
        &self.shared.limits
    }

    /// A prompt's ids. Takes milliseconds on long texts: call it where blocking is allowed.
    ///
    /// # Errors
    /// `input_text`: more characters than could ever fit the context.
    pub fn encode_prompt(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, TextError> {
        self.check_chars(text)?;
        self.encode(text, add_special_tokens)
    }

    /// The ids of a text that may be longer than the context: a prompt that will be cut.
    ///
    /// # Errors
    /// `input_text`: more than the tokenizer takes.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, TextError> {
        self.shared
            .tokenizer
            .encode(text, add_special_tokens)
            .map_err(|error| match error {
                TokenizerError::TooLong { bytes } => TextError::parameter("input_text", bytes, error),
                error => TextError::invalid(error.to_string()),
            })
    }

    fn check_chars(&self, text: &str) -> Result<(), TextError> {
        let max_len = self.shared.limits.max_model_len;
        let max_chars = max_len.saturating_mul(self.shared.tokenizer.max_chars_per_token());
        // Bytes bound characters, so the count is only made for texts that may be too long.
        if text.len() > max_chars {
            let chars = text.chars().count();
            if chars > max_chars {
                return Err(TextError::parameter(
                    "input_text",
                    chars,
                    format!(
                        "This model's maximum context length is {max_len} tokens, at most {max_chars} characters; the \
                         prompt has {chars} characters. Please reduce its length."
                    ),
                ));
            }
        }
        Ok(())
    }

    /// The grammar of a specification, remembered or compiled on the blocking pool. Few compile at a time, so that whoever
    /// sends many keeps no others from rendering and tokenizing.
    ///
    /// # Errors
    /// The specification is invalid, unsupported or beyond the limits, or too many compile.
    pub async fn compile_grammar(&self, spec: GrammarSpec) -> Result<Arc<Grammar>, TextError> {
        let known = self.shared.grammars.get().and_then(|compiler| compiler.as_ref().ok());
        if let Some(grammar) = known.and_then(|compiler| compiler.cached(&spec)) {
            return Ok(grammar);
        }
        let turn = self.shared.compilations.clone().acquire_owned();
        let permit = tokio::time::timeout(COMPILATION_WAIT, turn)
            .await
            .map_err(|_| GrammarError::Busy)?;
        let engine = self.clone();
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            engine.grammars()?.compile(&spec)
        });
        Ok(work.await.unwrap_or(Err(GrammarError::Busy))?)
    }

    /// The tokens that end a turn, the primary one first.
    pub fn eos_token_ids(&self) -> impl Iterator<Item = TokenId> + '_ {
        let limits = &self.shared.limits;
        limits.eos.iter().chain(&limits.extra_eos).copied()
    }

    fn grammars(&self) -> Result<&GrammarCompiler, GrammarError> {
        let Shared { tokenizer, limits, .. } = &*self.shared;
        let compiler = self.shared.grammars.get_or_init(|| {
            let eos: Vec<TokenId> = self.eos_token_ids().collect();
            GrammarCompiler::new(&Vocabulary::new(limits.vocab_size, &eos, |id| {
                (tokenizer.token_bytes(id), tokenizer.is_added(id))
            }))
        });
        compiler.as_ref().map_err(GrammarError::clone)
    }

    /// Output tokens that a prompt of this length leaves room for.
    ///
    /// # Errors
    /// Empty, too long, or an id outside the model's vocabulary.
    pub fn check_prompt(&self, prompt: &[TokenId]) -> Result<u32, TextError> {
        let TextLimits {
            max_model_len,
            vocab_size,
            ..
        } = self.shared.limits;
        let len = prompt.len();
        if len == 0 {
            return Err(TextError::invalid("The prompt cannot be empty."));
        }
        if len > max_model_len {
            return Err(TextError::parameter(
                "input_tokens",
                len,
                format!(
                    "This model's maximum context length is {max_model_len} tokens. However, the prompt has {len} \
                     input tokens. Please reduce its length."
                ),
            ));
        }
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(TextError::invalid(format!(
                "Token id {id} is out of vocabulary (size {vocab_size})."
            )));
        }
        if len == max_model_len {
            return Err(TextError::parameter(
                "max_tokens",
                0,
                format!("max_tokens must be at least 1, but the prompt fills the context of {max_model_len} tokens."),
            ));
        }
        Ok(u32::try_from(max_model_len - len).unwrap_or(u32::MAX))
    }

    /// Starts all choices. Dropping the stream aborts what still runs.
    ///
    /// # Errors
    /// The prompt does not fit the model, or the engine refuses; nothing runs then.
    pub fn generate(&self, request: GenerateRequest) -> Result<TextStream, TextError> {
        let room = self.check_prompt(&request.prompt)?;
        let max_tokens = request.max_tokens.map_or(room, |asked| asked.min(room));
        if max_tokens == 0 {
            return Err(TextError::parameter(
                "max_tokens",
                0,
                "max_tokens must be at least 1, got 0.",
            ));
        }
        if request.n == 0 {
            return Err(TextError::invalid("n must be at least 1, got 0."));
        }
        request_log::received(self.shared.log, &request, max_tokens, &self.shared.tokenizer);
        if let Some(search) = request.extensions.beam_search {
            return Ok(TextStream(Source::Beams(super::beam::search(
                self, request, search, max_tokens,
            )?)));
        }
        let limits = &self.shared.limits;
        // Where EOS is the end of reasoning and not of the turn, the constraint knows.
        let constraint = &request.extensions.constraint;
        let ignore_eos = request.ignore_eos || constraint.as_ref().is_some_and(|c| c.start != Start::Now);
        let eos = limits.eos.filter(|_| !ignore_eos);
        let mut stop_token_ids = request.stop_token_ids.clone();
        if !ignore_eos {
            stop_token_ids.extend(limits.extra_eos.iter().filter(|&&id| Some(id) != eos));
        }
        let mut sampling = request.sampling.clone();
        sampling.min_tokens = request.min_tokens;
        if request.min_tokens > 0 {
            // As vLLM: EOS is held back even where ignore_eos keeps it from stopping.
            let mut suppressed: Vec<TokenId> = request.stop_token_ids.clone();
            suppressed.extend(limits.eos.iter().chain(&limits.extra_eos));
            suppressed.retain(|&id| (id as usize) < limits.vocab_size);
            suppressed.sort_unstable();
            suppressed.dedup();
            sampling.min_tokens_suppressed = suppressed;
        }
        check_edited_tokens(&sampling)?;
        let read_prefix_cache = sampling.prompt_logprobs.is_none();
        let arrival = Instant::now();
        let group = ChoiceGroup::new(request.n);
        let mut choices = SelectAll::new();
        for index in 0..request.n {
            let mut sampling = sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(u64::from(index));
            let events = self.shared.engine.submit(EngineRequest {
                id: if request.n == 1 {
                    request.id.clone()
                } else {
                    format!("{}-{index}", request.id)
                },
                prompt: request.prompt.clone(),
                sampling: Arc::new(sampling),
                stop: StopConditions {
                    max_tokens,
                    min_tokens: request.min_tokens,
                    eos,
                    stop_token_ids: stop_token_ids.clone(),
                    repetition: request.extensions.repetition_detection,
                },
                priority: request.priority,
                cache_salt: request.cache_salt.clone(),
                read_prefix_cache,
                constraint: request.extensions.constraint.clone(),
                pooling: None,
                thinking_budget: request.extensions.thinking_budget,
                arrival,
                group: group.clone(),
            })?;
            choices.push(Choice {
                events: Some(events),
                interval: request.extensions.stream_interval,
                begun: false,
                gathered: None,
                log: OutputLog::new(self.shared.log, &request),
                writer: ChoiceWriter {
                    index,
                    tokenizer: self.shared.tokenizer.clone(),
                    detokenizer: Detokenizer::new(request.skip_special_tokens),
                    buffer: StopBuffer::new(request.stop.clone(), request.include_stop_str_in_output),
                    include_stop: request.include_stop_str_in_output,
                    min_tokens: request.min_tokens,
                    num_tokens: 0,
                },
            });
        }
        Ok(TextStream(Source::Choices(choices)))
    }
}

/// Deltas of all choices, interleaved. A choice's last delta has a `finish`; an error ends the stream.
pub struct TextStream(Source);

enum Source {
    Choices(SelectAll<Choice>),
    Beams(BoxStream<'static, Result<TextDelta, TextError>>),
}

impl Stream for TextStream {
    type Item = Result<TextDelta, TextError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match &mut self.0 {
            Source::Choices(choices) => {
                let item = choices.poll_next_unpin(context);
                if let Poll::Ready(Some(Err(_))) = item {
                    // One failed choice fails the request; the others are aborted.
                    choices.clear();
                }
                item
            }
            Source::Beams(beams) => beams.poll_next_unpin(context),
        }
    }
}

/// Reads a stream to its end: one delta per choice, by index.
///
/// # Errors
/// The stream's first.
pub async fn collect<S>(mut stream: S) -> Result<Vec<TextDelta>, TextError>
where
    S: Stream<Item = Result<TextDelta, TextError>> + Unpin,
{
    let mut choices: Vec<TextDelta> = Vec::new();
    while let Some(delta) = stream.next().await {
        let delta = delta?;
        let index = delta.index as usize;
        while choices.len() <= index {
            choices.push(TextDelta {
                index: choices.len() as u32,
                ..TextDelta::default()
            });
        }
        choices[index].extend(delta);
    }
    Ok(choices)
}

/// One sequence of the engine and its text.
#[derive(Debug)]
struct Choice {
    /// None after the end; dropping it stops the engine's sequence.
    events: Option<SequenceStream>,
    log: Option<OutputLog>,
    writer: ChoiceWriter,
    /// Tokens that a delta gathers.
    interval: usize,
    /// The first delta is out.
    begun: bool,
    gathered: Option<TextDelta>,
}

impl Stream for Choice {
    type Item = Result<TextDelta, TextError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let Some(events) = &mut self.events else {
                return Poll::Ready(None);
            };
            let new = match std::task::ready!(events.poll_next_unpin(context)) {
                Some(Ok(event)) => self.writer.write(event),
                Some(Err(error)) => {
                    self.events = None;
                    return Poll::Ready(Some(Err(error.into())));
                }
                None => {
                    self.events = None;
                    return Poll::Ready(None);
                }
            };
            let delta = match self.gathered.take() {
                Some(mut delta) => {
                    delta.extend(new);
                    delta
                }
                None => new,
            };
            if let Some(finish) = &delta.finish {
                // The engine does not know that a stop string has ended it.
                if let (TextFinish::StopString(_), Some(events)) = (finish, self.events.take()) {
                    events.stop(self.writer.num_tokens as usize);
                }
            } else if self.begun && delta.token_ids.len() < self.interval {
                self.gathered = Some(delta);
                continue;
            }
            self.begun = true;
            if let Some(log) = &mut self.log {
                log.delta(&delta);
            }
            return Poll::Ready(Some(Ok(delta)));
        }
    }
}

/// Turns a sequence's events into deltas.
#[derive(Debug)]
struct ChoiceWriter {
    index: u32,
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    buffer: StopBuffer,
    include_stop: bool,
    min_tokens: u32,
    num_tokens: u32,
}

impl ChoiceWriter {
    /// Stop strings are looked for after every token, however many an event brings, so the text does not depend on
    /// timing; what the engine generated beyond a stop string is dropped.
    fn write(&mut self, event: SequenceEvent) -> TextDelta {
        let mut delta = TextDelta {
            index: self.index,
            num_cached_tokens: event.num_cached_tokens,
            timing: event.timing,
            prompt_logprobs: event.prompt_logprobs.map(|logprobs| {
                logprobs
                    .iter()
                    .map(|logprobs| text_logprobs(&self.tokenizer, logprobs))
                    .collect()
            }),
            ..TextDelta::default()
        };
        let num_new = event.tokens.len();
        let ends_at_stop_token = matches!(event.finish, Some(FinishReason::Stop(_)));
        let mut stop_string = None;
        for (i, token) in event.tokens.into_iter().enumerate() {
            delta.token_ids.push(token.id);
            if let Some(logprobs) = &token.logprobs {
                delta.logprobs.push(text_logprobs(&self.tokenizer, logprobs));
            }
            self.num_tokens += 1;
            // The stopping token's own text is no output.
            if !(ends_at_stop_token && i + 1 == num_new && !self.include_stop) {
                self.detokenizer.push(&self.tokenizer, token.id, self.buffer.text());
            }
            if self.num_tokens <= self.min_tokens {
                self.buffer.exempt();
            } else {
                stop_string = self.buffer.find_stop();
                if stop_string.is_some() {
                    break;
                }
            }
        }
        delta.finish = match (stop_string, event.finish) {
            (Some(stop), _) => Some(TextFinish::StopString(stop)),
            (None, finish) => finish.map(|finish| {
                self.detokenizer.finish(self.buffer.text());
                match finish {
                    FinishReason::Stop(None) => TextFinish::Eos,
                    FinishReason::Stop(Some(id)) => TextFinish::StopToken(id),
                    FinishReason::Length => TextFinish::Length,
                    FinishReason::Repetition => TextFinish::Repetition,
                    FinishReason::Abort => TextFinish::Abort,
                }
            }),
        };
        match delta.finish {
            Some(_) => self.buffer.finish(&mut delta.text),
            None => self.buffer.release(&mut delta.text),
        }
        delta
    }
}

#[cfg(test)]
mod tests;
