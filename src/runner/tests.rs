//! The runner on hand-made plans: every way to cut and mix the work gives Hugging Face's tokens.

use std::sync::Arc;

use serde_json::{Value, json};

use super::build::{ExecutorOptions, build_runner};
use super::model_runner::ModelRunner;
use crate::backend::DType;
use crate::backend::cpu::CpuBackend;
use crate::config::{CacheConfig, LoadFormat, ModelFiles, SchedulerConfig, SchedulingPolicy};
use crate::model::LoadError;
use crate::model::testing::*;
use crate::step::{
    Executor, HiddenRow, LogprobsMode, RowOutput, RowTokens, SampleRow, SamplingParams, StartedSlot, StepOutput,
    StepPlan, StepRow, TokenId, TokenMask,
};

const BLOCK_SIZE: usize = 16;
/// Blocks that each slot of a test may fill with its own tokens.
const BLOCKS_PER_SLOT: usize = 38;
const VOCAB: u32 = 2048;

/// A runner driven by hand.
struct Driver {
    runner: ModelRunner<CpuBackend>,
    max_num_seqs: usize,
}

struct Limits {
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    max_in_flight: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_num_seqs: 4,
            max_num_batched_tokens: 700,
            max_in_flight: 1,
        }
    }
}

fn build(
    files: &ModelFiles,
    hf_config: &Value,
    load_format: LoadFormat,
    dtype: DType,
    limits: &Limits,
) -> Result<Driver, LoadError> {
    let cache = CacheConfig {
        block_size: BLOCK_SIZE,
        memory_utilization: 0.9,
        memory_bytes: None,
        num_blocks_override: Some(limits.max_num_seqs * BLOCKS_PER_SLOT),
        prefix_caching: true,
        kv_dtype: None,
    };
    let scheduler = SchedulerConfig {
        max_num_batched_tokens: limits.max_num_batched_tokens,
        max_num_seqs: limits.max_num_seqs,
        max_queued_requests: None,
        max_queued_tokens: None,
        policy: SchedulingPolicy::Fcfs,
        long_prefill_token_threshold: 0,
        chunked_prefill: true,
    };
    let options = ExecutorOptions {
        files,
        hf_config,
        load_format,
        dtype,
        seed: 1,
        max_model_len: BLOCKS_PER_SLOT * BLOCK_SIZE,
        cache: &cache,
        scheduler: &scheduler,
        max_in_flight: limits.max_in_flight,
        default_kv_bytes: None,
        backend_bytes: |_| 0,
    };
    let (runner, plan) = build_runner(&options, CpuBackend::new(2, dtype), &mut |_, _| {})?;
    assert_eq!(plan.num_blocks, limits.max_num_seqs * BLOCKS_PER_SLOT);
    Ok(Driver {
        runner,
        max_num_seqs: limits.max_num_seqs,
    })
}

fn driver_with(model: &str, dtype: DType, limits: Limits) -> Driver {
    let files = ModelFiles::Directory(checkpoint_dir(model));
    build(&files, &hf_config(model), LoadFormat::Safetensors, dtype, &limits).unwrap()
}

fn driver(model: &str) -> Driver {
    driver_with(model, DType::F32, Limits::default())
}

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    }
}

/// Greedy, reporting every logit of the row.
fn greedy_with_logits() -> SamplingParams {
    SamplingParams {
        logprobs: Some(VOCAB),
        logprobs_mode: LogprobsMode::RawLogits,
        ..greedy()
    }
}

fn started(slot: u32, prompt: &[TokenId], sampling: SamplingParams) -> StartedSlot {
    StartedSlot {
        slot,
        sampling: Arc::new(sampling),
        prompt: Arc::from(prompt),
        output: Vec::new(),
    }
}

fn sampling(mut row: StepRow, output_index: u32) -> StepRow {
    row.sample = Some(SampleRow {
        output_index,
        needs_mask: false,
    });
    row
}

fn masked(mut row: StepRow, output_index: u32) -> StepRow {
    row.sample = Some(SampleRow {
        output_index,
        needs_mask: true,
    });
    row
}

/// The logits of a row whose slot runs [`greedy_with_logits`].
fn logits(row: &RowOutput) -> Vec<f32> {
    let mut values = vec![f32::NAN; VOCAB as usize];
    for &(id, logit) in &row.sampled.as_ref().unwrap().logprobs.as_ref().unwrap().top {
        values[id as usize] = logit;
    }
    values
}

