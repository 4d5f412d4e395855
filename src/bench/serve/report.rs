//! The table and the JSON, as `vllm bench serve` has them.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::{Map, Value, json};

use super::floor::Floor;
use super::load::Run;
use super::metrics::Metrics;
use crate::commands::{print as print_text, say};
use crate::config::args::BenchServeArgs;

/// Failures that are printed.
const MAX_ERRORS: usize = 10;
/// Width of the table.
const WIDTH: usize = 50;

/// What will be sent.
pub fn announce(args: &BenchServeArgs) {
    let arrivals = &args.arrivals;
    match &arrivals.ramp {
        Some(ramp) => {
            let strategy = if ramp.exponential { "exponential" } else { "linear" };
            say!("Traffic ramp-up strategy: {strategy}.");
            say!(
                "Will increase RPS from {} to {} RPS over the duration of the benchmark.",
                ramp.start_rps,
                ramp.end_rps
            );
        }
        None => say!("Traffic request rate: {}", rate(arrivals.rate)),
    }
    let distribution = if arrivals.burstiness == 1.0 {
        "Poisson process"
    } else {
        "Gamma distribution"
    };
    say!("Burstiness factor: {} ({distribution})", arrivals.burstiness);
    let concurrency = args.max_concurrency.map_or("None".to_owned(), |n| n.to_string());
    say!("Maximum request concurrency: {concurrency}");
}

fn rate(rate: Option<f64>) -> String {
    rate.map_or("inf".to_owned(), |rate| rate.to_string())
}

/// Prints the failures and the table.
pub fn print(args: &BenchServeArgs, metrics: &Metrics, floor: Option<&Floor>) {
    print_text(&table(args, metrics, floor));
}

/// Prints up to [`MAX_ERRORS`] failures.
fn failures(run: &Run) -> String {
    let errors: Vec<&String> = run
        .outcomes
        .iter()
        .filter_map(|outcome| outcome.error.as_ref())
        .collect();
    if errors.is_empty() {
        return String::new();
    }
    let mut out = format!("Failed requests during benchmark run detected (capping to {MAX_ERRORS}):\n");
    for (i, error) in errors.into_iter().take(MAX_ERRORS).enumerate() {
        let _ = writeln!(out, "Error {i}: {error}");
    }
    out
}

fn table(args: &BenchServeArgs, metrics: &Metrics, floor: Option<&Floor>) -> String {
    let mut out = format!("{:=^WIDTH$}\n", " Serving Benchmark Result ");
    let count = |out: &mut String, name: &str, value: usize| {
        let _ = writeln!(out, "{name:<40} {value:<10}");
    };
    let number = |out: &mut String, name: &str, value: f64| {
        let _ = writeln!(out, "{name:<40} {value:<10.2}");
    };
    count(&mut out, "Successful requests:", metrics.completed);
    count(&mut out, "Failed requests:", metrics.failed);
    if let Some(limit) = args.max_concurrency {
        count(&mut out, "Maximum request concurrency:", limit);
    }
    if let Some(rate) = args.arrivals.rate {
        number(&mut out, "Request rate configured (RPS):", rate);
    }
    number(&mut out, "Benchmark duration (s):", metrics.duration_s);
    count(&mut out, "Total input tokens:", metrics.total_input);
    count(&mut out, "Total generated tokens:", metrics.total_output);
    number(&mut out, "Request throughput (req/s):", metrics.request_throughput());
    if let Some(goodput) = metrics.goodput {
        number(&mut out, "Request goodput (req/s):", goodput);
    }
    number(
        &mut out,
        "Output token throughput (tok/s):",
        metrics.output_throughput(),
    );
    number(
        &mut out,
        "Peak output token throughput (tok/s):",
        metrics.peak_output_per_s,
    );
    number(&mut out, "Peak concurrent requests:", metrics.peak_concurrent as f64);
    number(&mut out, "Total token throughput (tok/s):", metrics.total_throughput());
    number(&mut out, "Client processor time (s):", metrics.client_cpu_s);
    for figure in &metrics.figures {
        let _ = writeln!(out, "{:-^WIDTH$}", figure.heading);
        number(&mut out, &format!("Mean {} (ms):", figure.name), figure.summary.mean);
        number(
            &mut out,
            &format!("Median {} (ms):", figure.name),
            figure.summary.median,
        );
        for (percent, value) in &figure.summary.percentiles {
            number(&mut out, &format!("P{percent} {} (ms):", figure.name), *value);
        }
    }
    match floor {
        None => {}
        Some(Floor::Unknown(reason)) => {
            let _ = writeln!(out, "{:-^WIDTH$}\nnot computed: {reason}", "Floor");
        }
        Some(Floor::Known {
            tpot_ms,
            share_of_tpot,
            output_per_s,
            bytes_per_step,
            bandwidth,
        }) => {
            let _ = writeln!(out, "{:-^WIDTH$}", "Floor");
            number(&mut out, "Mean requests in flight:", metrics.mean_concurrent);
            number(&mut out, "Bytes of a decode step (GB):", bytes_per_step / 1e9);
            number(&mut out, "Read bandwidth (GB/s):", bandwidth / 1e9);
            number(&mut out, "Floor of TPOT (ms):", *tpot_ms);
            number(&mut out, "Floor of TPOT (% of the median):", share_of_tpot * 100.0);
            number(&mut out, "Floor of output throughput (tok/s):", *output_per_s);
        }
    }
    out + &"=".repeat(WIDTH) + "\n"
}

