use std::time::Duration;

use super::*;
use crate::engine::RepetitionDetection;
use crate::engine::scripted::{ScriptControl, ScriptedExecutor, capacity, engine};
use crate::step::SamplingParams;
use crate::text::GenerateExtensions;
use crate::text::tokenizer::testing::tokenizer;

const EOS: TokenId = 7;

/// An engine that answers every prompt with `reply`, then EOS.
fn replying(reply: Vec<TokenId>, extra_eos: Vec<TokenId>) -> (TextEngine, ScriptControl) {
    let executor = ScriptedExecutor::replying(capacity(2048), move |_| [&reply[..], &[EOS]].concat());
    let control = executor.control();
    let limits = TextLimits {
        max_model_len: 200,
        vocab_size: 2048,
        eos: Some(EOS),
        extra_eos,
    };
    (
        TextEngine::new(engine(executor), tokenizer("tiny-dense"), limits),
        control,
    )
}

fn saying(text: &str) -> (TextEngine, Vec<TokenId>) {
    let ids = tokenizer("tiny-dense").encode(text, false).unwrap();
    (replying(ids.clone(), vec![]).0, ids)
}

fn request() -> GenerateRequest {
    GenerateRequest {
        id: "test".into(),
        prompt: Arc::from([1, 2, 3]),
        sampling: SamplingParams {
            temperature: 0.0,
            ..SamplingParams::default()
        },
        n: 1,
        max_tokens: None,
        min_tokens: 0,
        ignore_eos: false,
        stop_token_ids: vec![],
        stop: vec![],
        include_stop_str_in_output: false,
        skip_special_tokens: true,
        spaces_between_special_tokens: true,
        priority: 0,
        cache_salt: None,
        extensions: GenerateExtensions::default(),
    }
}

async fn answer(engine: &TextEngine, request: GenerateRequest) -> TextDelta {
    collect(engine.generate(request).unwrap()).await.unwrap().remove(0)
}

#[tokio::test]
async fn says_the_text_and_stops_at_eos() {
    let text = "a🙂b今日👍🏽 naïve text.";
    let (engine, ids) = saying(text);
    let answer = answer(&engine, request()).await;
    assert_eq!((answer.text.as_str(), answer.finish), (text, Some(TextFinish::Eos)));
    assert_eq!(answer.token_ids, [&ids[..], &[EOS]].concat());
}

#[tokio::test]
async fn an_incomplete_character_at_the_end_is_a_replacement() {
    let (engine, ids) = saying("ab🙂");
    let request = GenerateRequest {
        max_tokens: Some(ids.len() as u32 - 1),
        ..request()
    };
    let answer = answer(&engine, request).await;
    assert_eq!(
        (answer.text.as_str(), answer.finish),
        ("ab\u{fffd}", Some(TextFinish::Length))
    );
}

#[tokio::test]
async fn a_stop_string_ends_the_choice_and_the_sequence() {
    let (engine, ids) = saying("one two three four");
    for (include, expected) in [(false, "one "), (true, "one two")] {
        let request = GenerateRequest {
            stop: vec!["two".into()],
            include_stop_str_in_output: include,
            ..request()
        };
        let answer = answer(&engine, request).await;
        assert_eq!(
            (answer.text.as_str(), answer.finish),
            (expected, Some(TextFinish::StopString("two".into())))
        );
        assert!(answer.token_ids.len() < ids.len());
        assert_eq!(answer.token_ids[..], ids[..answer.token_ids.len()]);
    }
}

#[tokio::test]
async fn min_tokens_defers_stop_strings() {
    let (engine, ids) = saying("xx xx xx");
    let at = |n: u32| GenerateRequest {
        stop: vec!["xx".into()],
        min_tokens: n,
        ..request()
    };
    let first = answer(&engine, at(0)).await;
    let later = answer(&engine, at(first.token_ids.len() as u32)).await;
    assert_eq!((first.text.as_str(), later.text.as_str()), ("", "xx "));
    assert!(later.token_ids.len() <= ids.len());
}

#[tokio::test]
async fn a_stopping_tokens_text_is_output_only_on_request() {
    let (engine, _) = replying(vec![600, 9], vec![9]);
    let plain = answer(
        &engine,
        GenerateRequest {
            skip_special_tokens: false,
            ..request()
        },
    )
    .await;
    assert_eq!(plain.finish, Some(TextFinish::StopToken(9)));
    assert_eq!(
        (plain.text, plain.token_ids),
        (tokenizer("tiny-dense").decode(&[600], false), vec![600, 9])
    );
    let included = GenerateRequest {
        skip_special_tokens: false,
        include_stop_str_in_output: true,
        ..request()
    };
    assert_eq!(
        answer(&engine, included).await.text,
        tokenizer("tiny-dense").decode(&[600, 9], false)
    );
    let ignored = GenerateRequest {
        ignore_eos: true,
        max_tokens: Some(4),
        ..request()
    };
    assert_eq!(answer(&engine, ignored).await.finish, Some(TextFinish::Length));
}

#[tokio::test]
async fn choices_are_independent_sequences_with_their_own_seeds() {
    let executor = ScriptedExecutor::new(capacity(2048));
    let limits = TextLimits {
        max_model_len: 200,
        vocab_size: 2048,
        eos: None,
        extra_eos: vec![],
    };
    let engine = TextEngine::new(engine(executor), tokenizer("tiny-dense"), limits);
    let sampling = |seed| SamplingParams {
        seed,
        ..SamplingParams::default()
    };
    let three = GenerateRequest {
        n: 3,
        max_tokens: Some(5),
        sampling: sampling(u64::MAX),
        ..request()
    };
    let choices = collect(engine.generate(three.clone()).unwrap()).await.unwrap();
    assert_eq!(choices.iter().map(|choice| choice.index).collect::<Vec<_>>(), [0, 1, 2]);
    assert_ne!(choices[0].token_ids, choices[1].token_ids);
    let second = GenerateRequest {
        n: 1,
        sampling: sampling(0),
        ..three
    };
    assert_eq!(answer(&engine, second).await.token_ids, choices[1].token_ids);
}

