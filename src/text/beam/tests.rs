use super::*;
use crate::engine::scripted::{ScriptedExecutor, capacity, engine};
use crate::text::tokenizer::testing::tokenizer;
use crate::text::{GenerateExtensions, TextLimits, collect};

const EOS: TokenId = 0;

/// A toy model over the ids 0 (EOS), 1, 2 and 3: log-probabilities after a context, the best first.
fn model(context: &[TokenId]) -> TokenLogprobs {
    let mut seed = context.iter().fold(17u64, |seed, id| {
        (seed ^ u64::from(*id)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    });
    let mut weights: Vec<f64> = Vec::new();
    for _ in 0..4 {
        seed ^= seed >> 29;
        seed = seed.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        weights.push(1.0 + (seed >> 40) as f64 % 97.0);
    }
    let sum: f64 = weights.iter().sum();
    let mut top: Vec<(TokenId, f32)> = (0..).zip(weights.iter().map(|w| (w / sum).ln() as f32)).collect();
    top.sort_by(|a, b| b.1.total_cmp(&a.1));
    TokenLogprobs {
        id: top[0].0,
        logprob: top[0].1,
        rank: 1,
        top,
    }
}

fn rules(width: usize, max_tokens: usize, length_penalty: f64) -> Rules {
    Rules {
        width,
        max_tokens,
        prompt_tokens: 2,
        length_penalty,
        eos: Some(EOS),
        ignore_eos: false,
        keep_eos: false,
        scores_only_fall: true,
    }
}

fn run(rules: Rules) -> (Vec<Beam>, usize) {
    let mut beams = Beams::new(rules);
    while !beams.is_over() {
        let answers: Vec<_> = beams
            .active
            .iter()
            .map(|beam| {
                let mut answer = model(&beam.tokens);
                answer.top.truncate(2 * rules.width);
                answer
            })
            .collect();
        beams.advance(&answers);
    }
    let steps = beams.steps;
    (beams.best(), steps)
}

/// Every text of the toy model up to the length, scored: what a search as wide as all of them must find.
fn exhaustive(rules: Rules) -> Vec<(Vec<TokenId>, f64)> {
    let mut open = vec![(Vec::new(), 0.0)];
    let mut all = Vec::new();
    for _ in 0..rules.max_tokens {
        let mut next = Vec::new();
        for (tokens, value) in open {
            for (id, logprob) in model(&tokens).top {
                let value = value + f64::from(logprob);
                match id {
                    EOS => all.push((tokens.clone(), value)),
                    id => next.push(([&tokens[..], &[id]].concat(), value)),
                }
            }
        }
        open = next;
    }
    all.extend(open);
    for (tokens, value) in &mut all {
        *value /= ((rules.prompt_tokens + tokens.len()) as f64).powf(rules.length_penalty);
    }
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all
}

#[test]
fn a_search_as_wide_as_the_model_finds_the_best_texts() {
    for length_penalty in [1.0, 0.0, 2.0, -0.5] {
        let rules = rules(81, 4, length_penalty);
        let found: Vec<_> = run(rules).0.into_iter().take(10).map(|beam| beam.tokens).collect();
        let best: Vec<_> = exhaustive(rules)
            .into_iter()
            .take(10)
            .map(|(tokens, _)| tokens)
            .collect();
        assert_eq!(found, best, "length_penalty {length_penalty}");
    }
}

#[test]
fn ending_early_changes_nothing() {
    for width in 1..5 {
        for length_penalty in [1.0, 0.0, 3.0, -1.0] {
            let rules = rules(width, 40, length_penalty);
            let (early, steps) = run(rules);
            let (late, all_steps) = run(Rules {
                scores_only_fall: false,
                ..rules
            });
            let tokens = |beams: Vec<Beam>| beams.into_iter().map(|beam| beam.tokens).collect::<Vec<_>>();
            assert_eq!(
                tokens(early),
                tokens(late),
                "width {width}, length_penalty {length_penalty}"
            );
            assert_eq!(all_steps, 40);
            assert!(length_penalty > 0.0 || steps < 40, "it ended early");
        }
    }
}

#[test]
fn eos_is_kept_or_ignored_as_asked() {
    let kept = run(Rules {
        keep_eos: true,
        ..rules(3, 6, 1.0)
    });
    assert!(kept.0.iter().any(|beam| beam.completed));
    assert!(
        kept.0
            .iter()
            .all(|beam| beam.completed == beam.tokens.ends_with(&[EOS]))
    );
    let ignored = run(Rules {
        ignore_eos: true,
        ..rules(3, 6, 1.0)
    });
    assert!(ignored.0.iter().all(|beam| !beam.completed && beam.tokens.len() == 6));
}

/// The scripted engine's tokens: the script's with -0.5, the next higher ids with -1.5, -2.5 and so on.
fn scripted(script: impl Fn(&[TokenId]) -> Vec<TokenId> + Send + Sync + 'static) -> TextEngine {
    let limits = TextLimits {
        max_model_len: 100,
        vocab_size: 2048,
        eos: Some(7),
        extra_eos: vec![],
    };
    TextEngine::new(
        engine(ScriptedExecutor::replying(capacity(2048), script)),
        tokenizer("tiny-dense"),
        limits,
    )
}

fn request(n: u32, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        id: "test".into(),
        prompt: Arc::from([1, 2, 3]),
        sampling: SamplingParams {
            temperature: 0.0,
            logprobs: Some(1),
            ..SamplingParams::default()
        },
        n,
        max_tokens: Some(max_tokens),
        min_tokens: 0,
        ignore_eos: false,
        stop_token_ids: vec![],
        stop: vec![],
        include_stop_str_in_output: false,
        skip_special_tokens: true,
        spaces_between_special_tokens: true,
        priority: 0,
        cache_salt: None,
        extensions: GenerateExtensions {
            beam_search: Some(BeamSearch { length_penalty: 1.0 }),
            ..GenerateExtensions::default()
        },
    }
}

