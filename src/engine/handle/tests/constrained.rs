//! Sequences under a grammar, through the engine's thread, on the scripted executor.

use super::*;
use crate::engine::{EngineRequest, ThinkingBudget};
use crate::grammar::{Constraint, GrammarCompiler, GrammarKind, GrammarSpec, Reasoning, Start, Vocabulary};

/// Bytes are their own ids.
const OPEN: TokenId = 256;
const CLOSE: TokenId = 257;
const EOS: TokenId = 258;
const VOCAB_SIZE: usize = 259;

fn constraint(kind: GrammarKind, start: Start) -> Constraint {
    let bytes: Vec<u8> = (0..=255).collect();
    let vocabulary = Vocabulary::new(VOCAB_SIZE, &[EOS], |id| match id {
        OPEN => (b"<think>", true),
        CLOSE => (b"</think>", true),
        EOS => (b"<|im_end|>", true),
        id => (&bytes[id as usize..=id as usize], false),
    });
    let compiler = GrammarCompiler::new(&vocabulary).unwrap();
    Constraint {
        grammar: compiler.compile(&GrammarSpec::new(kind)).unwrap(),
        start,
    }
}

fn digits() -> GrammarKind {
    GrammarKind::Regex("[0-9]{6}".into())
}

fn text(tokens: &[TokenId]) -> String {
    tokens
        .iter()
        .filter_map(|&id| u8::try_from(id).ok())
        .map(char::from)
        .collect()
}

fn constrained(prompt: &[TokenId], kind: GrammarKind) -> EngineRequest {
    let mut request = request(prompt, 40);
    request.stop.eos = Some(EOS);
    request.constraint = Some(constraint(kind, Start::Now));
    request
}

/// Engines with one step in flight and with two, whose executor hashes what it reads.
fn engines(change: impl Fn(&mut Capacity, &mut EngineConfig)) -> [(EngineHandle, ScriptControl); 2] {
    [1, 2].map(|max_in_flight| {
        hashing(|capacity, config| {
            capacity.vocab_size = VOCAB_SIZE;
            capacity.max_in_flight = max_in_flight;
            change(capacity, config);
        })
    })
}

#[tokio::test]
async fn output_is_what_the_grammar_allows_and_ends_with_eos() {
    let mut answers = Vec::new();
    for (engine, _) in engines(|_, _| {}) {
        let (tokens, finish) = collect(engine.submit(constrained(&[1, 2, 3], digits())).unwrap())
            .await
            .unwrap();
        assert_eq!((tokens.len(), tokens[6], finish), (7, EOS, FinishReason::Stop(None)));
        assert!(text(&tokens).bytes().all(|byte| byte.is_ascii_digit()), "{tokens:?}");
        answers.push(tokens);
    }
    assert_eq!(answers[0], answers[1], "planning ahead changes nothing");
}

#[tokio::test]
async fn neighbours_without_a_grammar_are_unaffected() {
    for (engine, control) in engines(|_, _| {}) {
        let alone = collect(engine.submit(request(&[9, 8, 7], 30)).unwrap()).await.unwrap();
        control.hold();
        let mut constrained_streams = Vec::new();
        for i in 0..8 {
            constrained_streams.push(engine.submit(constrained(&[i, 2, 3], digits())).unwrap());
        }
        let free = engine.submit(request(&[9, 8, 7], 30)).unwrap();
        control.release();
        assert_eq!(collect(free).await.unwrap(), alone);
        for stream in constrained_streams {
            let (tokens, _) = collect(stream).await.unwrap();
            assert_eq!((text(&tokens).len(), tokens.len()), (6, 7));
        }
        assert!(control.counters().max_rows >= 8, "they ran together");
    }
}

#[tokio::test]
async fn preemption_loses_nothing_of_the_grammar() {
    let grammar = constraint(GrammarKind::Regex("[a-z]{20}[0-9]{10}".into()), Start::Now);
    let asked = |i: TokenId| {
        let mut request = constrained(&[i, 6, 7], digits());
        request.constraint = Some(grammar.clone());
        request
    };
    let mut alone = Vec::new();
    let [_, (engine, _)] = engines(|_, _| {});
    for i in 0..6 {
        alone.push(collect(engine.submit(asked(i)).unwrap()).await.unwrap());
    }
    for (engine, control) in engines(|capacity, _| {
        capacity.num_blocks = 24;
        capacity.block_size = 4;
    }) {
        control.hold();
        let streams: Vec<_> = (0..6).map(|i| engine.submit(asked(i)).unwrap()).collect();
        control.release();
        for (stream, alone) in streams.into_iter().zip(&alone) {
            assert_eq!(&collect(stream).await.unwrap(), alone);
        }
        assert!(engine.stats().num_preemptions > 0, "blocks ran out");
    }
}

#[tokio::test]
async fn reasoning_is_free_and_the_answer_is_not() {
    for max_in_flight in [1, 2] {
        let reply = [b"let me think".map(TokenId::from).as_slice(), &[CLOSE]].concat();
        let capacity = Capacity {
            max_in_flight,
            ..scripted::capacity(VOCAB_SIZE)
        };
        let engine = scripted::engine(ScriptedExecutor::replying(capacity, move |_| reply.clone()));
        let mut request = constrained(&[1, 2, 3], digits());
        let reasoning = Reasoning {
            close: [CLOSE].into(),
            ..Reasoning::default()
        };
        request.constraint = Some(constraint(digits(), Start::AfterReasoning(reasoning)));
        let (tokens, finish) = collect(engine.submit(request).unwrap()).await.unwrap();
        let (reasoning, answer) = tokens.split_at(13);
        assert_eq!((text(reasoning).as_str(), reasoning[12]), ("let me think", CLOSE));
        // The script goes on repeating its last token; the mask makes it a digit, and at last EOS.
        assert_eq!(
            (text(answer).as_str(), answer.len(), finish),
            ("000000", 7, FinishReason::Stop(None))
        );
    }
}

