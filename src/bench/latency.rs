//! `rvllm bench latency`: one batch, over and over.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};

use super::engine::{BatchTimes, Bench};
use super::stats::{mean, percentile};
use crate::commands::say;

/// What vLLM reports.
const PERCENTILES: [u32; 6] = [10, 25, 50, 75, 90, 99];

/// Times `iterations` batches of `sequences`.
///
/// # Errors
/// A request is refused, or the engine failed.
pub fn run(bench: &Bench, sequences: usize, warmup: usize, iterations: usize) -> anyhow::Result<Value> {
    for i in 0..warmup {
        bench.batch(sequences, i)?;
    }
    bench.times.reset();
    let runs = (0..iterations)
        .map(|i| bench.batch(sequences, warmup + i))
        .collect::<anyhow::Result<Vec<BatchTimes>>>()?;
    let elapsed: Duration = runs.iter().map(|run| run.all).sum();

    let latencies: Vec<f64> = runs.iter().map(|run| run.all.as_secs_f64()).collect();
    let percentiles = PERCENTILES.map(|p| (p, percentile(&latencies, f64::from(p))));
    say!("Avg latency: {} seconds", mean(&latencies));
    for (percent, seconds) in percentiles {
        say!("{percent}% percentile latency: {seconds} seconds");
    }
    let mut result = json!({
        "avg_latency": mean(&latencies),
        "latencies": latencies,
        "percentiles": percentiles.map(|(p, s)| (p.to_string(), json!(s))).into_iter().collect::<serde_json::Map<_, _>>(),
        "read_bandwidth_bytes_per_s": bench.read_bandwidth,
    });
    prefill(bench, sequences, &runs, &mut result);
    if bench.output_len > 1 {
        decode(bench, sequences, &runs, &mut result);
    }
    host(bench, elapsed, &mut result);
    // Apart from what was timed above.
    bench.times.asks_device.store(true, Ordering::Relaxed);
    bench.batch(sequences, warmup + iterations)?;
    device(bench, &mut result);
    Ok(result)
}

fn prefill(bench: &Bench, sequences: usize, runs: &[BatchTimes], result: &mut Value) {
    let seconds = mean(&runs.iter().map(|run| run.first.as_secs_f64()).collect::<Vec<_>>());
    let (floor_s, by) = bench.prefill_floor(sequences);
    say!(
        "Prefill: {sequences} x {} tokens in {:.2} ms, {:.0} tok/s; floor {:.2} ms ({by}): {:.0} % of it",
        bench.input_len,
        seconds * 1e3,
        (sequences * bench.input_len) as f64 / seconds,
        floor_s * 1e3,
        floor_s / seconds * 100.0
    );
    result["prefill_ms"] = json!(seconds * 1e3);
    result["prefill_floor_ms"] = json!(floor_s * 1e3);
}

fn decode(bench: &Bench, sequences: usize, runs: &[BatchTimes], result: &mut Value) {
    let after_first: Vec<f64> = runs.iter().map(|run| (run.all - run.first).as_secs_f64()).collect();
    let step_s = mean(&after_first) / (bench.output_len - 1) as f64;
    let (floor_s, bytes) = bench.decode_floor(sequences);
    say!(
        "Decode: {:.3} ms a step, {:.1} tok/s; floor {:.3} ms ({:.2} GB at the {:.2} GB/s read in this run): {:.0} % of it",
        step_s * 1e3,
        sequences as f64 / step_s,
        floor_s * 1e3,
        bytes / 1e9,
        bench.read_bandwidth / 1e9,
        floor_s / step_s * 100.0
    );
    result["decode_ms_per_step"] = json!(step_s * 1e3);
    result["decode_tokens_per_s"] = json!(sequences as f64 / step_s);
    result["decode_floor_ms"] = json!(floor_s * 1e3);
    result["share_of_bandwidth"] = json!(floor_s / step_s);
}

/// What is left of the run when the executor's calls are taken away: planning, stop checks, delivery.
fn host(bench: &Bench, elapsed: Duration, result: &mut Value) {
    let times = &bench.times;
    let steps = times.steps.load(Ordering::Relaxed).max(1) as f64;
    let submit_ns = times.submit_ns.load(Ordering::Relaxed);
    let inside = submit_ns + times.collect_ns.load(Ordering::Relaxed);
    let engine_ms = (elapsed.as_secs_f64() - inside as f64 / 1e9).max(0.0) * 1e3 / steps;
    let submit_ms = submit_ns as f64 / 1e6 / steps;
    say!("Host: {engine_ms:.3} ms a step outside the executor, {submit_ms:.3} ms in its submit");
    result["engine_ms_per_step"] = json!(engine_ms);
    result["submit_ms_per_step"] = json!(submit_ms);
}

/// What the device measured itself, where it does.
fn device(bench: &Bench, result: &mut Value) {
    let device = bench.times.device.lock().map(|times| *times).unwrap_or_default();
    let Some(launches) = device.launches.checked_div(device.steps) else {
        return;
    };
    let per_step_ms = |seconds: f64| seconds * 1e3 / device.steps as f64;
    let (forward_ms, sample_ms) = (per_step_ms(device.forward_s), per_step_ms(device.sample_s));
    say!("Device: {forward_ms:.3} ms a decode step in {launches} launches, {sample_ms:.3} ms in the sampler");
    result["device_forward_ms"] = json!(forward_ms);
    result["device_sample_ms"] = json!(sample_ms);
    result["launches_per_step"] = json!(launches);
}
