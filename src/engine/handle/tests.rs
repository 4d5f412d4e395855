//! The engine as its users see it: through the handle, with its thread.

mod constrained;

use std::time::{Duration, Instant};

use super::*;
use crate::engine::scripted::{self, ScriptControl, ScriptedExecutor};
use crate::engine::{ChoiceGroup, FinishReason, SequenceEvent, StopConditions};
use crate::step::{ExecutorError, SamplingParams, TokenId};

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
        constraint: None,
        pooling: None,
        thinking_budget: None,
        arrival: Instant::now(),
        group: ChoiceGroup::new(1),
    }
}

async fn collect(mut stream: SequenceStream) -> Result<(Vec<TokenId>, FinishReason), EngineError> {
    let mut tokens = Vec::new();
    while let Some(event) = stream.next_event().await {
        let event = event?;
        tokens.extend(ids(&event));
        if let Some(finish) = event.finish {
            assert!(stream.next_event().await.is_none());
            return Ok((tokens, finish));
        }
    }
    panic!("the stream ended without a finish");
}

fn ids(event: &SequenceEvent) -> impl Iterator<Item = TokenId> {
    event.tokens.iter().map(|token| token.id)
}

/// An engine whose executor hashes its context, and the executor's control.
fn hashing(change: impl FnOnce(&mut Capacity, &mut EngineConfig)) -> (EngineHandle, ScriptControl) {
    let (mut capacity, mut config) = (scripted::capacity(100), scripted::config());
    change(&mut capacity, &mut config);
    let executor = ScriptedExecutor::new(capacity);
    let control = executor.control();
    let metrics = Arc::new(Metrics::new("test", config.max_model_len));
    (
        EngineHandle::start(Box::new(executor), config, metrics).unwrap(),
        control,
    )
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("never: {what}");
}

#[tokio::test]
async fn a_request_gets_its_script() {
    let engine = scripted::engine(ScriptedExecutor::replying(scripted::capacity(100), |prompt| {
        prompt.iter().map(|id| id + 1).collect()
    }));
    let answer = collect(engine.submit(request(&[1, 2, 3], 3)).unwrap()).await.unwrap();
    assert_eq!(answer, (vec![2, 3, 4], FinishReason::Length));
}

#[tokio::test]
async fn sixty_four_mixed_requests_get_what_each_gets_alone() {
    let requests: Vec<_> = (0..64u32)
        .map(|i| {
            let shared = (0..(i % 5) * 40).map(|t| t % 100);
            let prompt: Vec<TokenId> = shared.chain((0..1 + i % 37).map(|t| (t * i + 3) % 100)).collect();
            let mut request = request(&prompt, 1 + (i * 7) % 60);
            if i % 3 == 0 {
                let sampling = SamplingParams {
                    seed: u64::from(i),
                    ..SamplingParams::default()
                };
                request.sampling = Arc::new(sampling);
            }
            request
        })
        .collect();
    let (alone, _) = hashing(|capacity, config| {
        capacity.max_in_flight = 1;
        config.prefix_caching = false;
    });
    let mut expected = Vec::new();
    for request in &requests {
        expected.push(collect(alone.submit(request.clone()).unwrap()).await.unwrap());
    }
    for max_in_flight in [1, 2] {
        let (engine, control) = hashing(|capacity, _| {
            capacity.max_in_flight = max_in_flight;
            capacity.num_blocks = 260;
        });
        control.hold();
        let streams: Vec<_> = requests
            .iter()
            .map(|request| engine.submit(request.clone()).unwrap())
            .collect();
        control.release();
        let answers = futures_util::future::join_all(streams.into_iter().map(collect)).await;
        for (i, (answer, expected)) in answers.into_iter().zip(&expected).enumerate() {
            assert_eq!(&answer.unwrap(), expected, "request {i}");
        }
        assert!(control.counters().max_rows > 16, "they did run together");
        assert!(engine.stats().prefix_cache_hits > 0);
        until("all blocks free", || engine.stats().kv_cache_usage == 0.0).await;
    }
}

#[tokio::test]
async fn a_slow_reader_gets_one_merged_event() {
    let (engine, control) = hashing(|_, _| {});
    let mut stream = engine.submit(request(&[5; 40], 30)).unwrap();
    until("it finishes unread", || engine.stats().generation_tokens == 30).await;
    let event = stream.next_event().await.unwrap().unwrap();
    assert_eq!((event.tokens.len(), event.finish), (30, Some(FinishReason::Length)));
    assert!(stream.next_event().await.is_none());
    assert!(control.counters().steps >= 30);
}