#[tokio::test]
async fn a_whole_output_ends_whatever_the_stop_conditions_say() {
    for (engine, _) in engines(|_, _| {}) {
        let mut ignoring = constrained(&[1, 2, 3], digits());
        ignoring.stop.eos = None;
        let (tokens, finish) = collect(engine.submit(ignoring).unwrap()).await.unwrap();
        assert_eq!((tokens.len(), finish), (7, FinishReason::Stop(None)));

        // More tokens are asked for than the grammar has: it wins where it leaves no choice, and only there.
        let mut longer = constrained(&[1, 2, 3], GrammarKind::Regex("[0-9]{0,9}".into()));
        longer.stop.min_tokens = 20;
        longer.sampling = Arc::new(SamplingParams {
            min_tokens: 20,
            min_tokens_suppressed: vec![EOS],
            ..SamplingParams::clone(&longer.sampling)
        });
        let (tokens, finish) = collect(engine.submit(longer).unwrap()).await.unwrap();
        assert_eq!((tokens.len(), finish), (10, FinishReason::Stop(None)));
    }
}

#[tokio::test]
async fn max_tokens_cuts_and_dropping_aborts() {
    for (engine, control) in engines(|_, _| {}) {
        let mut short = constrained(&[1, 2, 3], digits());
        short.stop.max_tokens = 3;
        let (tokens, finish) = collect(engine.submit(short).unwrap()).await.unwrap();
        assert_eq!((tokens.len(), finish), (3, FinishReason::Length));
        control.set_step_delay(Duration::from_millis(5));
        let kind = GrammarKind::Regex("[a-z]+".into());
        let mut dropped = engine.submit(constrained(&[4, 5], kind)).unwrap();
        dropped.next_event().await.unwrap().unwrap();
        drop(dropped);
        until("the dropped sequence is gone", || engine.stats().num_running == 0).await;
        control.set_step_delay(Duration::ZERO);
        let after = collect(engine.submit(constrained(&[1, 2, 3], digits())).unwrap()).await;
        assert_eq!(after.unwrap().0.len(), 7);
    }
}

/// The executor's test double prefers the mask to `min_tokens_suppressed`; a real sampler's other parameters can leave
/// nothing of a mask. Whatever it then chooses is an error of that sequence alone.
#[tokio::test]
async fn a_sequence_that_cannot_go_on_fails_alone() {
    for (engine, control) in engines(|_, _| {}) {
        control.ignore_masks(true);
        let failing = engine.submit(constrained(&[1, 2, 3], digits())).unwrap();
        let free = engine.submit(request(&[9, 8, 7], 30)).unwrap();
        match collect(failing).await {
            Err(EngineError::Constraint(message)) => assert!(message.contains("structured output"), "{message}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(collect(free).await.unwrap().0.len(), 30);
        control.ignore_masks(false);
        let after = collect(engine.submit(constrained(&[1, 2, 3], digits())).unwrap()).await;
        assert_eq!(after.unwrap().0.len(), 7, "the engine goes on");
    }
}

#[tokio::test]
async fn a_refused_mask_loses_what_is_in_flight_and_nothing_else() {
    for (engine, control) in engines(|_, _| {}) {
        control.refuse_next_mask(ExecutorError {
            message: "mask x".into(),
            fatal: false,
        });
        let unlucky = engine.submit(constrained(&[1, 2, 3], digits())).unwrap();
        assert!(matches!(collect(unlucky).await, Err(EngineError::Device(why)) if why == "mask x"));
        assert_eq!(engine.health(), Health::Healthy);
        let after = collect(engine.submit(constrained(&[1, 2, 3], digits())).unwrap()).await;
        assert_eq!(after.unwrap().0.len(), 7);
    }
}

#[tokio::test]
async fn a_thinking_budget_closes_the_reasoning_that_the_prompt_opened() {
    let mut answers = Vec::new();
    for (engine, _) in engines(|_, _| {}) {
        let mut request = request(&[1, OPEN, 5], 20);
        request.thinking_budget = Some(ThinkingBudget {
            max_tokens: 5,
            open: OPEN,
            close: CLOSE,
        });
        let (tokens, finish) = collect(engine.submit(request).unwrap()).await.unwrap();
        // One of the five is in the prompt; the executor's hashes may close it earlier.
        let closed = tokens.iter().position(|&token| token == CLOSE);
        assert!(closed.is_some_and(|at| at <= 4), "{tokens:?}");
        assert_eq!((tokens.len(), finish), (20, FinishReason::Length));
        answers.push(tokens);
    }
    assert_eq!(answers[0], answers[1], "planning ahead changes nothing");
}

#[tokio::test]
async fn a_budget_that_cannot_be_kept_fails_its_request_alone() {
    for (engine, control) in engines(|_, _| {}) {
        control.ignore_masks(true);
        let mut request = request(&[1, OPEN], 20);
        request.thinking_budget = Some(ThinkingBudget {
            max_tokens: 0,
            open: OPEN,
            close: CLOSE,
        });
        let error = collect(engine.submit(request).unwrap()).await.unwrap_err();
        assert!(matches!(error, EngineError::Constraint(_)), "{error:?}");
        control.ignore_masks(false);
        assert!(
            collect(engine.submit(super::request(&[1, 2], 3)).unwrap())
                .await
                .is_ok()
        );
    }
}
