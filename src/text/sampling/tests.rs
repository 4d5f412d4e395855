use super::*;
use crate::text::tokenizer::testing::tokenizer;

fn resolve_with(options: SamplingOptions, defaults: &GenerationDefaults) -> Result<ResolvedSampling, TextError> {
    let tokenizer = tokenizer("tiny-dense");
    let rules = SamplingRules {
        limits: RequestLimits::DEFAULT,
        defaults,
        tokenizer: &tokenizer,
        vocab_size: 2048,
        max_model_len: 100,
        max_logprobs: 20,
        logprobs_mode: LogprobsMode::RawLogprobs,
        default_max_tokens: None,
    };
    resolve_sampling(options, &rules)
}

fn resolve(options: SamplingOptions) -> Result<ResolvedSampling, TextError> {
    resolve_with(options, &GenerationDefaults::default())
}

fn none() -> SamplingOptions {
    SamplingOptions::default()
}

#[test]
fn nothing_asked_is_vllms_neutral_values() {
    let resolved = resolve(SamplingOptions {
        seed: Some(7),
        ..none()
    })
    .unwrap();
    assert_eq!(
        resolved.sampling,
        SamplingParams {
            seed: 7,
            ..SamplingParams::default()
        }
    );
    assert_eq!((resolved.n, resolved.max_tokens, resolved.min_tokens), (1, None, 0));
    let unset = SamplingOptions {
        seed: Some(-1),
        ..none()
    };
    assert_ne!(
        resolve(unset.clone()).unwrap().sampling.seed,
        resolve(unset).unwrap().sampling.seed
    );
}

#[test]
fn request_over_generation_config() {
    let defaults = GenerationDefaults {
        temperature: Some(0.2),
        top_k: Some(80),
        repetition_penalty: Some(1.05),
        max_new_tokens: Some(30),
        ..GenerationDefaults::default()
    };
    let resolved = resolve_with(
        SamplingOptions {
            top_k: Some(-1),
            ..none()
        },
        &defaults,
    )
    .unwrap();
    assert_eq!((resolved.sampling.temperature, resolved.sampling.top_k), (0.2, 0));
    assert_eq!(
        (resolved.sampling.repetition_penalty, resolved.max_tokens),
        (1.05, Some(30))
    );
    let asked = SamplingOptions {
        max_tokens: Some(90),
        ..none()
    };
    assert_eq!(resolve_with(asked.clone(), &defaults).unwrap().max_tokens, Some(90));
    let capped = GenerationDefaults {
        max_new_tokens_is_cap: true,
        ..defaults
    };
    assert_eq!(resolve_with(asked, &capped).unwrap().max_tokens, Some(30));
}

#[test]
fn greedy_ignores_the_filters_and_small_temperatures_are_raised() {
    let greedy = SamplingOptions {
        temperature: Some(0.0),
        top_p: Some(0.5),
        top_k: Some(3),
        min_p: Some(0.1),
        ..none()
    };
    let sampling = resolve(greedy).unwrap().sampling;
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p),
        (0.0, 1.0, 0, 0.0)
    );
    let small = SamplingOptions {
        temperature: Some(0.001),
        ..none()
    };
    assert_eq!(resolve(small).unwrap().sampling.temperature, 0.01);
    assert_eq!(
        resolve(SamplingOptions {
            temperature: Some(-0.0),
            ..none()
        })
        .unwrap()
        .sampling
        .temperature,
        0.0
    );
}