#[tokio::test]
async fn dropping_the_stream_aborts_within_a_step() {
    let (engine, control) = hashing(|_, _| {});
    control.set_step_delay(Duration::from_millis(2));
    let mut stream = engine.submit(request(&[1, 2, 3], 2000)).unwrap();
    stream.next_event().await.unwrap().unwrap();
    drop(stream);
    let steps = control.counters().steps;
    until("nothing runs", || {
        engine.stats().num_running == 0 && engine.stats().kv_cache_usage == 0.0
    })
    .await;
    assert!(
        control.counters().steps <= steps + 4,
        "one step may be running and one be queued"
    );
    assert!(
        !engine
            .shared
            .metrics
            .render()
            .contains(r#"finished_reason="abort",model_name="test"} 1.0"#)
    );
}

#[tokio::test]
async fn the_queue_limits_refuse_at_once() {
    let (engine, control) = hashing(|capacity, config| {
        capacity.max_num_seqs = 1;
        config.scheduler.max_queued_requests = Some(2);
        config.scheduler.max_queued_tokens = Some(10);
    });
    control.hold();
    let running = engine.submit(request(&[1; 10], 1)).unwrap();
    until("the first is admitted", || lock(&engine.shared.queue).num_requests == 0).await;
    let queued = engine.submit(request(&[1; 4], 1)).unwrap();
    let refused = engine.submit(request(&[1; 7], 1));
    assert!(matches!(refused, Err(EngineError::Overloaded(why)) if why.contains("--max-num-queued-tokens")));
    let given_up = engine.submit(request(&[1; 4], 1)).unwrap();
    let refused = engine.submit(request(&[1], 1));
    assert!(matches!(refused, Err(EngineError::Overloaded(why)) if why.contains("--max-num-queued-reqs")));
    drop(given_up);
    control.release();
    collect(running).await.unwrap();
    collect(queued).await.unwrap();
    until("the queue is empty", || lock(&engine.shared.queue).num_tokens == 0).await;
    assert_eq!(lock(&engine.shared.queue).num_requests, 0);
    let text = engine.shared.metrics.render();
    assert!(text.contains(r#"vllm:admission_rejections_total{model_name="test",reason="max_num_queued_reqs"} 1.0"#));
}

#[tokio::test]
async fn what_can_never_run_is_invalid() {
    let (engine, _) = hashing(|capacity, config| {
        capacity.num_blocks = 4;
        config.max_model_len = 100;
    });
    for (prompt, max_tokens, param) in [
        (vec![], 1, "prompt"),
        (vec![1; 64], 1, "prompt"),
        (vec![100], 1, "prompt"),
        (vec![1], 0, "max_tokens"),
    ] {
        match engine.submit(request(&prompt, max_tokens)) {
            Err(EngineError::Invalid { param: named, .. }) => assert_eq!(named, param),
            other => panic!("{} tokens: {other:?}", prompt.len()),
        }
    }
    let (tokens, finish) = collect(engine.submit(request(&[1; 60], u32::MAX)).unwrap())
        .await
        .unwrap();
    assert_eq!(
        (tokens.len(), finish),
        (4, FinishReason::Length),
        "clamped to what fits"
    );
}

#[tokio::test]
async fn draining_finishes_what_runs_and_aborts_what_comes() {
    let (engine, control) = hashing(|_, _| {});
    control.hold();
    let running = engine.submit(request(&[1, 2], 5)).unwrap();
    let drain = tokio::spawn({
        let engine = engine.clone();
        async move { engine.drain(Instant::now() + Duration::from_secs(60)).await }
    });
    until("draining", || engine.shared.draining.load(Ordering::Relaxed)).await;
    let late = collect(engine.submit(request(&[1, 2], 5)).unwrap()).await.unwrap();
    assert_eq!(late, (vec![], FinishReason::Abort));
    control.release();
    assert_eq!(collect(running).await.unwrap().0.len(), 5);
    assert_eq!(drain.await.unwrap(), Exit::Finished);
    assert_eq!(engine.health(), Health::Stopped(Exit::Finished));
    assert!(matches!(engine.submit(request(&[1], 1)), Err(EngineError::Stopped)));
}

#[tokio::test]
async fn the_drain_deadline_fails_what_is_left() {
    let (engine, control) = hashing(|_, _| {});
    control.set_step_delay(Duration::from_millis(2));
    let mut stream = engine.submit(request(&[1, 2], 4000)).unwrap();
    stream.next_event().await.unwrap().unwrap();
    assert_eq!(engine.drain(Instant::now()).await, Exit::Finished);
    assert!(matches!(collect(stream).await, Err(EngineError::ShuttingDown)));
}

#[tokio::test]
async fn a_lost_step_fails_its_requests_and_no_others() {
    let (engine, control) = hashing(|_, _| {});
    control.hold();
    let unlucky = engine.submit(request(&[1, 2], 50)).unwrap();
    control.fail_next(ExecutorError {
        message: "kernel x".into(),
        fatal: false,
    });
    control.release();
    assert!(matches!(collect(unlucky).await, Err(EngineError::Device(why)) if why == "kernel x"));
    assert_eq!(engine.health(), Health::Healthy);
    assert_eq!(
        collect(engine.submit(request(&[1, 2], 5)).unwrap())
            .await
            .unwrap()
            .0
            .len(),
        5
    );
}

#[tokio::test]
async fn a_fatal_error_or_a_panic_ends_everything() {
    for panics in [false, true] {
        let (engine, control) = hashing(|_, _| {});
        control.hold();
        let streams: Vec<_> = (0..3).map(|_| engine.submit(request(&[1, 2], 50)).unwrap()).collect();
        if panics {
            control.panic_next();
        } else {
            control.fail_next(ExecutorError {
                message: "lost".into(),
                fatal: true,
            });
        }
        control.release();
        for stream in streams {
            assert!(matches!(
                collect(stream).await,
                Err(EngineError::Device(_) | EngineError::Stopped)
            ));
        }
        assert!(matches!(engine.stopped().await, Exit::Failed(_)));
        assert!(matches!(engine.health(), Health::Stopped(Exit::Failed(_))));
        assert!(matches!(engine.submit(request(&[1], 1)), Err(EngineError::Stopped)));
    }
}

#[tokio::test]
async fn a_step_that_takes_too_long_is_a_stall() {
    let (engine, control) = hashing(|_, config| config.stall_timeout = Duration::from_millis(20));
    tokio::time::sleep(Duration::from_millis(40)).await;
    assert_eq!(engine.health(), Health::Healthy, "idle is healthy");
    control.hold();
    let stream = engine.submit(request(&[1], 1)).unwrap();
    until("stalled", || matches!(engine.health(), Health::Stalled(_))).await;
    control.release();
    collect(stream).await.unwrap();
    until("healthy again", || engine.health() == Health::Healthy).await;
}

#[tokio::test]
async fn pausing_keeps_finishes_or_aborts() {
    let (engine, control) = hashing(|_, _| {});
    control.set_step_delay(Duration::from_millis(1));

    let stream = engine.submit(request(&[1, 2], 100)).unwrap();
    engine.pause(PauseMode::Keep).await.unwrap();
    let steps = control.counters().steps;
    let queued = engine.submit(request(&[3], 1)).unwrap();
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(control.counters().steps, steps);
    engine.resume().await.unwrap();
    assert_eq!(collect(stream).await.unwrap().0.len(), 100);
    collect(queued).await.unwrap();

    let mut stream = engine.submit(request(&[1, 2], 20)).unwrap();
    stream.next_event().await.unwrap().unwrap();
    engine.pause(PauseMode::Wait).await.unwrap();
    assert_eq!(engine.stats().num_running, 0);
    assert_eq!(collect(stream).await.unwrap().1, FinishReason::Length);
    assert!(matches!(engine.submit(request(&[1], 1)), Err(EngineError::Paused)));
    assert!(engine.is_paused() && engine.reset_prefix_cache(false).await.unwrap());
    engine.resume().await.unwrap();

    let stream = engine.submit(request(&[1, 2], 2000)).unwrap();
    engine.pause(PauseMode::Abort).await.unwrap();
    assert_eq!(collect(stream).await.unwrap().1, FinishReason::Abort);
    engine.resume().await.unwrap();
    collect(engine.submit(request(&[1], 1)).unwrap()).await.unwrap();
}

#[tokio::test]
async fn asleep_new_requests_wait() {
    let (engine, control) = hashing(|_, _| {});
    control.set_step_delay(Duration::from_millis(1));
    let running = engine.submit(request(&[1, 2], 2000)).unwrap();
    engine.sleep(PauseMode::Abort).await.unwrap();
    assert_eq!(collect(running).await.unwrap().1, FinishReason::Abort);
    let steps = control.counters().steps;
    let waiting = engine.submit(request(&[1], 3)).unwrap();
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!((control.counters().steps, engine.health()), (steps, Health::Healthy));
    engine.resume().await.unwrap();
    assert_eq!(collect(waiting).await.unwrap().0.len(), 3);
    assert!(!engine.is_paused());
}

#[tokio::test]
async fn resetting_the_cache_can_take_blocks_from_running_sequences() {
    let (engine, control) = hashing(|_, _| {});
    let expected = collect(engine.submit(request(&[7; 40], 300)).unwrap()).await.unwrap();
    control.set_step_delay(Duration::from_millis(1));
    let mut stream = engine.submit(request(&[7; 40], 300)).unwrap();
    let first = stream.next_event().await.unwrap().unwrap();
    assert_eq!(first.num_cached_tokens, 32);
    assert!(!engine.reset_prefix_cache(false).await.unwrap());
    assert!(engine.reset_prefix_cache(true).await.unwrap());
    let mut tokens: Vec<TokenId> = ids(&first).collect();
    tokens.extend(collect(stream).await.unwrap().0);
    assert_eq!(tokens, expected.0, "it goes on as if nothing had happened");
    assert!(engine.stats().num_preemptions > 0);
}

#[tokio::test]
async fn requests_are_aborted_by_name() {
    let (engine, control) = hashing(|_, _| {});
    control.set_step_delay(Duration::from_millis(1));
    let named = |id: &str| {
        let request = EngineRequest {
            id: id.into(),
            ..request(&[1, 2], 2000)
        };
        engine.submit(request).unwrap()
    };
    let (a, a_1, ab, other) = (named("a"), named("a-1"), named("a-b"), named("c"));
    let gone = vec!["a".to_owned(), "unknown".to_owned()];
    assert_eq!(engine.abort_requests(Some(gone)).await.unwrap(), 2);
    assert_eq!(collect(a).await.unwrap().1, FinishReason::Abort);
    assert_eq!(collect(a_1).await.unwrap().1, FinishReason::Abort);
    assert_eq!(engine.abort_requests(None).await.unwrap(), 2);
    assert_eq!(collect(ab).await.unwrap().1, FinishReason::Abort);
    assert_eq!(collect(other).await.unwrap().1, FinishReason::Abort);
    assert_eq!(engine.abort_requests(None).await.unwrap(), 0);
}

#[tokio::test]
async fn the_thread_ends_with_its_last_handle() {
    let (engine, _) = hashing(|_, _| {});
    let mut exit = engine.exit.clone();
    let stream = engine.submit(request(&[1, 2], 5)).unwrap();
    drop(engine);
    assert_eq!(
        collect(stream).await.unwrap().0.len(),
        5,
        "a stream keeps the engine alive"
    );
    assert_eq!(*exit.wait_for(Option::is_some).await.unwrap(), Some(Exit::Finished));
}

#[tokio::test]
async fn the_first_event_tells_cached_tokens_and_metrics_count_them() {
    let (engine, _) = hashing(|_, _| {});
    for expected in [0, 48] {
        let mut stream = engine.submit(request(&[9; 50], 3)).unwrap();
        let event = stream.next_event().await.unwrap().unwrap();
        assert_eq!(event.num_cached_tokens, expected);
        if event.finish.is_none() {
            collect(stream).await.unwrap();
        }
    }
    let text = engine.shared.metrics.render();
    for line in [
        r#"vllm:prefix_cache_queries_total{engine="0",model_name="test"} 100.0"#,
        r#"vllm:prefix_cache_hits_total{engine="0",model_name="test"} 48.0"#,
        r#"vllm:prompt_tokens_total{engine="0",model_name="test"} 100.0"#,
        r#"vllm:prompt_tokens_by_source_total{engine="0",model_name="test",source="local_compute"} 52.0"#,
        r#"vllm:generation_tokens_total{engine="0",model_name="test"} 6.0"#,
        r#"vllm:request_success_total{engine="0",finished_reason="length",model_name="test"} 2.0"#,
        r#"vllm:time_to_first_token_seconds_count{engine="0",model_name="test"} 2.0"#,
        r#"vllm:inter_token_latency_seconds_count{engine="0",model_name="test"} 4.0"#,
        r#"vllm:e2e_request_latency_seconds_count{engine="0",model_name="test"} 2.0"#,
        r#"vllm:request_generation_tokens_sum{engine="0",model_name="test"} 6.0"#,
    ] {
        assert!(text.lines().any(|found| found == line), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_has_enough_ends_the_sequence_successfully() {
    let (engine, control) = hashing(|_, _| {});
    control.set_step_delay(Duration::from_millis(2));
    let mut stream = engine.submit(request(&[1, 2, 3], 4000)).unwrap();
    stream.next_event().await.unwrap().unwrap();
    stream.stop(1);
    for line in [
        r#"vllm:request_success_total{engine="0",finished_reason="stop",model_name="test"} 1.0"#,
        r#"vllm:request_generation_tokens_sum{engine="0",model_name="test"} 1.0"#,
        r#"vllm:request_params_n_count{engine="0",model_name="test"} 1.0"#,
    ] {
        let is_shown = || engine.shared.metrics.render().lines().any(|found| found == line);
        until(line, is_shown).await;
    }
}
