//! The engine in process, token ids in and out, with the time inside its executor taken apart.
//!
//! Prompts are random ids, new in every iteration, so that the prefix cache helps nobody.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::config::Config;
use crate::config::args::BenchArgs;
use crate::engine::{ChoiceGroup, EngineConfig, EngineHandle, EngineRequest, StopConditions};
use crate::metrics::Metrics;
use crate::model::cost::ModelCost;
use crate::model::registry::read_config;
use crate::serve::{self, Phases};
use crate::step::{
    Capacity, DeviceTimes, Executor, ExecutorError, SamplingParams, StepOutput, StepPlan, Ticket, TokenMask,
};

/// A loaded model and what is asked of it.
pub struct Bench {
    engine: EngineHandle,
    runtime: tokio::runtime::Runtime,
    vocab_size: u64,
    pub input_len: usize,
    pub output_len: usize,
    pub times: Arc<StepTimes>,
    pub cost: ModelCost,
    /// Bytes per second that the device read before the model was loaded.
    pub read_bandwidth: f64,
    /// `--peak-flops`.
    pub peak_flops: Option<f64>,
}

/// One batch from its submission: until every sequence had its first token, and until all were done.
pub struct BatchTimes {
    pub first: Duration,
    pub all: Duration,
}

impl Bench {
    /// Measures the device's bandwidth and loads the model.
    ///
    /// # Errors
    /// No such device, a model that cannot be loaded, or one whose context is shorter than the requests.
    pub fn start(config: Config, args: &BenchArgs) -> anyhow::Result<Self> {
        let needed = args.input_len + args.output_len;
        let read_bandwidth = serve::read_bandwidth(&config)?;
        let (config, executor) = serve::load(config, &mut Phases::default())?;
        if needed > config.model.max_model_len {
            bail!(
                "--input-len {} and --output-len {} need {needed} tokens; --max-model-len is {}",
                args.input_len,
                args.output_len,
                config.model.max_model_len
            );
        }
        let kv_dtype = config.cache.kv_dtype.unwrap_or(config.model.dtype);
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
        Ok(Self {
            engine: EngineHandle::start(Box::new(timed), engine_config, metrics)?,
            runtime: tokio::runtime::Builder::new_current_thread().build()?,
            vocab_size: config.model.vocab_size as u64,
            input_len: args.input_len,
            output_len: args.output_len,
            times,
            cost: ModelCost::new(&read_config(&config.model.hf_config)?, config.model.dtype, kv_dtype),
            read_bandwidth,
            peak_flops: args.peak_flops,
        })
    }

    /// Least seconds for the prefill of `sequences` prompts, and what sets them: the weights' bytes, or with `--peak-flops`
    /// the operations, whichever is more.
    pub fn prefill_floor(&self, sequences: usize) -> (f64, String) {
        let tokens = sequences * self.input_len;
        let bytes = self.cost.decode_weight_bytes(tokens);
        let by_bytes = (
            bytes / self.read_bandwidth,
            format!(
                "{:.2} GB of weights at {:.2} GB/s",
                bytes / 1e9,
                self.read_bandwidth / 1e9
            ),
        );
        let Some(peak) = self.peak_flops else { return by_bytes };
        let flops = self.cost.prefill_flops(sequences, self.input_len);
        let by_flops = (
            flops / peak,
            format!("{:.2} TFLOP at {:.1} TFLOP/s", flops / 1e12, peak / 1e12),
        );
        if by_flops.0 > by_bytes.0 { by_flops } else { by_bytes }
    }

    /// Least seconds for one decode step of `sequences` sequences in the middle of their answers, and its bytes.
    pub fn decode_floor(&self, sequences: usize) -> (f64, f64) {
        let context = self.input_len + self.output_len / 2;
        let bytes = self.cost.decode_step_bytes(sequences, context);
        (bytes / self.read_bandwidth, bytes)
    }

    /// Submits `sequences` requests at once and waits for all.
    ///
    /// # Errors
    /// A request is refused, or the engine failed.
    pub fn batch(&self, sequences: usize, iteration: usize) -> anyhow::Result<BatchTimes> {
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
                constraint: None,
                pooling: None,
                thinking_budget: None,
                arrival: Instant::now(),
                group: ChoiceGroup::new(1),
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
pub struct StepTimes {
    pub steps: AtomicU64,
    pub submit_ns: AtomicU64,
    pub collect_ns: AtomicU64,
    /// Whether the device is asked too, which costs it some microseconds a step.
    pub asks_device: AtomicBool,
    /// What the device says itself, of decode steps; nothing on a CPU.
    pub device: Mutex<DeviceTimes>,
}

impl StepTimes {
    /// Forgets what was counted.
    pub fn reset(&self) {
        for counter in [&self.steps, &self.submit_ns, &self.collect_ns] {
            counter.store(0, Ordering::Relaxed);
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
        if self.times.asks_device.load(Ordering::Relaxed)
            && let (Some(new), Ok(mut all)) = (self.executor.device_times(), self.times.device.lock())
        {
            all.steps += new.steps;
            all.forward_s += new.forward_s;
            all.sample_s += new.sample_s;
            all.launches += new.launches;
        }
        output
    }
}