fn token(row: &RowOutput) -> TokenId {
    row.sampled.as_ref().unwrap().id
}

impl Driver {
    /// The slot's own blocks, scattered: neighbours in a sequence are no neighbours in memory.
    fn blocks(&self, slot: u32) -> Vec<u32> {
        let count = self.max_num_seqs * BLOCKS_PER_SLOT;
        (0..BLOCKS_PER_SLOT)
            .map(|i| ((slot as usize + i * self.max_num_seqs) * 5 % count) as u32)
            .collect()
    }

    fn row(&self, slot: u32, start: usize, ids: &[TokenId]) -> StepRow {
        StepRow {
            slot,
            start,
            tokens: RowTokens::Known(ids.to_vec()),
            replay: 0,
            reset_conv: start == 0,
            block_table: Arc::from(self.blocks(slot)),
            sample: None,
            hidden: None,
        }
    }

    fn feedback(&self, slot: u32, start: usize, output_index: u32) -> StepRow {
        sampling(
            StepRow {
                tokens: RowTokens::LastSampled,
                ..self.row(slot, start, &[0])
            },
            output_index,
        )
    }

    fn step(&mut self, started: Vec<StartedSlot>, rows: Vec<StepRow>) -> StepOutput {
        let plan = StepPlan { started, rows };
        let ticket = self.runner.submit(&plan).unwrap();
        let output = self.runner.collect(ticket).unwrap();
        assert_eq!(output.rows.len(), plan.rows.len());
        for (row, out) in plan.rows.iter().zip(&output.rows) {
            assert_eq!(row.sample.is_some(), out.sampled.is_some());
        }
        output
    }

    /// Feeds the prompt in chunks of `chunk`; returns the row that samples.
    fn prefill(&mut self, slot: u32, prompt: &[TokenId], chunk: usize, params: SamplingParams) -> RowOutput {
        let mut start = vec![started(slot, prompt, params)];
        for (i, ids) in prompt.chunks(chunk).enumerate() {
            let row = self.row(slot, i * chunk, ids);
            if i * chunk + ids.len() == prompt.len() {
                return self
                    .step(std::mem::take(&mut start), vec![sampling(row, 0)])
                    .rows
                    .remove(0);
            }
            self.step(std::mem::take(&mut start), vec![row]);
        }
        unreachable!("prompts are not empty")
    }

    /// `n` tokens, the first of which was `first`, each fed back on the device.
    fn decode(&mut self, slot: u32, prompt_len: usize, first: TokenId, n: usize) -> Vec<TokenId> {
        let mut tokens = vec![first];
        while tokens.len() < n {
            let row = self.feedback(slot, prompt_len + tokens.len() - 1, tokens.len() as u32);
            tokens.push(token(&self.step(Vec::new(), vec![row]).rows[0]));
        }
        tokens
    }

    fn generate(&mut self, slot: u32, prompt: &[TokenId], chunk: usize, n: usize) -> Vec<TokenId> {
        let first = token(&self.prefill(slot, prompt, chunk, greedy()));
        self.decode(slot, prompt.len(), first, n)
    }
}

#[test]
fn greedy_continuations_from_any_chunking() {
    for model in MODELS {
        let (golden, tensors) = (Golden::read(model), golden_tensors(model));
        let mut driver = driver(model);
        for prompt in PROMPTS {
            let ids = golden.prompt(prompt);
            let want = tensors[&format!("fp32.logits_last.{prompt}")].to_f32();
            for chunk in [ids.len(), 1, 2, 3, 64] {
                let got = logits(&driver.prefill(0, &ids, chunk, greedy_with_logits()));
                assert!(
                    max_difference(&got, &want) <= 1e-3,
                    "{model} {prompt} in chunks of {chunk}"
                );
            }
            for (slot, chunk) in [(0, ids.len()), (1, 1), (2, 3), (3, 64)] {
                let tokens = driver.generate(slot, &ids, chunk, 64);
                assert_eq!(tokens, golden.greedy(prompt), "{model} {prompt} in chunks of {chunk}");
            }
        }
    }
}

