//! The scheduler against an executor that distrusts it, without threads or clocks.

use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::config::Pooling;
use crate::engine::StopConditions;
use crate::engine::scripted::ScriptedExecutor;
use crate::step::{Executor, ExecutorError, SamplingParams, Ticket, TokenId};

const VOCAB_SIZE: usize = 40;
const EOS: TokenId = 7;

fn small() -> Capacity {
    Capacity {
        num_blocks: 16,
        block_size: 4,
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        conv_replay_tokens: 6,
        vocab_size: VOCAB_SIZE,
        max_in_flight: 1,
    }
}

fn options() -> SchedulerOptions {
    SchedulerOptions {
        long_prefill_token_threshold: 0,
        chunked_prefill: true,
        prefix_caching: true,
    }
}

#[derive(Clone, Debug)]
struct Spec {
    prompt: Vec<TokenId>,
    max_tokens: u32,
    min_tokens: u32,
    stops: bool,
    priority: i64,
    salt: Option<&'static str>,
    read_prefix_cache: bool,
    prompt_logprobs: bool,
    pooling: Option<Pooling>,
}

impl Spec {
    fn new(prompt: impl Into<Vec<TokenId>>, max_tokens: u32) -> Self {
        Self {
            prompt: prompt.into(),
            max_tokens,
            min_tokens: 0,
            stops: false,
            priority: 0,
            salt: None,
            read_prefix_cache: true,
            prompt_logprobs: false,
            pooling: None,
        }
    }
}

/// The engine's loop without its thread.
struct Harness {
    scheduler: Scheduler,
    executor: ScriptedExecutor,
    capacity: Capacity,
    in_flight: VecDeque<(Ticket, Vec<PlannedRow>)>,
    outputs: Vec<Output>,
    /// Rows of each planned step: (sequence, start, tokens, replay).
    history: Vec<Vec<(u64, usize, usize, usize)>>,
    admitted: Vec<Admitted>,
    num_preemptions: usize,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Output {
    tokens: Vec<TokenId>,
    finish: Option<FinishReason>,
    prompt_logprobs: Option<Vec<TokenLogprobs>>,
    hidden: Vec<f32>,
    lost: bool,
}

impl Harness {
    fn new(options: SchedulerOptions, capacity: Capacity) -> Self {
        Self {
            scheduler: Scheduler::new(options, &capacity, BlockHasher::new(capacity.block_size)),
            executor: ScriptedExecutor::new(capacity.clone()),
            capacity,
            in_flight: VecDeque::new(),
            outputs: Vec::new(),
            history: Vec::new(),
            admitted: Vec::new(),
            num_preemptions: 0,
        }
    }

    fn add(&mut self, spec: &Spec) -> SequenceId {
        let id = SequenceId(self.outputs.len() as u64);
        self.outputs.push(Output::default());
        let sampling = SamplingParams {
            temperature: 0.0,
            prompt_logprobs: spec.prompt_logprobs.then_some(1),
            ..SamplingParams::default()
        };
        self.scheduler.add(NewSequence {
            id,
            priority: spec.priority,
            prompt: spec.prompt.as_slice().into(),
            sampling: Arc::new(sampling),
            stop: StopConditions {
                max_tokens: spec.max_tokens,
                min_tokens: spec.min_tokens,
                eos: spec.stops.then_some(EOS),
                ..StopConditions::default()
            },
            read_prefix_cache: spec.read_prefix_cache && !spec.prompt_logprobs && spec.pooling != Some(Pooling::Mean),
            pooling: spec.pooling,
            mask_from: None,
            root: self.scheduler.hasher.root(spec.salt),
            hashes: Vec::new(),
        });
        id
    }

    /// One turn of the loop. False when there was nothing to do.
    fn turn(&mut self) -> bool {
        while self.in_flight.len() < self.capacity.max_in_flight {
            let Some(step) = self.scheduler.plan() else { break };
            self.note(&step);
            let ticket = self.executor.submit(&step.plan).expect("the plan is right");
            self.in_flight.push_back((ticket, step.rows));
        }
        let Some((ticket, rows)) = self.in_flight.pop_front() else {
            return false;
        };
        match self.executor.collect(ticket) {
            Ok(output) => {
                for progress in self.scheduler.complete(&rows, output).expect("the output fits") {
                    let output = &mut self.outputs[progress.id.0 as usize];
                    assert_eq!(output.finish, None, "no token after the end");
                    output.tokens.extend(progress.token.map(|token| token.id));
                    output.hidden = progress.hidden;
                    output.finish = progress.finish;
                    output.prompt_logprobs = output.prompt_logprobs.take().or(progress.prompt_logprobs);
                }
            }
            Err(error) => {
                assert!(!error.fatal, "{error}");
                self.lose(&rows);
                while let Some((ticket, rows)) = self.in_flight.pop_front() {
                    assert!(
                        self.executor.collect(ticket).is_err(),
                        "a step behind a lost one is lost"
                    );
                    self.lose(&rows);
                }
            }
        }
        true
    }

