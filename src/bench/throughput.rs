//! `rvllm bench throughput`: many prompts at once.

use serde_json::{Value, json};

use super::engine::Bench;
use crate::commands::say;

/// Times `sequences` requests that are submitted together.
///
/// # Errors
/// A request is refused, or the engine failed.
pub fn run(bench: &Bench, sequences: usize) -> anyhow::Result<Value> {
    let elapsed = bench.batch(sequences, 0)?.all.as_secs_f64();
    let (input, output) = (sequences * bench.input_len, sequences * bench.output_len);
    let per_s = |count: usize| count as f64 / elapsed;
    say!(
        "Throughput: {:.2} requests/s, {:.2} total tokens/s, {:.2} output tokens/s",
        per_s(sequences),
        per_s(input + output),
        per_s(output)
    );
    say!("Total num prompt tokens:  {input}");
    say!("Total num output tokens:  {output}");
    let mut result = json!({
        "elapsed_time": elapsed,
        "num_requests": sequences,
        "total_num_tokens": input + output,
        "requests_per_second": per_s(sequences),
        "tokens_per_second": per_s(input + output),
        "read_bandwidth_bytes_per_s": bench.read_bandwidth,
    });
    if bench.peak_flops.is_some() {
        // Every prompt's operations, and one step for each output token of the longest sequence with all of them in it.
        let (prefill_s, by) = bench.prefill_floor(sequences);
        let (step_s, _) = bench.decode_floor(sequences);
        let floor_s = prefill_s + step_s * bench.output_len.saturating_sub(1) as f64;
        say!(
            "Floor: {floor_s:.3} s (prefill {prefill_s:.3} s: {by}; a decode step of all {:.3} ms): {:.0} % of it",
            step_s * 1e3,
            floor_s / elapsed * 100.0
        );
        result["floor_time"] = json!(floor_s);
    }
    Ok(result)
}