#[test]
fn known_tokens_decode_as_fed_back_ones() {
    for model in MODELS {
        let golden = Golden::read(model);
        let (ids, want) = (golden.prompt("p7"), golden.greedy("p7"));
        let mut driver = driver(model);
        let mut tokens = vec![token(&driver.prefill(2, &ids, 7, greedy()))];
        while tokens.len() < 64 {
            let row = driver.row(2, 6 + tokens.len(), &tokens[tokens.len() - 1..]);
            tokens.push(token(
                &driver.step(Vec::new(), vec![sampling(row, tokens.len() as u32)]).rows[0],
            ));
        }
        assert_eq!(tokens, want, "{model}");
    }
}

#[test]
fn hidden_states_from_any_chunking() {
    for model in MODELS {
        let (golden, tensors) = (Golden::read(model), golden_tensors(model));
        let states = tensors["fp32.final_norm.p7"].to_f32();
        let ids = golden.prompt("p7");
        let width = states.len() / ids.len();
        let total: Vec<f32> = (0..width).map(|i| states.iter().skip(i).step_by(width).sum()).collect();
        let mut driver = driver(model);
        for chunk in [7, 1, 3] {
            let mut start = vec![started(0, &ids, greedy())];
            let mut sum = vec![0.0; width];
            for (i, part) in ids.chunks(chunk).enumerate() {
                let row = StepRow {
                    hidden: Some(HiddenRow::Sum),
                    ..driver.row(0, i * chunk, part)
                };
                // Another slot's row beside it, which asks for its last state.
                let beside = StepRow {
                    hidden: Some(HiddenRow::Last),
                    ..driver.row(1, 0, &ids)
                };
                start.push(started(1, &ids, greedy()));
                let rows = driver.step(std::mem::take(&mut start), vec![beside, row]).rows;
                assert!(
                    max_difference(&rows[0].hidden, &states[states.len() - width..]) <= 1e-3,
                    "{model}"
                );
                sum.iter_mut()
                    .zip(&rows[1].hidden)
                    .for_each(|(sum, value)| *sum += value);
            }
            assert!(max_difference(&sum, &total) <= 1e-2, "{model} in chunks of {chunk}");
        }
        let replayed = StepRow {
            hidden: Some(HiddenRow::Sum),
            replay: 1,
            ..driver.row(0, 0, &ids)
        };
        let plan = StepPlan {
            started: vec![started(0, &ids, greedy())],
            rows: vec![replayed],
        };
        assert!(driver.runner.submit(&plan).is_err());
    }
}

/// All prompts at once, started one after the other, prefilled in chunks of different sizes beside the others' decodes.
#[test]
fn any_mix_of_rows() {
    for model in MODELS {
        let golden = Golden::read(model);
        let mut driver = driver(model);
        let chunks = [1, 3, 16, 100];
        let prompts: Vec<Vec<TokenId>> = PROMPTS.iter().map(|prompt| golden.prompt(prompt)).collect();
        let (mut fed, mut tokens) = ([0usize; 4], vec![Vec::new(); 4]);
        for step in 0.. {
            let (mut begun, mut rows) = (Vec::new(), Vec::new());
            // The order of rows changes from step to step.
            for slot in (0..4).map(|i| (i + step) % 4).filter(|slot| step >= 2 * slot) {
                let (prompt, done): (&[TokenId], usize) = (&prompts[slot], tokens[slot].len());
                if done == 64 {
                    continue;
                }
                if fed[slot] == 0 {
                    begun.push(started(slot as u32, prompt, greedy()));
                }
                let row = if fed[slot] < prompt.len() {
                    let end = (fed[slot] + chunks[slot]).min(prompt.len());
                    let row = driver.row(slot as u32, fed[slot], &prompt[fed[slot]..end]);
                    fed[slot] = end;
                    if end == prompt.len() { sampling(row, 0) } else { row }
                } else {
                    driver.feedback(slot as u32, prompt.len() + done - 1, done as u32)
                };
                rows.push(row);
            }
            if rows.is_empty() && step > 8 {
                break;
            }
            let output = driver.step(begun, rows.clone());
            for (row, out) in rows.iter().zip(&output.rows) {
                tokens[row.slot as usize].extend(out.sampled.as_ref().map(|sampled| sampled.id));
            }
        }
        for (prompt, tokens) in PROMPTS.iter().zip(&tokens) {
            assert_eq!(*tokens, golden.greedy(prompt), "{model} {prompt}");
        }
    }
}