/// Writes the JSON, if it is asked for.
///
/// # Errors
/// The file cannot be written.
pub fn save(
    args: &BenchServeArgs,
    model: &str,
    run: &Run,
    metrics: &Metrics,
    floor: Option<&Floor>,
) -> anyhow::Result<()> {
    eprint!("{}", failures(run));
    let wanted = &args.result;
    if !wanted.save && !wanted.append {
        return Ok(());
    }
    let date = chrono::Local::now().format("%Y%m%d-%H%M%S").to_string();
    let path = path(args, model, &date);
    let failed = || format!("the result cannot be written to {}", path.display());
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).with_context(failed)?;
    }
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .write(true)
        .append(wanted.append)
        .truncate(!wanted.append)
        .open(&path)
        .with_context(failed)?;
    let line_break = if file.metadata().with_context(failed)?.len() > 0 {
        "\n"
    } else {
        ""
    };
    let text = Value::Object(result(args, model, run, metrics, floor, &date));
    file.write_all(format!("{line_break}{text}").as_bytes())
        .with_context(failed)
}

/// `{label}-{rate}qps[-concurrency{n}]-{model}-{date}.json`.
fn path(args: &BenchServeArgs, model: &str, date: &str) -> PathBuf {
    let label = args.result.label.as_deref().unwrap_or(&args.backend);
    let concurrency = args
        .max_concurrency
        .map_or(String::new(), |n| format!("-concurrency{n}"));
    let base = model.rsplit('/').next().unwrap_or(model);
    let traffic = match &args.arrivals.ramp {
        Some(ramp) => {
            let strategy = if ramp.exponential { "exponential" } else { "linear" };
            format!("ramp-up-{strategy}-{}qps-{}qps", ramp.start_rps, ramp.end_rps)
        }
        None => format!("{}qps", rate(args.arrivals.rate)),
    };
    let name = args.result.filename.clone();
    let name = name.unwrap_or_else(|| format!("{label}-{traffic}{concurrency}-{base}-{date}.json"));
    args.result.directory.clone().unwrap_or_default().join(name)
}

