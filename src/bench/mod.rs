//! `rvllm bench`: figures, and beside each the floor that bytes and operations set where it can be computed.
//!
//! | subcommand | measures |
//! |---|---|
//! | `latency` | one batch in this process, token ids in and out |
//! | `throughput` | many prompts in this process |
//! | `startup` | from the start of the process to the first answer, cold and warm, phase by phase |
//! | `serve` | a running server over HTTP |
//!
//! Flags and the first lines of output are vLLM's.

mod engine;
mod latency;
pub mod serve;
pub mod startup;
mod stats;
mod throughput;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use serde_json::Value;

use crate::config::Config;
use crate::config::args::{BenchArgs, BenchKind};

/// Loads the model of `config` and measures it as `latency` or `throughput`.
///
/// # Errors
/// The model cannot be loaded, a request does not fit it, or the engine failed.
pub fn run(config: Config, args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let bench = engine::Bench::start(config, args)?;
    let result = match args.kind {
        BenchKind::Latency {
            batch_size,
            num_iters_warmup,
            num_iters,
        } => latency::run(&bench, batch_size * args.n, num_iters_warmup, num_iters)?,
        BenchKind::Throughput { num_prompts } => throughput::run(&bench, num_prompts * args.n)?,
    };
    write_json(args.output_json.as_deref(), &result)?;
    Ok(ExitCode::SUCCESS)
}

/// `--output-json`.
fn write_json(path: Option<&Path>, result: &Value) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(result)?;
    std::fs::write(path, text).with_context(|| format!("--output-json {}", path.display()))
}