/// A second sequence shares the first one's blocks up to any boundary and replays only what the conv states need.
#[test]
fn prefix_hits_at_every_block_boundary() {
    for model in MODELS {
        let golden = Golden::read(model);
        let mut driver = driver(model);
        let replay_tokens = driver.runner.capacity().conv_replay_tokens;
        assert_eq!(replay_tokens, if model == "tiny-dense" { 5 * 2 } else { 4 * 2 });
        for prompt in ["p130", "p513"] {
            let ids = golden.prompt(prompt);
            let whole = logits(&driver.prefill(0, &ids, ids.len(), greedy_with_logits()));
            for boundary in (BLOCK_SIZE..ids.len()).step_by(BLOCK_SIZE) {
                let first = boundary - replay_tokens.min(boundary);
                let mut table = driver.blocks(0)[..boundary / BLOCK_SIZE].to_vec();
                table.extend(&driver.blocks(1)[boundary / BLOCK_SIZE..]);
                let hit = |start: usize, end: usize, replay: usize| StepRow {
                    replay,
                    reset_conv: start == first,
                    block_table: Arc::from(&table[..]),
                    ..driver.row(1, start, &ids[start..end])
                };
                // Once in one row, once with the replay cut in two and the suffix apart.
                let one = vec![sampling(hit(first, ids.len(), boundary - first), 0)];
                let cut = first + 3;
                let apart = [
                    hit(first, cut, cut - first),
                    hit(cut, boundary + 1, boundary - cut),
                    sampling(hit(boundary + 1, ids.len(), 0), 0),
                ];
                let one = driver.step(vec![started(1, &ids, greedy_with_logits())], one);
                assert!(logits(&one.rows[0]) == whole, "{model} {prompt} from {boundary}");
                // Only the prompt's own last block is left when the boundary is one token before its end.
                if boundary + 1 < ids.len() {
                    let mut begun = vec![started(1, &ids, greedy())];
                    let mut last = 0;
                    for row in apart {
                        let output = driver.step(std::mem::take(&mut begun), vec![row]);
                        last = output.rows[0].sampled.as_ref().map_or(0, |sampled| sampled.id);
                    }
                    let mut tokens = vec![last];
                    while tokens.len() < 8 {
                        let start = ids.len() + tokens.len() - 1;
                        let row = StepRow {
                            block_table: Arc::from(&table[..]),
                            ..driver.feedback(1, start, 1)
                        };
                        tokens.push(token(&driver.step(Vec::new(), vec![row]).rows[0]));
                    }
                    assert_eq!(
                        tokens,
                        golden.greedy(prompt)[..8],
                        "{model} {prompt} from {boundary}, cut"
                    );
                }
            }
        }
    }
}

/// A replay shorter than the convolutions look back must show: the test above would otherwise prove nothing.
#[test]
fn too_short_a_replay_differs() {
    // The first token behind the boundary is the last: what it lacks no later layer or token makes up for.
    let ids = &Golden::read("tiny-dense").prompt("p130")[..129];
    let mut driver = driver("tiny-dense");
    let whole = logits(&driver.prefill(0, ids, ids.len(), greedy_with_logits()));
    let replay_tokens = driver.runner.capacity().conv_replay_tokens;
    let boundary = 128;
    let row = StepRow {
        replay: replay_tokens - 1,
        reset_conv: true,
        block_table: Arc::from([&driver.blocks(0)[..8], &driver.blocks(1)[8..]].concat()),
        ..driver.row(1, boundary + 1 - replay_tokens, &ids[boundary + 1 - replay_tokens..])
    };
    let short = driver.step(vec![started(1, ids, greedy_with_logits())], vec![sampling(row, 0)]);
    assert!(max_difference(&logits(&short.rows[0]), &whole) > 1e-3);
}