#[tokio::test]
async fn beams_come_from_the_engine_the_best_first() {
    // 100 after the prompt; after that 200 and on; EOS once four tokens are there.
    let engine = scripted(|prompt| match prompt.len() {
        3 => vec![100],
        len if len < 7 => vec![200 + len as TokenId],
        _ => vec![7],
    });
    let choices = collect(engine.generate(request(2, 20)).unwrap()).await.unwrap();
    assert_eq!(choices.len(), 2);
    assert_eq!(choices[0].token_ids, [100, 204, 205, 206]);
    assert_eq!(choices[0].finish, Some(TextFinish::StopToken(7)));
    assert_eq!(
        choices[0].text,
        tokenizer("tiny-dense").decode(&choices[0].token_ids, true)
    );
    assert_eq!(choices[0].logprobs.len(), 4);
    assert_eq!(choices[0].logprobs[1].top.len(), 4);
    // One token is the second best somewhere: all such beams tie, the latest place comes first.
    let differing = choices[1].token_ids.iter().zip(&choices[0].token_ids);
    assert_eq!(differing.filter(|(a, b)| a != b).count(), 1);

    let mut greedy = request(1, 2);
    greedy.sampling.logprobs = None;
    let choices = collect(engine.generate(greedy).unwrap()).await.unwrap();
    assert_eq!(
        (choices[0].token_ids.as_slice(), choices[0].logprobs.len()),
        (&[100, 204][..], 0)
    );
    assert_eq!(choices[0].finish, Some(TextFinish::Length));
}

#[tokio::test]
async fn a_search_may_fill_the_context() {
    let engine = scripted(|_| vec![50]);
    let choices = collect(engine.generate(request(2, 500)).unwrap()).await.unwrap();
    assert!(choices.iter().all(|choice| choice.token_ids.len() == 97));
}