fn result(
    args: &BenchServeArgs,
    model: &str,
    run: &Run,
    metrics: &Metrics,
    floor: Option<&Floor>,
    date: &str,
) -> Map<String, Value> {
    let mut out = Map::new();
    let mut put = |key: &str, value: Value| {
        out.insert(key.to_owned(), value);
    };
    put("date", json!(date));
    put("endpoint_type", json!(args.backend));
    put("backend", json!(args.backend));
    put("label", json!(args.result.label));
    put("model_id", json!(model));
    put("tokenizer_id", json!(model));
    put("num_prompts", json!(args.num_prompts));
    for (key, value) in &args.result.metadata {
        put(key, json!(value));
    }
    put(
        "request_rate",
        args.arrivals.rate.map_or(json!("inf"), |rate| json!(rate)),
    );
    put("burstiness", json!(args.arrivals.burstiness));
    put("max_concurrency", json!(args.max_concurrency));
    put("duration", json!(metrics.duration_s));
    put("completed", json!(metrics.completed));
    put("failed", json!(metrics.failed));
    put("total_input_tokens", json!(metrics.total_input));
    put("total_output_tokens", json!(metrics.total_output));
    put("request_throughput", json!(metrics.request_throughput()));
    put("request_goodput", json!(metrics.goodput));
    put("output_throughput", json!(metrics.output_throughput()));
    put("total_token_throughput", json!(metrics.total_throughput()));
    put("max_output_tokens_per_s", json!(metrics.peak_output_per_s));
    put("max_concurrent_requests", json!(metrics.peak_concurrent));
    put("client_processor_s", json!(metrics.client_cpu_s));
    for figure in &metrics.figures {
        let key = figure.key;
        put(&format!("mean_{key}_ms"), json!(figure.summary.mean));
        put(&format!("median_{key}_ms"), json!(figure.summary.median));
        put(&format!("std_{key}_ms"), json!(figure.summary.std));
        for (percent, value) in &figure.summary.percentiles {
            put(&format!("p{percent}_{key}_ms"), json!(value));
        }
    }
    if let Some(floor) = floor {
        put("floor", floor.to_json());
    }
    if args.result.detailed {
        let each = |f: &dyn Fn(&super::load::Outcome) -> Value| Value::from_iter(run.outcomes.iter().map(f));
        put("input_lens", each(&|o| json!(o.prompt_tokens)));
        put("output_lens", each(&|o| json!(o.output_tokens)));
        put("start_times", each(&|o| json!(o.start_s)));
        put("queue_times", each(&|o| json!(o.queue_s)));
        put("ttfts", each(&|o| json!(o.ttft_s)));
        put("itls", each(&|o| json!(o.itl_s)));
        put("latencies", each(&|o| json!(o.latency_s)));
        put("generated_texts", each(&|o| json!(o.text)));
        put("errors", each(&|o| json!(o.error.as_deref().unwrap_or_default())));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::load::Outcome;
    use super::*;
    use crate::cli::{self, Invocation};

    fn args(line: &str) -> BenchServeArgs {
        let argv: Vec<String> = format!("bench serve {line}")
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        match cli::parse(&argv) {
            Ok(Invocation::BenchServe(args)) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn run() -> Run {
        let outcome = Outcome {
            prompt_tokens: 10,
            output_tokens: 3,
            ttft_s: 0.25,
            itl_s: vec![0.25, 0.5],
            latency_s: 1.0,
            ..Outcome::default()
        };
        let failed = Outcome {
            error: Some("503: busy".into()),
            ..Outcome::default()
        };
        Run {
            outcomes: vec![outcome, failed],
            duration_s: 2.0,
            client_cpu_s: 0.01,
        }
    }

    #[test]
    fn the_table_is_vllms() {
        let args = args("--max-concurrency 4 --request-rate 8 --percentile-metrics ttft --metric-percentiles 50,99.9");
        let metrics = Metrics::new(&run(), &args.result);
        let floor = Floor::Known {
            tpot_ms: 75.0,
            share_of_tpot: 0.2,
            output_per_s: 13.0,
            bytes_per_step: 3e9,
            bandwidth: 4e10,
        };
        insta::assert_snapshot!(table(&args, &metrics, Some(&floor)), @r"
        ============ Serving Benchmark Result ============
        Successful requests:                     1         
        Failed requests:                         1         
        Maximum request concurrency:             4         
        Request rate configured (RPS):           8.00      
        Benchmark duration (s):                  2.00      
        Total input tokens:                      10        
        Total generated tokens:                  3         
        Request throughput (req/s):              0.50      
        Output token throughput (tok/s):         1.50      
        Peak output token throughput (tok/s):    2.00      
        Peak concurrent requests:                1.00      
        Total token throughput (tok/s):          6.50      
        Client processor time (s):               0.01      
        ---------------Time to First Token----------------
        Mean TTFT (ms):                          250.00    
        Median TTFT (ms):                        250.00    
        P50 TTFT (ms):                           250.00    
        P99.9 TTFT (ms):                         250.00    
        ----------------------Floor-----------------------
        Mean requests in flight:                 0.50      
        Bytes of a decode step (GB):             3.00      
        Read bandwidth (GB/s):                   40.00     
        Floor of TPOT (ms):                      75.00     
        Floor of TPOT (% of the median):         20.00     
        Floor of output throughput (tok/s):      13.00     
        ==================================================
        ");
        assert_eq!(
            failures(&run()),
            "Failed requests during benchmark run detected (capping to 10):\nError 0: 503: busy\n"
        );
    }

    #[test]
    fn the_json_has_vllms_keys_and_is_appended() {
        let directory = tempfile::tempdir().unwrap();
        let line = format!(
            "--append-result --save-detailed --result-dir {} --metadata run=1",
            directory.path().display()
        );
        let mut args = args(&line);
        args.result.filename = Some("r.json".into());
        let metrics = Metrics::new(&run(), &args.result);
        for _ in 0..2 {
            save(&args, "org/m", &run(), &metrics, None).unwrap();
        }
        let text = std::fs::read_to_string(directory.path().join("r.json")).unwrap();
        let saved: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(saved.len(), 2);
        assert_eq!(
            (&saved[0]["run"], &saved[0]["request_rate"], &saved[0]["completed"]),
            (&json!("1"), &json!("inf"), &json!(1))
        );
        assert_eq!(
            (&saved[0]["median_ttft_ms"], &saved[0]["p99_itl_ms"]),
            (&json!(250.0), &json!(497.5))
        );
        assert_eq!(saved[0]["itls"][0], json!([0.25, 0.5]));
        assert_eq!(saved[0]["errors"], json!(["", "503: busy"]));
    }

    #[test]
    fn file_names_are_vllms() {
        let name = |line: &str| path(&args(line), "org/model", "DATE").display().to_string();
        assert_eq!(name(""), "openai-infqps-model-DATE.json");
        assert_eq!(
            name("--request-rate 2.5 --max-concurrency 8 --label x"),
            "x-2.5qps-concurrency8-model-DATE.json"
        );
        assert_eq!(
            name("--ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 5 --result-dir d"),
            "d/openai-ramp-up-linear-1qps-5qps-model-DATE.json"
        );
    }
}