#[test]
fn prompt_logprobs_in_any_cut() {
    for model in MODELS {
        let golden = Golden::read(model);
        // Two rows of logits at a time: the scores come in many pieces.
        let limits = Limits {
            max_num_seqs: 2,
            ..Limits::default()
        };
        let mut driver = driver_with(model, DType::F32, limits);
        for prompt in ["p1", "p7", "p130"] {
            let (ids, want) = (golden.prompt(prompt), golden.fp32(prompt, "next_token_logprob"));
            let params = SamplingParams {
                prompt_logprobs: Some(3),
                ..greedy()
            };
            for chunk in [ids.len(), 3, 50] {
                let mut begun = vec![started(1, &ids, params.clone())];
                let mut scored = Vec::new();
                for (i, part) in ids.chunks(chunk).enumerate() {
                    let row = driver.row(1, i * chunk, part);
                    let last = i * chunk + part.len() == ids.len();
                    let row = if last { sampling(row, 0) } else { row };
                    let output = driver.step(std::mem::take(&mut begun), vec![row]);
                    if last {
                        assert_eq!(
                            token(&output.rows[0]),
                            golden.greedy(prompt)[0],
                            "sampling is not disturbed"
                        );
                    }
                    scored.extend(output.rows.into_iter().flat_map(|row| row.prompt_logprobs));
                }
                assert_eq!(scored.iter().map(|entry| entry.id).collect::<Vec<_>>(), ids[1..]);
                let got: Vec<f32> = scored.iter().map(|entry| entry.logprob).collect();
                assert!(
                    max_difference(&got, &want) <= 1e-3,
                    "{model} {prompt} in chunks of {chunk}"
                );
                assert!(
                    scored
                        .iter()
                        .all(|entry| entry.top.len() == 3 && entry.top[0].1 >= entry.logprob)
                );
            }
            let tokens = driver.generate(0, &ids, ids.len(), 4);
            assert_eq!(tokens, golden.greedy(prompt)[..4]);
        }
    }
}

fn only(id: TokenId) -> TokenMask {
    let mut words = vec![0u32; VOCAB as usize / 32];
    words[id as usize / 32] |= 1 << (id % 32);
    TokenMask(words.into())
}

#[test]
fn masks_come_late() {
    let golden = Golden::read("tiny-moe");
    let (a, b) = (golden.prompt("p7"), golden.prompt("p130"));
    let mut driver = driver("tiny-moe");
    let begun = vec![
        started(0, &a, greedy()),
        started(1, &b, greedy()),
        started(2, &a, greedy()),
    ];
    let rows = vec![
        masked(driver.row(0, 0, &a), 0),
        sampling(driver.row(1, 0, &b), 0),
        masked(driver.row(2, 0, &a), 0),
    ];
    let ticket = driver.runner.submit(&StepPlan { started: begun, rows }).unwrap();
    assert!(
        driver
            .runner
            .set_mask(&ticket, 1, only(5))
            .unwrap_err()
            .message
            .contains("row 1")
    );
    driver.runner.set_mask(&ticket, 2, only(77)).unwrap();
    assert!(!driver.runner.set_mask(&ticket, 2, only(78)).unwrap_err().fatal);
    driver.runner.set_mask(&ticket, 0, only(2047)).unwrap();
    let output = driver.runner.collect(ticket).unwrap();
    let tokens: Vec<TokenId> = output.rows.iter().map(token).collect();
    assert_eq!(tokens, [2047, golden.greedy("p130")[0], 77]);

    // A step whose masks never come is an error of that step alone.
    let row = StepRow {
        tokens: RowTokens::LastSampled,
        ..masked(driver.row(0, 7, &[0]), 1)
    };
    let ticket = driver
        .runner
        .submit(&StepPlan {
            started: Vec::new(),
            rows: vec![row],
        })
        .unwrap();
    let error = driver.runner.collect(ticket).unwrap_err();
    assert!(error.message.contains("1 masks are missing") && !error.fatal, "{error}");
    assert_eq!(
        driver.decode(1, b.len(), golden.greedy("p130")[0], 8),
        golden.greedy("p130")[..8]
    );
}

