//! `rvllm bench serve`: load on a running server, and what it feels like.
//!
//! Prompts and request bodies are made before the clock starts, one thread does all the work, and each event of a stream costs
//! one small parse: the client must not be what is measured. Its own processor time is printed.
//!
//! # Source
//! Flags, definitions and the table are those of `vllm bench serve`.

mod arrivals;
mod dataset;
mod floor;
mod load;
mod metrics;
mod report;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use uuid::Uuid;

use crate::client::Client;
use crate::commands::say;
use crate::commands::talk::first_model;
use crate::config::args::BenchServeArgs;
use crate::config::environment::Environment;
use load::{Load, Target};
use metrics::Metrics;

/// Between two attempts of the ready check.
const READY_PAUSE: Duration = Duration::from_millis(500);

/// Measures and reports.
///
/// # Errors
/// The server cannot be reached, the prompts cannot be made, or the result cannot be written. Requests that fail are counted.
pub fn run(args: &BenchServeArgs, env: &Environment) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the client cannot be started")?;
    runtime.block_on(measure(args, env))
}

async fn measure(args: &BenchServeArgs, env: &Environment) -> anyhow::Result<ExitCode> {
    let client = Client::new(env.get("OPENAI_API_KEY"), &args.headers)?;
    let (model, root) = match &args.model {
        Some(model) => (
            args.served_model_name.clone().unwrap_or_else(|| model.clone()),
            model.clone(),
        ),
        None => {
            say!("Model not specified, fetching first model from server...");
            let (id, root) = first_model(&client, &format!("{}/v1", args.base_url)).await?;
            say!("First model name: {id}, first model id: {root}");
            (id, root)
        }
    };
    let samples = dataset::load(args, &client, &model).await?;
    let prefix = args.request_id_prefix.clone();
    let target = Target::new(client, &model, args);
    let load = Load {
        target,
        samples,
        delays_s: arrivals::delays_s(&args.arrivals, args.num_prompts, args.seed),
        max_concurrency: args.max_concurrency,
        id_prefix: prefix.unwrap_or_else(|| format!("bench-{}-", &Uuid::new_v4().simple().to_string()[..8])),
        progress: args.progress,
    };
    wait_until_ready(&load, args.ready_check_timeout_s).await?;
    if args.num_warmups > 0 {
        say!("Warming up with {} requests...", args.num_warmups);
        load.warm_up(args.num_warmups).await;
        say!("Warmup run completed.");
    }

    say!("Starting main benchmark run...");
    report::announce(args);
    let run = load.run().await;
    let metrics = Metrics::new(&run, &args.result);
    let floor = args
        .read_bandwidth
        .map(|bandwidth| floor::Floor::new(&root, bandwidth, &metrics));
    report::print(args, &metrics, floor.as_ref());
    report::save(args, &root, &run, &metrics, floor.as_ref())?;
    Ok(match metrics.completed {
        0 => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    })
}

async fn wait_until_ready(load: &Load, timeout_s: u64) -> anyhow::Result<()> {
    if timeout_s == 0 {
        say!("Skipping endpoint ready check.");
        return Ok(());
    }
    say!("Starting initial single prompt test run...");
    let end = Instant::now() + Duration::from_secs(timeout_s);
    loop {
        match load.try_first().await {
            None => {
                say!("Initial test run completed.");
                return Ok(());
            }
            Some(error) if Instant::now() >= end => bail!("the server is not ready after {timeout_s} s: {error}"),
            Some(_) => tokio::time::sleep(READY_PAUSE).await,
        }
    }
}