#[tokio::test]
async fn logprobs_are_parallel_to_tokens() {
    let (engine, ids) = saying("hello there");
    let sampling = SamplingParams {
        logprobs: Some(2),
        prompt_logprobs: Some(0),
        ..request().sampling
    };
    let answer = answer(&engine, GenerateRequest { sampling, ..request() }).await;
    let logprob_ids: Vec<TokenId> = answer.logprobs.iter().map(|logprob| logprob.token.id).collect();
    assert_eq!(logprob_ids, [&ids[..], &[EOS]].concat());
    let prompt_ids: Vec<TokenId> = answer
        .prompt_logprobs
        .unwrap()
        .iter()
        .map(|logprob| logprob.token.id)
        .collect();
    assert_eq!(prompt_ids, [2, 3]);
}

#[tokio::test]
async fn a_failed_device_ends_the_stream_with_an_error() {
    let (engine, control) = replying(vec![600; 50], vec![]);
    control.fail_next(crate::step::ExecutorError {
        message: "matmul".into(),
        fatal: false,
    });
    let error = collect(engine.generate(GenerateRequest { n: 2, ..request() }).unwrap())
        .await
        .unwrap_err();
    assert!(matches!(error, TextError::Engine(_)), "{error}");
}

#[tokio::test]
async fn dropping_the_stream_frees_the_engine() {
    let (engine, control) = replying(vec![600; 150], vec![]);
    control.set_step_delay(std::time::Duration::from_millis(2));
    let mut stream = engine.generate(GenerateRequest { n: 4, ..request() }).unwrap();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    for _ in 0..200 {
        if engine.engine().stats().num_running == 0 {
            assert!(engine.engine().stats().generation_tokens < 4 * 150);
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    panic!("sequences still run: {:?}", engine.engine().stats());
}

#[tokio::test]
async fn prompts_that_do_not_fit_are_the_clients_fault() {
    let (engine, _) = replying(vec![600; 300], vec![]);
    let param = |prompt: Vec<TokenId>| match engine.generate(GenerateRequest {
        prompt: prompt.into(),
        ..request()
    }) {
        Err(TextError::Invalid { param, message }) => (param, message),
        other => panic!("{:?}", other.map(|_| ())),
    };
    assert_eq!(param(vec![]).0, None);
    assert!(param(vec![2048]).1.contains("out of vocabulary"));
    assert_eq!(param(vec![5; 200]).0, Some("max_tokens"));
    let (name, message) = param(vec![5; 201]);
    assert_eq!(name, Some("input_tokens"));
    assert!(message.contains("maximum context length is 200 tokens"));
    // The rest of the context is the limit, asked or not.
    for max_tokens in [None, Some(1000)] {
        let prompt: Arc<[TokenId]> = vec![5; 190].into();
        let answer = answer(
            &engine,
            GenerateRequest {
                prompt,
                max_tokens,
                ..request()
            },
        )
        .await;
        assert_eq!((answer.token_ids.len(), answer.finish), (10, Some(TextFinish::Length)));
    }
    let long = "é".repeat(200 * engine.tokenizer().max_chars_per_token() + 1);
    match engine.encode_prompt(&long, true) {
        Err(TextError::Invalid { param, .. }) => assert_eq!(param, Some("input_text")),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_delta_gathers_tokens_as_asked() {
    let ids = tokenizer("tiny-dense")
        .encode("one two three four five six seven eight nine ten", false)
        .unwrap();
    let (engine, control) = replying(ids.clone(), vec![]);
    control.set_step_delay(Duration::from_millis(5));
    let request = GenerateRequest {
        extensions: GenerateExtensions {
            stream_interval: 4,
            ..GenerateExtensions::default()
        },
        ..request()
    };
    let whole = answer(&engine, request.clone()).await;
    assert_eq!(whole.token_ids.len(), ids.len() + 1);
    let mut stream = engine.generate(request).unwrap();
    let mut deltas = Vec::new();
    while let Some(delta) = stream.next().await {
        deltas.push(delta.unwrap());
    }
    // Tokens that nobody has read yet come merged, so deltas may be larger, never smaller.
    for delta in deltas.iter().skip(1).rev().skip(1) {
        assert!(delta.token_ids.len() >= 4, "{:?}", delta.token_ids);
    }
    let text: String = deltas.iter().map(|delta| delta.text.as_str()).collect();
    assert_eq!(text, whole.text);
    assert!(deltas.last().unwrap().timing.is_some());
}

#[tokio::test]
async fn a_repetition_ends_the_text() {
    let (engine, ids) = saying("ha ha ha ha ha ha ha ha ha ha");
    let request = GenerateRequest {
        extensions: GenerateExtensions {
            repetition_detection: Some(RepetitionDetection {
                min_pattern_size: 1,
                max_pattern_size: 3,
                min_count: 3,
            }),
            ..GenerateExtensions::default()
        },
        ..request()
    };
    let answer = answer(&engine, request).await;
    assert_eq!(answer.finish, Some(TextFinish::Repetition));
    assert!(answer.token_ids.len() < ids.len(), "{:?}", answer.token_ids);
    assert!("ha ha ha ha ha ha ha ha".starts_with(&answer.text), "{}", answer.text);
}