/// Planning one step ahead: a step is submitted before the last one's tokens, and even its masks, are known.
#[test]
fn two_steps_in_flight() {
    let golden = Golden::read("tiny-moe");
    let (a, b) = (golden.prompt("p7"), golden.prompt("p130"));
    let mut driver = driver_with(
        "tiny-moe",
        DType::F32,
        Limits {
            max_in_flight: 2,
            ..Limits::default()
        },
    );
    let submit = |driver: &mut Driver, started, rows| driver.runner.submit(&StepPlan { started, rows }).unwrap();

    let begun = vec![started(0, &a, greedy()), started(1, &b, greedy())];
    let rows = vec![masked(driver.row(0, 0, &a), 0), sampling(driver.row(1, 0, &b), 0)];
    let first = submit(&mut driver, begun, rows);
    let row = driver.feedback(1, b.len(), 1);
    let second = submit(&mut driver, Vec::new(), vec![row]);
    let third = StepPlan {
        started: Vec::new(),
        rows: vec![driver.feedback(1, b.len() + 1, 2)],
    };
    assert!(
        driver
            .runner
            .submit(&third)
            .unwrap_err()
            .message
            .contains("2 steps are in flight")
    );
    let second_name = crate::step::Ticket(second.0);
    assert!(
        driver
            .runner
            .collect(second_name)
            .unwrap_err()
            .message
            .contains("not the oldest")
    );

    // The mask arrives after the second step overwrote every buffer but the first one's logits.
    driver.runner.set_mask(&first, 0, only(golden.greedy("p7")[0])).unwrap();
    let first = driver.runner.collect(first).unwrap();
    let third = driver.runner.submit(&third).unwrap();
    let second = driver.runner.collect(second).unwrap();
    let third = driver.runner.collect(third).unwrap();
    assert_eq!(token(&first.rows[0]), golden.greedy("p7")[0]);
    let tokens = [&first.rows[1], &second.rows[0], &third.rows[0]].map(token);
    assert_eq!(tokens, golden.greedy("p130")[..3]);
    assert_eq!(driver.decode(0, 7, golden.greedy("p7")[0], 8), golden.greedy("p7")[..8]);
}

#[test]
fn a_broken_plan_costs_only_its_step() {
    let golden = Golden::read("tiny-dense");
    let ids = golden.prompt("p7");
    let mut driver = driver("tiny-dense");
    let first = token(&driver.prefill(0, &ids, 7, greedy()));
    let unknown = driver.feedback(3, 0, 0);
    let unsampled = driver.feedback(2, 0, 0);
    let outside = driver.row(0, 7, &[VOCAB]);
    let plans = [
        (
            "slot 3 was not started",
            StepPlan {
                started: Vec::new(),
                rows: vec![unknown],
            },
        ),
        (
            "slot 2 has sampled nothing",
            StepPlan {
                started: vec![started(2, &ids, greedy())],
                rows: vec![unsampled],
            },
        ),
        (
            "token 2048 is outside",
            StepPlan {
                started: Vec::new(),
                rows: vec![outside],
            },
        ),
        (
            "slot 4 of 4 is started",
            StepPlan {
                started: vec![started(4, &ids, greedy())],
                rows: Vec::new(),
            },
        ),
    ];
    for (message, plan) in plans {
        let error = driver.runner.submit(&plan).unwrap_err();
        assert!(error.message.contains(message) && !error.fatal, "{error}");
    }
    assert!(driver.step(Vec::new(), Vec::new()).rows.is_empty());
    assert_eq!(driver.decode(0, 7, first, 16), golden.greedy("p7")[..16]);
}

#[test]
fn dummy_weights_run() {
    let files = ModelFiles::Directory("absent".into());
    for model in MODELS {
        for dtype in [DType::F32, DType::Bf16] {
            let run = || {
                let config = hf_config(model);
                let mut driver = build(&files, &config, LoadFormat::Dummy, dtype, &Limits::default()).unwrap();
                logits(&driver.prefill(0, &[1, 2, 3, 4, 5], 5, greedy_with_logits()))
            };
            let values = run();
            assert!(values.iter().all(|x| x.is_finite()));
            assert!(
                values.iter().any(|x| (x - values[0]).abs() > 1e-3),
                "logits differ between tokens"
            );
            assert_eq!(values, run(), "the seed decides");
        }
    }
}

#[test]
fn errors_before_anything_is_loaded() {
    let files = ModelFiles::Directory("absent".into());
    let message = |config: &Value, limits: &Limits| {
        let built = build(&files, config, LoadFormat::Safetensors, DType::F32, limits);
        built.err().expect("must be refused").to_string()
    };
    let limits = Limits::default();
    assert!(message(&json!({"architectures": ["GPT2LMHeadModel"]}), &limits).contains("GPT2LMHeadModel"));
    let mut config = hf_config("tiny-moe");
    assert!(message(&config, &limits).contains("model.safetensors"));
    config["num_experts"] = json!(1u64 << 40);
    assert!(message(&config, &limits).contains("num_experts"));
}