#[test]
fn out_of_bounds_is_refused_with_vllms_param() {
    let nan = f64::NAN;
    let bad = |stop: &[&str]| stop.iter().map(|&stop| stop.to_owned()).collect::<Vec<_>>();
    let cases = [
        (
            SamplingOptions {
                temperature: Some(-0.1),
                ..none()
            },
            Some("temperature"),
        ),
        (
            SamplingOptions {
                temperature: Some(2.1),
                ..none()
            },
            Some("temperature"),
        ),
        (
            SamplingOptions {
                temperature: Some(nan),
                ..none()
            },
            Some("temperature"),
        ),
        (
            SamplingOptions {
                temperature: Some(f64::INFINITY),
                ..none()
            },
            Some("temperature"),
        ),
        (
            SamplingOptions {
                top_p: Some(0.0),
                ..none()
            },
            Some("top_p"),
        ),
        (
            SamplingOptions {
                top_p: Some(1.1),
                ..none()
            },
            Some("top_p"),
        ),
        (
            SamplingOptions {
                top_p: Some(nan),
                ..none()
            },
            Some("top_p"),
        ),
        (
            SamplingOptions {
                top_k: Some(-2),
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                min_p: Some(1.1),
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                min_p: Some(nan),
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                presence_penalty: Some(2.1),
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                frequency_penalty: Some(nan),
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                repetition_penalty: Some(0.0),
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                repetition_penalty: Some(f64::INFINITY),
                ..none()
            },
            None,
        ),
        (SamplingOptions { n: Some(0), ..none() }, None),
        (
            SamplingOptions {
                n: Some(1_000_000_000),
                ..none()
            },
            Some("n"),
        ),
        (
            SamplingOptions {
                n: Some(2),
                temperature: Some(0.0),
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                max_tokens: Some(0),
                ..none()
            },
            Some("max_tokens"),
        ),
        (
            SamplingOptions {
                max_tokens: Some(101),
                ..none()
            },
            Some("max_tokens"),
        ),
        (
            SamplingOptions {
                max_tokens: Some(-1),
                max_tokens_param: "max_completion_tokens",
                ..none()
            },
            Some("max_completion_tokens"),
        ),
        (
            SamplingOptions {
                min_tokens: Some(-1),
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                min_tokens: Some(11),
                max_tokens: Some(10),
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                min_tokens: Some(i64::MAX),
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                stop: bad(&["a", ""]),
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                stop_token_ids: vec![-1],
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                logit_bias: vec![("x".into(), 1.0)],
                ..none()
            },
            Some("logit_bias"),
        ),
        (
            SamplingOptions {
                logit_bias: vec![("2048".into(), 1.0)],
                ..none()
            },
            Some("logit_bias"),
        ),
        (
            SamplingOptions {
                logit_bias: vec![("-1".into(), 1.0)],
                ..none()
            },
            Some("logit_bias"),
        ),
        (
            SamplingOptions {
                logit_bias: vec![("1".into(), nan)],
                ..none()
            },
            Some("logit_bias"),
        ),
        (
            SamplingOptions {
                allowed_token_ids: Some(vec![]),
                ..none()
            },
            Some("allowed_token_ids"),
        ),
        (
            SamplingOptions {
                allowed_token_ids: Some(vec![2048]),
                ..none()
            },
            Some("allowed_token_ids"),
        ),
        (
            SamplingOptions {
                bad_words: bad(&[" "]),
                ..none()
            },
            None,
        ),
        (
            SamplingOptions {
                bad_words: vec!["a".into(); 129],
                ..none()
            },
            Some("bad_words"),
        ),
        (
            SamplingOptions {
                logprobs: Some(21),
                ..none()
            },
            Some("logprobs"),
        ),
        (
            SamplingOptions {
                logprobs: Some(-1),
                ..none()
            },
            Some("logprobs"),
        ),
        (
            SamplingOptions {
                prompt_logprobs: Some(-2),
                ..none()
            },
            Some("prompt_logprobs"),
        ),
    ];
    for (options, expected) in cases {
        match resolve(options.clone()) {
            Err(TextError::Invalid { param, message }) => {
                assert_eq!(param, expected, "{options:?}");
                assert_eq!(message.contains("(parameter="), param.is_some(), "{message}");
            }
            other => panic!("{options:?} gave {other:?}"),
        }
    }
}

#[test]
fn biases_are_clamped_and_bad_words_tokenized_both_ways() {
    let options = SamplingOptions {
        logit_bias: vec![("5".into(), f64::INFINITY), ("6".into(), -500.0)],
        bad_words: vec!["the".into()],
        ..none()
    };
    let sampling = resolve(options).unwrap().sampling;
    assert_eq!(sampling.logit_bias, [(5, 100.0), (6, -100.0)]);
    let tokenizer = tokenizer("tiny-dense");
    let mut expected = [
        tokenizer.encode("the", false).unwrap(),
        tokenizer.encode(" the", false).unwrap(),
    ];
    expected.sort();
    assert_eq!(sampling.bad_words, expected);
}