    fn lose(&mut self, rows: &[PlannedRow]) {
        for id in self.scheduler.fail(rows) {
            self.outputs[id.0 as usize].lost = true;
        }
    }

    fn note(&mut self, step: &PlannedStep) {
        let rows = step.rows.iter().zip(&step.plan.rows);
        self.history.push(
            rows.map(|(planned, row)| (planned.id.0, row.start, row.tokens.len(), row.replay))
                .collect(),
        );
        self.admitted.extend(&step.admitted);
        self.num_preemptions += step.preempted.len();
    }

    fn run(&mut self) {
        for _ in 0..100_000 {
            if !self.turn() {
                return;
            }
        }
        panic!("the engine does not come to an end");
    }

    fn assert_nothing_leaks(&self) {
        let cache = self.scheduler.cache();
        assert_eq!(
            cache.num_free_blocks() + cache.num_used_blocks(),
            self.capacity.num_blocks
        );
        assert_eq!(cache.num_used_blocks(), 0);
        assert_eq!(self.scheduler.num_free_slots(), self.capacity.max_num_seqs);
        assert!(self.scheduler.sequences.is_empty() && self.scheduler.waiting.is_empty());
        assert_eq!((self.scheduler.num_ended, self.scheduler.num_running()), (0, 0));
    }
}

/// What a request gets when nothing else runs, nothing is cached and everything fits one step.
fn alone(spec: &Spec) -> Output {
    let capacity = Capacity {
        num_blocks: 64,
        block_size: 16,
        max_num_seqs: 1,
        max_num_batched_tokens: 1024,
        conv_replay_tokens: 6,
        vocab_size: VOCAB_SIZE,
        max_in_flight: 1,
    };
    let mut harness = Harness::new(
        SchedulerOptions {
            prefix_caching: false,
            ..options()
        },
        capacity,
    );
    harness.add(spec);
    harness.run();
    harness.outputs.remove(0)
}

fn tokens(len: usize) -> Vec<TokenId> {
    (0..len as TokenId)
        .map(|i| (i * 13 + 5) % VOCAB_SIZE as TokenId)
        .collect()
}

#[test]
fn decodes_go_before_prefills_and_share_the_budget() {
    let mut harness = Harness::new(options(), small());
    harness.add(&Spec::new([1, 2, 3], 9));
    harness.turn();
    harness.add(&Spec::new(tokens(30), 2));
    harness.turn();
    harness.turn();
    assert_eq!(
        harness.history,
        [
            vec![(0, 0, 3, 0)],
            vec![(0, 3, 1, 0), (1, 0, 15, 0)],
            vec![(0, 4, 1, 0), (1, 15, 15, 0)]
        ]
    );
    harness.run();
    harness.assert_nothing_leaks();
}

#[test]
fn a_threshold_lets_short_prompts_pass_a_long_one() {
    let options = SchedulerOptions {
        long_prefill_token_threshold: 8,
        ..options()
    };
    let mut harness = Harness::new(options, small());
    harness.add(&Spec::new(tokens(40), 1));
    harness.add(&Spec::new([1, 2, 3, 4], 1));
    harness.turn();
    assert_eq!(harness.history, [vec![(0, 0, 8, 0), (1, 0, 4, 0)]]);
    assert_eq!(harness.outputs[1].finish, Some(FinishReason::Length));
}

#[test]
fn without_chunks_a_prompt_waits_for_a_step_that_holds_it() {
    let options = SchedulerOptions {
        chunked_prefill: false,
        ..options()
    };
    let mut harness = Harness::new(options, small());
    harness.add(&Spec::new(tokens(10), 2));
    harness.add(&Spec::new([1, 2, 3, 4, 5, 6, 7], 1));
    harness.turn();
    harness.turn();
    assert_eq!(
        harness.history,
        [vec![(0, 0, 10, 0)], vec![(0, 10, 1, 0), (1, 0, 7, 0)]]
    );
}

#[test]
fn a_hit_replays_the_conv_window_before_the_cached_prefix_ends() {
    let mut harness = Harness::new(options(), small());
    harness.add(&Spec::new(tokens(13), 1));
    harness.run();
    harness.add(&Spec::new(tokens(13), 1));
    harness.run();
    // 12 tokens are cached, the window is 6: 6..12 is replayed and 12 computed.
    assert_eq!(harness.history[1], [(1, 6, 7, 6)]);
    assert_eq!(harness.admitted[1].num_cached_tokens, 12);
    assert_eq!(harness.outputs[0].tokens, harness.outputs[1].tokens);
}

#[test]
fn a_hit_shorter_than_the_window_replays_from_the_start() {
    let mut harness = Harness::new(options(), small());
    harness.add(&Spec::new(tokens(6), 1));
    harness.run();
    harness.add(&Spec::new(tokens(6), 1));
    harness.run();
    assert_eq!(harness.history[1], [(1, 0, 6, 4)]);
}

#[test]
fn the_last_prompt_token_is_computed_even_when_all_is_cached() {
    let mut harness = Harness::new(options(), small());
    harness.add(&Spec::new(tokens(12), 1));
    harness.run();
    harness.add(&Spec::new(tokens(12), 1));
    harness.run();
    assert_eq!(harness.history[1], [(1, 2, 10, 6)], "8 of 12 hit");
}

#[test]
fn generated_tokens_are_found_by_the_next_turn_of_a_conversation() {
    let mut harness = Harness::new(options(), small());
    harness.add(&Spec::new(tokens(6), 11));
    harness.run();
    let conversation = [tokens(6), harness.outputs[0].tokens.clone(), vec![3, 4]].concat();
    harness.add(&Spec::new(conversation, 1));
    harness.run();
    // 17 tokens, the last of which was never fed: 16 have KV.
    assert_eq!(harness.admitted[1].num_cached_tokens, 16);
}

#[test]
fn sequences_with_different_salts_share_nothing() {
    let mut harness = Harness::new(options(), small());
    for salt in [None, Some("a"), Some("b"), Some("a")] {
        harness.add(&Spec {
            salt,
            ..Spec::new(tokens(9), 1)
        });
        harness.run();
    }
    let hits: Vec<_> = harness
        .admitted
        .iter()
        .map(|admitted| admitted.num_cached_tokens)
        .collect();
    assert_eq!(hits, [0, 0, 0, 8]);
}

#[test]
fn two_equal_prompts_in_one_step_do_not_read_what_the_step_writes() {
    let mut harness = Harness::new(options(), small());
    harness.add(&Spec::new(tokens(8), 1));
    harness.add(&Spec::new(tokens(8), 1));
    harness.turn();
    assert_eq!(harness.history[0], [(0, 0, 8, 0), (1, 0, 8, 0)]);
    harness.run();
    harness.assert_nothing_leaks();
}

#[test]
fn the_youngest_is_preempted_and_comes_back_with_its_output() {
    let capacity = Capacity {
        num_blocks: 6,
        ..small()
    };
    let mut harness = Harness::new(options(), capacity);
    let specs = [Spec::new([1, 2, 3, 4], 12), Spec::new([5, 6, 7, 8], 12)];
    for spec in &specs {
        harness.add(spec);
    }
    harness.run();
    assert!(harness.num_preemptions > 0);
    assert!(
        harness
            .admitted
            .iter()
            .any(|admitted| !admitted.first && admitted.id == SequenceId(1))
    );
    assert!(
        harness
            .admitted
            .iter()
            .all(|admitted| admitted.first || admitted.id == SequenceId(1))
    );
    for (output, spec) in harness.outputs.iter().zip(&specs) {
        assert_eq!(output, &alone(spec));
    }
    harness.assert_nothing_leaks();
}

#[test]
fn the_lowest_priority_waits_and_is_preempted_first() {
    let capacity = Capacity {
        num_blocks: 6,
        max_num_seqs: 2,
        ..small()
    };
    let mut harness = Harness::new(options(), capacity);
    for (priority, prompt) in [(5, [1, 2, 3, 4]), (9, [5, 6, 7, 8]), (1, [9, 10, 11, 12])] {
        harness.add(&Spec {
            priority,
            ..Spec::new(prompt, 12)
        });
    }
    harness.run();
    let order: Vec<_> = harness.admitted.iter().map(|admitted| admitted.id.0).collect();
    assert_eq!(order[..2], [2, 0], "by priority, not by arrival");
    assert!(harness.num_preemptions > 0);
    assert!(
        harness
            .admitted
            .iter()
            .all(|admitted| admitted.first || admitted.id.0 != 2),
        "the first is never preempted"
    );
    harness.assert_nothing_leaks();
}

#[test]
fn planning_ahead_feeds_the_unseen_token_back_and_drops_the_row_after_eos() {
    let capacity = Capacity {
        max_in_flight: 2,
        ..small()
    };
    let mut harness = Harness::new(options(), capacity);
    let (spec, reference) = (0..40)
        .map(|id| Spec {
            stops: true,
            ..Spec::new([3, 1, id], 40)
        })
        .map(|spec| (spec.clone(), alone(&spec)))
        .find(|(_, output)| output.finish == Some(FinishReason::Stop(None)) && output.tokens.len() > 2)
        .expect("one of the prompts meets EOS");
    harness.add(&spec);
    harness.run();
    assert_eq!(harness.outputs[0], reference);
    assert_eq!(
        harness.history.len(),
        reference.tokens.len() + 1,
        "one row more than tokens"
    );
    assert!(harness.executor.control().counters().fed_back_rows > 0);
    harness.assert_nothing_leaks();
}

#[test]
fn planning_ahead_knows_the_length_in_advance() {
    let capacity = Capacity {
        max_in_flight: 2,
        ..small()
    };
    let mut harness = Harness::new(options(), capacity);
    harness.add(&Spec::new([3, 1, 4], 5));
    harness.run();
    assert_eq!(harness.history.len(), 5);
}

#[test]
fn an_ended_sequence_keeps_slot_and_blocks_until_its_step_is_collected() {
    let capacity = Capacity {
        max_in_flight: 2,
        ..small()
    };
    let mut harness = Harness::new(options(), capacity);
    let id = harness.add(&Spec::new([3, 1, 4], 9));
    harness.turn();
    assert_eq!(harness.in_flight.len(), 1);
    harness.scheduler.abort(id);
    assert_eq!(
        (
            harness.scheduler.num_free_slots(),
            harness.scheduler.cache().num_used_blocks()
        ),
        (3, 1)
    );
    assert_eq!(harness.scheduler.num_running(), 0);
    harness.run();
    harness.assert_nothing_leaks();
}

#[test]
fn prompt_logprobs_are_collected_over_chunks() {
    let mut harness = Harness::new(options(), small());
    let spec = Spec {
        prompt_logprobs: true,
        ..Spec::new(tokens(40), 2)
    };
    harness.add(&Spec::new(tokens(40), 1));
    harness.run();
    harness.add(&spec);
    harness.run();
    let ids: Vec<_> = harness.outputs[1]
        .prompt_logprobs
        .as_ref()
        .unwrap()
        .iter()
        .map(|entry| entry.id)
        .collect();
    assert_eq!(ids, tokens(40)[1..]);
    assert_eq!(harness.outputs[1].prompt_logprobs, alone(&spec).prompt_logprobs);
    assert_eq!(
        harness.admitted[1].num_cached_tokens, 0,
        "they need the whole prompt computed"
    );
}

#[test]
fn an_output_that_does_not_fit_is_refused() {
    let mut harness = Harness::new(options(), small());
    harness.add(&Spec::new([1, 2], 3));
    let step = harness.scheduler.plan().unwrap();
    let sample = |id| crate::step::RowOutput {
        sampled: Some(SampledToken { id, logprobs: None }),
        ..crate::step::RowOutput::default()
    };
    for rows in [
        vec![],
        vec![crate::step::RowOutput::default()],
        vec![sample(VOCAB_SIZE as TokenId)],
    ] {
        assert!(harness.scheduler.complete(&step.rows, StepOutput { rows }).is_err());
    }
    assert!(
        harness
            .scheduler
            .complete(&step.rows, StepOutput { rows: vec![sample(1)] })
            .is_ok()
    );
}

#[test]
fn the_cache_is_reset_only_when_nobody_holds_blocks() {
    let mut harness = Harness::new(options(), small());
    harness.add(&Spec::new(tokens(9), 2));
    harness.turn();
    assert!(!harness.scheduler.reset_prefix_cache());
    harness.run();
    assert!(harness.scheduler.reset_prefix_cache());
    harness.add(&Spec::new(tokens(9), 1));
    harness.run();
    assert_eq!(harness.admitted[1].num_cached_tokens, 0);
}

/// Something that happens before a turn of the loop.
#[derive(Clone, Debug)]
enum Event {
    Arrive,
    Abort(usize),
    Fail,
    Turn,
}

#[derive(Clone, Debug)]
struct Mix {
    capacity: Capacity,
    options: SchedulerOptions,
    specs: Vec<Spec>,
    events: Vec<Event>,
}

prop_compose! {
    fn spec(max_len: usize)(
        shared_len in 0..max_len,
        tail in proptest::collection::vec(0..VOCAB_SIZE as TokenId, 1..8),
        max_tokens in 1u32..20,
        min_tokens in 0u32..4,
        stops in any::<bool>(),
        priority in 0i64..3,
        salted in proptest::bool::weighted(0.15),
        read_prefix_cache in proptest::bool::weighted(0.9),
        prompt_logprobs in proptest::bool::weighted(0.1),
        pooling in prop_oneof![8 => Just(None), 1 => Just(Some(Pooling::Last)), 1 => Just(Some(Pooling::Mean))],
    ) -> Spec {
        let mut prompt = [tokens(shared_len), tail].concat();
        prompt.truncate(max_len - 1);
        let max_tokens = max_tokens.min((max_len - prompt.len()) as u32);
        Spec {
            prompt, max_tokens, min_tokens: min_tokens.min(max_tokens), stops, priority,
            salt: salted.then_some("salt"), read_prefix_cache, prompt_logprobs: prompt_logprobs && pooling.is_none(),
            pooling,
        }
    }
}

prop_compose! {
    fn mix()(
        num_blocks in 4usize..24,
        block_size in 1usize..6,
        max_num_seqs in 1usize..6,
        budget in 0usize..40,
        conv_replay_tokens in 0usize..10,
        long_prefill_token_threshold in prop_oneof![Just(0usize), 1usize..12],
        chunked_prefill in proptest::bool::weighted(0.8),
    )(
        specs in proptest::collection::vec(spec((num_blocks * block_size).max(2)), 1..12),
        events in proptest::collection::vec(
            prop_oneof![
                4 => Just(Event::Arrive), 6 => Just(Event::Turn),
                1 => any::<usize>().prop_map(Event::Abort), 1 => Just(Event::Fail),
            ],
            0..60,
        ),
        capacity in Just(Capacity {
            num_blocks, block_size, max_num_seqs, conv_replay_tokens, vocab_size: VOCAB_SIZE, max_in_flight: 1,
            max_num_batched_tokens: max_num_seqs + if chunked_prefill { budget } else { num_blocks * block_size },
        }),
        options in Just(SchedulerOptions { long_prefill_token_threshold, chunked_prefill, prefix_caching: true }),
    ) -> Mix {
        Mix { capacity, options, specs, events }
    }
}

/// Plays a mix; returns the outputs and which sequences were aborted.
fn play(mix: &Mix, prefix_caching: bool, max_in_flight: usize, disturb: bool) -> (Vec<Output>, Vec<bool>) {
    let options = SchedulerOptions {
        prefix_caching,
        ..mix.options.clone()
    };
    let mut harness = Harness::new(
        options,
        Capacity {
            max_in_flight,
            ..mix.capacity.clone()
        },
    );
    let control = harness.executor.control();
    let mut arrivals = mix.specs.iter();
    let mut aborted = vec![false; mix.specs.len()];
    for event in &mix.events {
        match event {
            Event::Arrive => {
                arrivals.next().map(|spec| harness.add(spec));
            }
            Event::Abort(which) if disturb && !harness.outputs.is_empty() => {
                let which = which % harness.outputs.len();
                aborted[which] |= harness.outputs[which].finish.is_none();
                harness.scheduler.abort(SequenceId(which as u64));
            }
            Event::Fail if disturb && !harness.scheduler.sequences.is_empty() => {
                control.fail_next(ExecutorError {
                    message: "asked for".into(),
                    fatal: false,
                });
                harness.turn();
            }
            _ => {
                harness.turn();
            }
        }
    }
    for spec in arrivals {
        harness.add(spec);
    }
    harness.run();
    harness.assert_nothing_leaks();
    (harness.outputs, aborted)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn neighbours_caches_and_planning_ahead_change_no_token(mix in mix()) {
        let reference: Vec<Output> = mix.specs.iter().map(alone).collect();
        for (prefix_caching, max_in_flight) in [(false, 1), (true, 1), (false, 2), (true, 2)] {
            let (outputs, _) = play(&mix, prefix_caching, max_in_flight, false);
            prop_assert_eq!(&outputs, &reference, "caching {}, in flight {}", prefix_caching, max_in_flight);
        }
    }

    #[test]
    fn aborts_and_lost_steps_hurt_nobody_else(mix in mix()) {
        let reference: Vec<Output> = mix.specs.iter().map(alone).collect();
        for max_in_flight in [1, 2] {
            let (outputs, aborted) = play(&mix, true, max_in_flight, true);
            for ((output, aborted), reference) in outputs.iter().zip(aborted).zip(&reference) {
                if aborted || output.lost {
                    prop_assert!(reference.tokens.starts_with(&output.tokens));
                    prop_assert!(output.finish.is_none());
                } else {
                    prop_assert_eq!(output, reference);
                }
            }
        }
    }
}
