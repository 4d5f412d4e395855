//! Prompts in, vectors out.

use std::sync::Arc;
use std::time::Instant;

use super::{TextEngine, TextError};
use crate::config::Pooling;
use crate::engine::{ChoiceGroup, EngineError, EngineRequest, SequenceStream, StopConditions};
use crate::step::TokenId;

/// A prompt whose hidden states are the answer.
#[derive(Clone, Debug)]
pub struct PoolRequest {
    /// For logs.
    pub id: String,
    pub prompt: Arc<[TokenId]>,
    pub pooling: Pooling,
    pub priority: i64,
    pub cache_salt: Option<String>,
}

/// A prompt on its way through the model. Dropping it aborts the sequence.
#[derive(Debug)]
pub struct PooledPrompt(SequenceStream);

impl TextEngine {
    /// Starts a prompt.
    ///
    /// # Errors
    /// The prompt does not fit the model, or the engine refuses.
    pub fn pool(&self, request: PoolRequest) -> Result<PooledPrompt, TextError> {
        let limits = self.limits();
        let (len, max_len) = (request.prompt.len(), limits.max_model_len);
        if len == 0 {
            return Err(TextError::invalid("The prompt cannot be empty."));
        }
        if len > max_len {
            return Err(TextError::parameter(
                "input_tokens",
                len,
                format!(
                    "This model's maximum context length is {max_len} tokens. However, the prompt has {len} input \
                     tokens. Please reduce its length."
                ),
            ));
        }
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= limits.vocab_size) {
            return Err(TextError::invalid(format!(
                "Token id {id} is out of vocabulary (size {}).",
                limits.vocab_size
            )));
        }
        let events = self.engine().submit(EngineRequest {
            id: request.id,
            prompt: request.prompt,
            sampling: Arc::default(),
            stop: StopConditions::default(),
            priority: request.priority,
            cache_salt: request.cache_salt,
            read_prefix_cache: true,
            constraint: None,
            thinking_budget: None,
            pooling: Some(request.pooling),
            arrival: Instant::now(),
            group: ChoiceGroup::new(1),
        })?;
        Ok(PooledPrompt(events))
    }
}

impl PooledPrompt {
    /// `[H]`, as the engine pools it.
    ///
    /// # Errors
    /// The engine failed, or was told to abort what runs.
    pub async fn vector(mut self) -> Result<Vec<f32>, TextError> {
        while let Some(event) = self.0.next_event().await {
            let event = event?;
            if !event.hidden.is_empty() {
                return Ok(event.hidden);
            }
            if event.finish.is_some() {
                return Err(EngineError::Paused.into());
            }
        }
        Err(EngineError::Stopped.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::scripted::{HIDDEN, ScriptedExecutor, capacity, engine};
    use crate::text::TextLimits;
    use crate::text::tokenizer::testing::tokenizer;

    fn text() -> TextEngine {
        let limits = TextLimits {
            max_model_len: 700,
            vocab_size: 100,
            eos: None,
            extra_eos: Vec::new(),
        };
        TextEngine::new(
            engine(ScriptedExecutor::new(capacity(100))),
            tokenizer("tiny-moe"),
            limits,
        )
    }

    fn request(prompt: &[TokenId], pooling: Pooling) -> PoolRequest {
        PoolRequest {
            id: "test".into(),
            prompt: prompt.into(),
            pooling,
            priority: 0,
            cache_salt: None,
        }
    }

    #[tokio::test]
    async fn long_prompts_pool_over_several_steps_and_the_cache_changes_nothing() {
        let text = text();
        let prompt: Vec<TokenId> = (0..700).map(|i| i * 7 % 100).collect();
        for pooling in [Pooling::Last, Pooling::Mean] {
            let vector =
                async |prompt: &[TokenId]| text.pool(request(prompt, pooling)).unwrap().vector().await.unwrap();
            let first = vector(&prompt).await;
            assert_eq!(first.len(), HIDDEN);
            assert_eq!(vector(&prompt).await, first, "{pooling:?}");
            assert_ne!(vector(&prompt[1..]).await, first, "{pooling:?}");
            assert_eq!(vector(&[5]).await.len(), HIDDEN, "one token is a prompt");
        }
        let (last, mean) = (
            text.pool(request(&[1, 2], Pooling::Last))
                .unwrap()
                .vector()
                .await
                .unwrap(),
            text.pool(request(&[1, 2], Pooling::Mean))
                .unwrap()
                .vector()
                .await
                .unwrap(),
        );
        let first = text.pool(request(&[1], Pooling::Last)).unwrap().vector().await.unwrap();
        let expected: Vec<f32> = first.iter().zip(&last).map(|(a, b)| (a + b) / 2.0).collect();
        assert_eq!(mean, expected);
        assert!(text.engine().stats().prefix_cache_hits > 0);
    }

    #[tokio::test]
    async fn what_does_not_fit_is_the_clients_fault() {
        let text = text();
        for (prompt, param) in [(vec![], None), (vec![1; 701], Some("input_tokens")), (vec![100], None)] {
            match text.pool(request(&prompt, Pooling::Last)) {
                Err(TextError::Invalid { param: found, .. }) => assert_eq!(found, param),
                other => panic!("{} tokens: {other:?}", prompt.len()),
            }
        }
    }
}
