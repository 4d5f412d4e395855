//! `rvllm bench latency|throughput`: the engine in process, token ids in and out, with the floor computed from bytes beside
//! each decode figure and the read bandwidth measured in the same run.
//!
//! The flags and the first lines of output are vLLM's. Prompts are random ids, new in every iteration, so that the prefix cache
//! helps nobody.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::config::Config;
use crate::config::args::{BenchArgs, BenchKind};
use crate::engine::{EngineConfig, EngineHandle, EngineRequest, StopConditions};
use crate::metrics::Metrics;
use crate::model::cost::ModelCost;
use crate::model::registry::read_config;
use crate::serve;
use crate::step::{
    Capacity, DeviceTimes, Executor, ExecutorError, SamplingParams, StepOutput, StepPlan, Ticket, TokenMask,
};

/// Loads the model of `config` and measures what `args` asks for.
///
/// # Errors
/// The model cannot be loaded, a request does not fit it, or the engine failed.
pub fn run(config: Config, args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let needed = args.input_len + args.output_len;
    let bandwidth = serve::read_bandwidth(&config)?;
    let (config, executor) = serve::load(config)?;
    if needed > config.model.max_model_len {
        bail!(
            "--input-len {} and --output-len {} need {needed} tokens; --max-model-len is {}",
            args.input_len,
            args.output_len,
            config.model.max_model_len
        );
    }
    let kv_dtype = config.cache.kv_dtype.unwrap_or(config.model.dtype);
    let cost = ModelCost::new(&read_config(&config.model.hf_config)?, config.model.dtype, kv_dtype);
    let times = Arc::new(StepTimes::default());
    let timed = Timed {
        executor,
        times: times.clone(),
    };
    let mut engine_config = EngineConfig::new(
        config.scheduler.clone(),
        config.cache.prefix_caching,
        config.model.max_model_len,
    );
    engine_config.log_stats_interval = None;
    let metrics = Arc::new(Metrics::new(&config.model.name, config.model.max_model_len));
    let bench = Bench {
        engine: EngineHandle::start(Box::new(timed), engine_config, metrics)?,
        runtime: tokio::runtime::Builder::new_current_thread().build()?,
        vocab_size: config.model.vocab_size as u64,
        input_len: args.input_len,
        output_len: args.output_len,
        times,
    };
    let result = match args.kind {
        BenchKind::Latency {
            batch_size,
            num_iters_warmup,
            num_iters,
        } => bench.latency(batch_size * args.n, num_iters_warmup, num_iters, &cost, bandwidth)?,
        BenchKind::Throughput { num_prompts } => bench.throughput(num_prompts * args.n)?,
    };
    if let Some(path) = &args.output_json {
        let text = serde_json::to_string_pretty(&result)?;
        std::fs::write(path, text).with_context(|| format!("--output-json {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

struct Bench {
    engine: EngineHandle,
    runtime: tokio::runtime::Runtime,
    vocab_size: u64,
    input_len: usize,
    output_len: usize,
    times: Arc<StepTimes>,
}

/// One batch from its submission: until every sequence had its first token, and until all were done.
struct BatchTimes {
    first: Duration,
    all: Duration,
}

impl Bench {
    fn latency(
        &self,
        sequences: usize,
        warmup: usize,
        iterations: usize,
        cost: &ModelCost,
        bandwidth: f64,
    ) -> anyhow::Result<Value> {
        for i in 0..warmup {
            self.batch(sequences, i)?;
        }
        self.times.reset();
        let mut runs = (0..iterations)
            .map(|i| self.batch(sequences, warmup + i))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let steps = self.times.steps.load(Ordering::Relaxed).max(1);
        let elapsed: Duration = runs.iter().map(|run| run.all).sum();

        let mean = |f: &dyn Fn(&BatchTimes) -> f64| runs.iter().map(f).sum::<f64>() / runs.len() as f64;
        let average = mean(&|run| run.all.as_secs_f64());
        let prefill_s = mean(&|run| run.first.as_secs_f64());
        let decode_steps = (self.output_len - 1) as f64;
        let step_s = mean(&|run| (run.all - run.first).as_secs_f64()) / decode_steps.max(1.0);
        runs.sort_by_key(|run| run.all);
        let percentiles: Vec<(usize, f64)> = [10, 25, 50, 75, 90, 99]
            .map(|p| (p, runs[(runs.len() - 1) * p / 100].all.as_secs_f64()))
            .to_vec();

        println!("Avg latency: {average} seconds");
        for (percent, seconds) in &percentiles {
            println!("{percent}% percentile latency: {seconds} seconds");
        }
        let prompt_tokens = sequences * self.input_len;
        println!(
            "Prefill: {sequences} x {} tokens in {:.2} ms, {:.0} tok/s",
            self.input_len,
            prefill_s * 1e3,
            prompt_tokens as f64 / prefill_s
        );
        let mut result = json!({
            "avg_latency": average,
            "latencies": runs.iter().map(|run| run.all.as_secs_f64()).collect::<Vec<_>>(),
            "percentiles": percentiles.iter().map(|(p, s)| (p.to_string(), json!(s))).collect::<serde_json::Map<_, _>>(),
            "prefill_ms": prefill_s * 1e3,
            "read_bandwidth_bytes_per_s": bandwidth,
        });
        if self.output_len > 1 {
            let context = self.input_len + self.output_len / 2;
            let bytes = cost.decode_step_bytes(sequences, context);
            let floor_s = bytes / bandwidth;
            println!(
                "Decode: {:.3} ms a step, {:.1} tok/s; floor {:.3} ms ({:.2} GB at the {:.2} GB/s read in this run): {:.0} % of it",
                step_s * 1e3,
                sequences as f64 / step_s,
                floor_s * 1e3,
                bytes / 1e9,
                bandwidth / 1e9,
                floor_s / step_s * 100.0
            );
            result["decode_ms_per_step"] = json!(step_s * 1e3);
            result["decode_tokens_per_s"] = json!(sequences as f64 / step_s);
            result["decode_floor_ms"] = json!(floor_s * 1e3);
            result["share_of_bandwidth"] = json!(floor_s / step_s);
        }
        // What is left of the run when the executor's calls are taken away: planning, stop checks, delivery.
        let inside = self.times.submit_ns.load(Ordering::Relaxed) + self.times.collect_ns.load(Ordering::Relaxed);
        let engine_ms = (elapsed.as_secs_f64() - inside as f64 / 1e9).max(0.0) * 1e3 / steps as f64;
        let submit_ms = self.times.submit_ns.load(Ordering::Relaxed) as f64 / 1e6 / steps as f64;
        println!("Host: {engine_ms:.3} ms a step outside the executor, {submit_ms:.3} ms in its submit");
        result["engine_ms_per_step"] = json!(engine_ms);
        result["submit_ms_per_step"] = json!(submit_ms);
        let device = self.times.device.lock().map(|times| *times).unwrap_or_default();
        if let Some(launches) = device.launches.checked_div(device.steps) {
            let per_step = |seconds: f64| seconds * 1e3 / device.steps as f64;
            let (forward_ms, sample_ms) = (per_step(device.forward_s), per_step(device.sample_s));
            println!(
                "Device: {forward_ms:.3} ms a decode step in {launches} launches, {sample_ms:.3} ms in the sampler"
            );
            result["device_forward_ms"] = json!(forward_ms);
            result["device_sample_ms"] = json!(sample_ms);
            result["launches_per_step"] = json!(launches);
        }
        Ok(result)
    }

    fn throughput(&self, sequences: usize) -> anyhow::Result<Value> {
        let elapsed = self.batch(sequences, 0)?.all.as_secs_f64();
        let (input, output) = (sequences * self.input_len, sequences * self.output_len);
        let (requests_per_s, output_per_s) = (sequences as f64 / elapsed, output as f64 / elapsed);
        let total_per_s = (input + output) as f64 / elapsed;
        println!(
            "Throughput: {requests_per_s:.2} requests/s, {total_per_s:.2} total tokens/s, {output_per_s:.2} output tokens/s"
        );
        println!("Total num prompt tokens:  {input}");
        println!("Total num output tokens:  {output}");
        Ok(json!({
            "elapsed_time": elapsed,
            "num_requests": sequences,
            "total_num_tokens": input + output,
            "requests_per_second": requests_per_s,
            "tokens_per_second": total_per_s,
        }))
    }

    /// Submits `sequences` requests at once and waits for all.
    fn batch(&self, sequences: usize, iteration: usize) -> anyhow::Result<BatchTimes> {
        let sampling = Arc::new(SamplingParams {
            temperature: 0.0,
            ..SamplingParams::default()
        });
        let requests: Vec<EngineRequest> = (0..sequences)
            .map(|i| EngineRequest {
                id: format!("bench-{iteration}-{i}"),
                prompt: self.random_prompt((iteration * sequences + i) as u64),
                sampling: sampling.clone(),
                stop: StopConditions {
                    max_tokens: self.output_len as u32,
                    ..StopConditions::default()
                },
                priority: 0,
                cache_salt: None,
                read_prefix_cache: true,
                arrival: Instant::now(),
            })
            .collect();
        let start = Instant::now();
        let streams = requests
            .into_iter()
            .map(|request| self.engine.submit(request))
            .collect::<Result<Vec<_>, _>>()?;
        let firsts = self
            .runtime
            .block_on(futures_util::future::try_join_all(streams.into_iter().map(
                |mut stream| async move {
                    let mut first = None;
                    while let Some(event) = stream.next_event().await {
                        if !event?.tokens.is_empty() {
                            first.get_or_insert_with(|| start.elapsed());
                        }
                    }
                    anyhow::Ok(first)
                },
            )))?;
        let all = start.elapsed();
        let Some(first) = firsts
            .into_iter()
            .collect::<Option<Vec<_>>>()
            .and_then(|f| f.into_iter().max())
        else {
            bail!("a sequence ended without a token");
        };
        Ok(BatchTimes { first, all })
    }

    fn random_prompt(&self, seed: u64) -> Arc<[u32]> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % self.vocab_size) as u32
        };
        std::iter::repeat_with(next).take(self.input_len).collect()
    }
}

/// Time spent inside the executor.
#[derive(Default)]
struct StepTimes {
    steps: AtomicU64,
    submit_ns: AtomicU64,
    collect_ns: AtomicU64,
    device: Mutex<DeviceTimes>,
}

impl StepTimes {
    fn reset(&self) {
        for counter in [&self.steps, &self.submit_ns, &self.collect_ns] {
            counter.store(0, Ordering::Relaxed);
        }
        if let Ok(mut device) = self.device.lock() {
            *device = DeviceTimes::default();
        }
    }
}

struct Timed {
    executor: Box<dyn Executor>,
    times: Arc<StepTimes>,
}

fn timed<T>(counter: &AtomicU64, call: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = call();
    counter.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
    value
}

impl Executor for Timed {
    fn capacity(&self) -> &Capacity {
        self.executor.capacity()
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<Ticket, ExecutorError> {
        self.times.steps.fetch_add(1, Ordering::Relaxed);
        timed(&self.times.submit_ns, || self.executor.submit(plan))
    }

    fn set_mask(&mut self, ticket: &Ticket, row: usize, mask: TokenMask) -> Result<(), ExecutorError> {
        self.executor.set_mask(ticket, row, mask)
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, ExecutorError> {
        let output = timed(&self.times.collect_ns, || self.executor.collect(ticket));
        if let (Some(new), Ok(mut all)) = (self.executor.device_times(), self.times.device.lock()) {
            all.steps += new.steps;
            all.forward_s += new.forward_s;
            all.sample_s += new.sample_s;
            all.launches += new.launches;
        }
        output
    }
}
