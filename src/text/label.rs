//! How likely one of a few tokens comes next.

use std::sync::Arc;
use std::time::Instant;

use super::{TextEngine, TextError};
use crate::engine::{ChoiceGroup, EngineError, EngineRequest, SequenceStream, StopConditions};
use crate::step::{LogprobsMode, SamplingParams, TokenId};

/// A prompt, and the tokens that may follow it.
#[derive(Clone, Debug)]
pub struct LabelRequest {
    /// For logs.
    pub id: String,
    pub prompt: Arc<[TokenId]>,
    /// Not empty, inside the vocabulary; the first is the one that is asked about.
    pub labels: Vec<TokenId>,
    /// Probabilities among the labels alone, not in the whole vocabulary.
    pub among_labels: bool,
    pub priority: i64,
    pub cache_salt: Option<String>,
}

/// A prompt on its way through the model. Dropping it aborts the sequence.
#[derive(Debug)]
pub struct LabelledPrompt {
    events: SequenceStream,
    label: TokenId,
}

impl TextEngine {
    /// Starts a prompt.
    ///
    /// # Errors
    /// The prompt does not fit the model, or the engine refuses.
    pub fn label(&self, request: LabelRequest) -> Result<LabelledPrompt, TextError> {
        self.check_prompt(&request.prompt)?;
        let mut labels = request.labels;
        let label = labels.first().copied().unwrap_or_default();
        // Only allowed tokens are sampled. Among the labels, the processed logprobs are theirs alone; in the whole
        // vocabulary, the one that is asked about is sampled for certain and brings its raw logprob.
        let logprobs_mode = if request.among_labels {
            LogprobsMode::ProcessedLogprobs
        } else {
            labels.truncate(1);
            LogprobsMode::RawLogprobs
        };
        labels.sort_unstable();
        labels.dedup();
        let sampling = SamplingParams {
            logprobs: Some(labels.len() as u32),
            allowed_token_ids: Some(labels),
            logprobs_mode,
            ..SamplingParams::default()
        };
        let events = self.engine().submit(EngineRequest {
            id: request.id,
            prompt: request.prompt,
            sampling: Arc::new(sampling),
            stop: StopConditions {
                max_tokens: 1,
                ..StopConditions::default()
            },
            priority: request.priority,
            cache_salt: request.cache_salt,
            read_prefix_cache: true,
            constraint: None,
            thinking_budget: None,
            pooling: None,
            arrival: Instant::now(),
            group: ChoiceGroup::new(1),
        })?;
        Ok(LabelledPrompt { events, label })
    }
}

impl LabelledPrompt {
    /// 0..=1.
    ///
    /// # Errors
    /// The engine failed, or was told to abort what runs.
    pub async fn probability(mut self) -> Result<f32, TextError> {
        while let Some(event) = self.events.next_event().await {
            let event = event?;
            if let Some(logprobs) = event.tokens.first().and_then(|token| token.logprobs.as_ref()) {
                let listed = logprobs.top.iter().find(|(id, _)| *id == self.label);
                let logprob = match listed {
                    Some((_, logprob)) => *logprob,
                    None if logprobs.id == self.label => logprobs.logprob,
                    None => f32::NEG_INFINITY,
                };
                return Ok(logprob.exp());
            }
            if event.finish.is_some() {
                return Err(EngineError::Paused.into());
            }
        }
        Err(EngineError::Stopped.into())
    }
}
