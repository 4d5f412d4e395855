use std::time::Instant;

use super::*;
use crate::engine::scripted::{self, ScriptedExecutor};
use crate::engine::{FinishReason, StopConditions};
use crate::step::{SamplingParams, TokenId};

fn request(prompt: &[TokenId], max_tokens: u32) -> EngineRequest {
    EngineRequest {
        id: "test".into(),
        prompt: prompt.into(),
        sampling: Arc::new(SamplingParams {
            temperature: 0.0,
            ..SamplingParams::default()
        }),
        stop: StopConditions {
            max_tokens,
            ..StopConditions::default()
        },
        priority: 0,
        cache_salt: None,
        read_prefix_cache: true,
        arrival: Instant::now(),
    }
}

async fn collect(mut stream: SequenceStream) -> Result<(Vec<TokenId>, FinishReason), EngineError> {
    let mut tokens = Vec::new();
    while let Some(event) = stream.next_event().await {
        let event = event?;
        tokens.extend(event.tokens.iter().map(|token| token.id));
        if let Some(finish) = event.finish {
            assert!(stream.next_event().await.is_none());
            return Ok((tokens, finish));
        }
    }
    panic!("the stream ended without a finish");
}

#[tokio::test]
async fn a_request_gets_its_script() {
    let engine = scripted::engine(ScriptedExecutor::replying(scripted::capacity(100), |prompt| {
        prompt.iter().map(|id| id + 1).collect()
    }));
    let answer = collect(engine.submit(request(&[1, 2, 3], 3)).unwrap()).await.unwrap();
    assert_eq!(answer, (vec![2, 3, 4], FinishReason::Length));
}
