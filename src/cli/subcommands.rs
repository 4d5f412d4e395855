//! The flags of the subcommands beside `serve`, as typed, and the rules between them.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::command::Values;
use super::normalize::{Normalized, Occurrence};
use super::table::{Command, Kind, TABLE};
use super::{CliError, Invocation, serve_args};
use crate::config::args::{
    Arrivals, BenchArgs, BenchKind, BenchServeArgs, BenchStartupArgs, ChatArgs, ClientArgs, CompleteArgs, Dataset,
    DeviceChoice, Effect, Ramp, ResultArgs, RunBatchArgs,
};

/// Reads a subcommand other than `serve`.
///
/// # Errors
/// A flag is refused, a value is out of range, flags contradict one another, or a required one is absent.
pub(super) fn invocation(command: Command, normalized: Normalized, values: &Values) -> Result<Invocation, CliError> {
    if !command.runs_engine() {
        check_standalone(&normalized, values)?;
    }
    match command {
        Command::Chat => Ok(Invocation::Chat(ChatArgs {
            client: client(values)?,
            system_prompt: values.get("system_prompt").as_str().map(str::to_owned),
        })),
        Command::Complete => Ok(Invocation::Complete(CompleteArgs {
            client: client(values)?,
            max_tokens: optional_count("--max-tokens", values.get("max_tokens"))?
                .map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
        })),
        Command::CollectEnv => Ok(Invocation::CollectEnv),
        Command::BenchServe => bench_serve(values).map(|args| Invocation::BenchServe(Box::new(args))),
        Command::BenchStartup => bench_startup(command, normalized, values).map(Invocation::BenchStartup),
        Command::RunBatch => run_batch(command, normalized, values).map(Invocation::RunBatch),
        Command::BenchLatency | Command::BenchThroughput | Command::Serve => {
            bench(command, normalized, values).map(Invocation::Bench)
        }
    }
}

/// What [`serve_args`] checks for subcommands that run the engine. Notices are not worth a line here: there is no log.
fn check_standalone(normalized: &Normalized, values: &Values) -> Result<(), CliError> {
    if !normalized.positionals.is_empty() {
        let rest = normalized.positionals.join(" ");
        return Err(CliError::Usage(format!("unrecognized arguments: {rest}")));
    }
    let refused = values
        .judge(normalized)
        .into_iter()
        .find(|flag| flag.effect == Effect::Refused);
    refused.map_or(Ok(()), |flag| Err(CliError::Refused(flag.text)))
}

fn at_least(flag: &str, value: i64, least: usize) -> Result<usize, CliError> {
    let count = usize::try_from(value).ok().filter(|v| *v >= least);
    count.ok_or_else(|| CliError::Usage(format!("argument {flag}: {value} is less than {least}")))
}

/// A count of at least 1 that may be absent.
fn optional_count(flag: &str, value: &Value) -> Result<Option<usize>, CliError> {
    value.as_i64().map(|n| at_least(flag, n, 1)).transpose()
}

fn out_of_range(flag: &str, value: impl std::fmt::Display, range: &str) -> CliError {
    CliError::Usage(format!("argument {flag}: {value} is not {range}"))
}

fn positive(flag: &str, value: f64) -> Result<f64, CliError> {
    match value > 0.0 {
        true => Ok(value),
        false => Err(out_of_range(flag, value, "positive")),
    }
}

/// `KEY=VALUE` pairs.
fn pairs(flag: &str, items: Option<Vec<String>>) -> Result<Vec<(String, String)>, CliError> {
    let pair = |item: String| match item.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.trim().to_owned())),
        _ => Err(CliError::Usage(format!("argument {flag}: '{item}' is not KEY=VALUE"))),
    };
    items.unwrap_or_default().into_iter().map(pair).collect()
}

fn client(values: &Values) -> Result<ClientArgs, CliError> {
    #[derive(Deserialize)]
    struct Flags {
        url: String,
        model_name: Option<String>,
        api_key: Option<String>,
        quick: Option<String>,
        stats: bool,
    }
    let flags: Flags = values.group()?;
    Ok(ClientArgs {
        url: flags.url.trim_end_matches('/').to_owned(),
        model_name: flags.model_name,
        api_key: flags.api_key,
        quick: flags.quick.filter(|text| !text.is_empty()),
        stats: flags.stats,
    })
}

fn run_batch(command: Command, normalized: Normalized, values: &Values) -> Result<RunBatchArgs, CliError> {
    let required = |dest: &str, flag: &str| {
        let given = values.get(dest).as_str().filter(|text| !text.is_empty());
        let missing = || CliError::Usage(format!("the following arguments are required: {flag}"));
        given.map(str::to_owned).ok_or_else(missing)
    };
    Ok(RunBatchArgs {
        input_file: required("input_file", "-i/--input-file")?,
        output_file: required("output_file", "-o/--output-file")?,
        output_tmp_dir: values.get("output_tmp_dir").as_str().map(str::to_owned),
        engine: serve_args(command, normalized, values)?,
    })
}

fn bench(command: Command, normalized: Normalized, values: &Values) -> Result<BenchArgs, CliError> {
    #[derive(Deserialize)]
    struct Flags {
        input_len: Option<i64>,
        output_len: Option<i64>,
        n: i64,
        output_json: Option<PathBuf>,
        peak_flops: Option<f64>,
        #[serde(default)]
        batch_size: i64,
        #[serde(default)]
        num_iters_warmup: i64,
        #[serde(default)]
        num_iters: i64,
        #[serde(default)]
        num_prompts: i64,
    }
    let flags: Flags = values.group()?;
    let (kind, default_input_len) = match command {
        Command::BenchThroughput => {
            let num_prompts = at_least("--num-prompts", flags.num_prompts, 1)?;
            (BenchKind::Throughput { num_prompts }, 1024)
        }
        _ => {
            let kind = BenchKind::Latency {
                batch_size: at_least("--batch-size", flags.batch_size, 1)?,
                num_iters_warmup: at_least("--num-iters-warmup", flags.num_iters_warmup, 0)?,
                num_iters: at_least("--num-iters", flags.num_iters, 1)?,
            };
            (kind, 32)
        }
    };
    Ok(BenchArgs {
        kind,
        input_len: at_least("--input-len", flags.input_len.unwrap_or(default_input_len), 1)?,
        output_len: at_least("--output-len", flags.output_len.unwrap_or(128), 1)?,
        n: at_least("--n", flags.n, 1)?,
        output_json: flags.output_json,
        peak_flops: flags.peak_flops.map(|n| positive("--peak-flops", n)).transpose()?,
        engine: serve_args(command, normalized, values)?,
    })
}

fn bench_startup(command: Command, normalized: Normalized, values: &Values) -> Result<BenchStartupArgs, CliError> {
    #[derive(Deserialize)]
    struct Flags {
        num_iters_cold: i64,
        num_iters_warmup: i64,
        num_iters_warm: i64,
        output_json: Option<PathBuf>,
    }
    let flags: Flags = values.group()?;
    let device = normalized.device;
    let occurrences: Vec<Occurrence> = normalized.occurrences.clone();
    let engine = serve_args(command, normalized, values)?;
    let serve_argv = serve_argv(&engine.model, &occurrences, device);
    Ok(BenchStartupArgs {
        num_iters_cold: at_least("--num-iters-cold", flags.num_iters_cold, 0)?,
        num_iters_warmup: at_least("--num-iters-warmup", flags.num_iters_warmup, 0)?,
        num_iters_warm: at_least("--num-iters-warm", flags.num_iters_warm, 0)?,
        output_json: flags.output_json,
        engine,
        serve_argv,
    })
}

/// The command line of a server with these flags; host and port are the caller's.
fn serve_argv(model: &Option<String>, occurrences: &[Occurrence], device: DeviceChoice) -> Vec<String> {
    let mut argv: Vec<String> = std::iter::once("serve".to_owned()).chain(model.clone()).collect();
    let is_of_serve = |o: &&Occurrence| TABLE.serve.iter().any(|flag| flag.name() == o.flag.name());
    for occurrence in occurrences.iter().filter(is_of_serve) {
        let name = occurrence.flag.name();
        match (occurrence.flag.kind, occurrence.values.as_slice()) {
            // Named or chosen by the caller; the server is asked over plain TCP.
            _ if matches!(name, "--model" | "--config" | "--host" | "--port" | "--uds") || name.contains("ssl") => {}
            (Kind::Bool | Kind::Switch, [value]) if value == "false" => argv.push(format!("--no-{}", &name[2..])),
            (Kind::Bool | Kind::Switch, _) | (_, []) => argv.push(name.to_owned()),
            (_, [value]) => argv.push(format!("{name}={value}")),
            (_, several) => argv.extend(std::iter::once(name.to_owned()).chain(several.iter().cloned())),
        }
    }
    match device {
        DeviceChoice::Auto => {}
        DeviceChoice::Cpu => argv.push("--device=cpu".to_owned()),
        DeviceChoice::Cuda => argv.push("--device=cuda".to_owned()),
    }
    argv
}

#[derive(Deserialize)]
struct BenchServeFlags {
    backend: String,
    label: Option<String>,
    base_url: Option<String>,
    host: String,
    port: i64,
    endpoint: Option<String>,
    header: Option<Vec<String>>,
    max_concurrency: Option<i64>,
    model: Option<String>,
    served_model_name: Option<String>,
    logprobs: Option<i64>,
    request_rate: Option<f64>,
    burstiness: f64,
    ramp_up_strategy: Option<String>,
    ramp_up_start_rps: Option<i64>,
    ramp_up_end_rps: Option<i64>,
    ready_check_timeout_sec: i64,
    num_warmups: i64,
    ignore_eos: bool,
    extra_body: Option<Value>,
    request_id_prefix: Option<String>,
    disable_tqdm: bool,
    read_bandwidth: Option<f64>,
    seed: i64,
    num_prompts: i64,
    dataset_name: String,
    dataset_path: Option<PathBuf>,
    input_len: Option<i64>,
    output_len: Option<i64>,
    random_input_len: i64,
    random_output_len: i64,
    random_range_ratio: f64,
    random_prefix_len: i64,
    sharegpt_output_len: Option<i64>,
    custom_output_len: i64,
    prefix_repetition_prefix_len: i64,
    prefix_repetition_suffix_len: i64,
    prefix_repetition_num_prefixes: i64,
    prefix_repetition_output_len: i64,
    disable_shuffle: bool,
    no_oversample: bool,
    percentile_metrics: Option<String>,
    metric_percentiles: String,
    goodput: Option<Vec<String>>,
    save_result: bool,
    save_detailed: bool,
    append_result: bool,
    metadata: Option<Vec<String>>,
    result_dir: Option<PathBuf>,
    result_filename: Option<String>,
}

fn bench_serve(values: &Values) -> Result<BenchServeArgs, CliError> {
    let flags: BenchServeFlags = values.group()?;
    let dataset = dataset(&flags)?;
    let arrivals = arrivals(&flags)?;
    let result = result(&flags)?;
    let chat = flags.backend == "openai-chat";
    let default_endpoint = if chat {
        "/v1/chat/completions"
    } else {
        "/v1/completions"
    };
    let endpoint = flags.endpoint.as_deref().unwrap_or(default_endpoint);
    let host = match flags.host.contains(':') && !flags.host.starts_with('[') {
        true => format!("[{}]", flags.host),
        false => flags.host.clone(),
    };
    let base_url = flags
        .base_url
        .unwrap_or_else(|| format!("http://{host}:{}", flags.port));
    let extra_body = match flags.extra_body {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(object)) => object,
        Some(other) => {
            return Err(CliError::Usage(format!(
                "argument --extra-body: {other} is no JSON object"
            )));
        }
    };
    let sampled = [
        "top_p",
        "top_k",
        "min_p",
        "temperature",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
    ];
    let given = sampled
        .map(|name| (name, values.get(name)))
        .into_iter()
        .filter(|(_, value)| !value.is_null());
    Ok(BenchServeArgs {
        chat,
        base_url: base_url.trim_end_matches('/').to_owned(),
        endpoint: format!("/{}", endpoint.trim_start_matches('/')),
        headers: pairs("--header", flags.header)?,
        model: flags.model,
        served_model_name: flags.served_model_name,
        num_prompts: at_least("--num-prompts", flags.num_prompts, 1)?,
        ignore_eos: flags.ignore_eos || matches!(dataset, Dataset::Random { .. }),
        dataset,
        seed: flags.seed as u64,
        arrivals,
        max_concurrency: flags
            .max_concurrency
            .map(|n| at_least("--max-concurrency", n, 1))
            .transpose()?,
        logprobs: flags.logprobs,
        sampling: given.map(|(name, value)| (name.to_owned(), value.clone())).collect(),
        extra_body,
        request_id_prefix: flags.request_id_prefix,
        ready_check_timeout_s: at_least("--ready-check-timeout-sec", flags.ready_check_timeout_sec, 0)? as u64,
        num_warmups: at_least("--num-warmups", flags.num_warmups, 0)?,
        progress: !flags.disable_tqdm,
        read_bandwidth: flags
            .read_bandwidth
            .map(|n| positive("--read-bandwidth", n))
            .transpose()?,
        result,
        backend: flags.backend,
    })
}

fn dataset(flags: &BenchServeFlags) -> Result<Dataset, CliError> {
    let output_len = flags.output_len.map(|n| at_least("--output-len", n, 1)).transpose()?;
    let path = || {
        let missing = || CliError::Usage(format!("argument --dataset-path: {} needs a file", flags.dataset_name));
        flags.dataset_path.clone().ok_or_else(missing)
    };
    if matches!(flags.dataset_name.as_str(), "random" | "prefix_repetition") && flags.dataset_path.is_some() {
        let name = &flags.dataset_name;
        return Err(CliError::Usage(format!(
            "argument --dataset-path: {name} reads no file; use sharegpt or custom"
        )));
    }
    let (shuffle, oversample) = (!flags.disable_shuffle, !flags.no_oversample);
    match flags.dataset_name.as_str() {
        "sharegpt" => Ok(Dataset::ShareGpt {
            path: path()?,
            output_len: match output_len {
                Some(n) => Some(n),
                None => flags
                    .sharegpt_output_len
                    .map(|n| at_least("--sharegpt-output-len", n, 1))
                    .transpose()?,
            },
            shuffle,
            oversample,
        }),
        "custom" => Ok(Dataset::Custom {
            path: path()?,
            output_len: output_len.map_or_else(|| at_least("--custom-output-len", flags.custom_output_len, 1), Ok)?,
            shuffle,
            oversample,
        }),
        "prefix_repetition" => Ok(Dataset::PrefixRepetition {
            prefix_len: at_least("--prefix-repetition-prefix-len", flags.prefix_repetition_prefix_len, 0)?,
            suffix_len: at_least("--prefix-repetition-suffix-len", flags.prefix_repetition_suffix_len, 1)?,
            num_prefixes: at_least(
                "--prefix-repetition-num-prefixes",
                flags.prefix_repetition_num_prefixes,
                1,
            )?,
            output_len: output_len.map_or_else(
                || at_least("--prefix-repetition-output-len", flags.prefix_repetition_output_len, 1),
                Ok,
            )?,
        }),
        _ => {
            let ratio = flags.random_range_ratio;
            if !(0.0..1.0).contains(&ratio) {
                return Err(out_of_range("--random-range-ratio", ratio, "in [0, 1)"));
            }
            Ok(Dataset::Random {
                input_len: at_least(
                    "--random-input-len",
                    flags.input_len.unwrap_or(flags.random_input_len),
                    1,
                )?,
                output_len: output_len
                    .map_or_else(|| at_least("--random-output-len", flags.random_output_len, 1), Ok)?,
                range_ratio: ratio,
                prefix_len: at_least("--random-prefix-len", flags.random_prefix_len, 0)?,
            })
        }
    }
}

fn arrivals(flags: &BenchServeFlags) -> Result<Arrivals, CliError> {
    let ramp = match flags.ramp_up_strategy.as_deref() {
        None => None,
        Some(_) if flags.request_rate.is_some() => {
            let message = "argument --request-rate: not with --ramp-up-strategy, which sets the rate";
            return Err(CliError::Usage(message.into()));
        }
        Some(strategy) => {
            let exponential = strategy == "exponential";
            let (Some(start), Some(end)) = (flags.ramp_up_start_rps, flags.ramp_up_end_rps) else {
                let message = "argument --ramp-up-strategy: needs --ramp-up-start-rps and --ramp-up-end-rps";
                return Err(CliError::Usage(message.into()));
            };
            // A rate of 0 would never send the first request.
            if start < 1 || start > end {
                return Err(out_of_range("--ramp-up-start-rps", start, &format!("from 1 to {end}")));
            }
            Some(Ramp {
                exponential,
                start_rps: start as f64,
                end_rps: end as f64,
            })
        }
    };
    Ok(Arrivals {
        rate: flags.request_rate.map(|n| positive("--request-rate", n)).transpose()?,
        burstiness: positive("--burstiness", flags.burstiness)?,
        ramp,
    })
}

/// Metrics that may get percentiles.
const METRICS: [&str; 6] = [
    "ttft",
    "tpot",
    "itl",
    "e2el",
    "client_queue_time",
    "e2el_including_client_queue",
];

fn result(flags: &BenchServeFlags) -> Result<ResultArgs, CliError> {
    let listed = |text: &str| -> Vec<String> {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        items.map(str::to_owned).collect()
    };
    let metrics = listed(flags.percentile_metrics.as_deref().unwrap_or("ttft,tpot,itl"));
    if let Some(metric) = metrics.iter().find(|metric| !METRICS.contains(&metric.as_str())) {
        return Err(CliError::Usage(format!(
            "argument --percentile-metrics: invalid choice: '{metric}' (choose from {})",
            METRICS.join(", ")
        )));
    }
    let percentile = |text: String| {
        let number = text.parse::<f64>().ok().filter(|p| (0.0..=100.0).contains(p));
        number.ok_or_else(|| out_of_range("--metric-percentiles", format!("'{text}'"), "from 0 to 100"))
    };
    let goodput = |item: &String| {
        let parsed = item
            .split_once(':')
            .and_then(|(name, ms)| Some((name, ms.parse::<f64>().ok()?)));
        match parsed {
            Some((name, ms)) if matches!(name, "ttft" | "tpot" | "e2el") && ms >= 0.0 => Ok((name.to_owned(), ms)),
            _ => Err(CliError::Usage(format!(
                "argument --goodput: '{item}' is not ttft:MS, tpot:MS or e2el:MS"
            ))),
        }
    };
    Ok(ResultArgs {
        label: flags.label.clone(),
        percentile_metrics: metrics,
        percentiles: listed(&flags.metric_percentiles)
            .into_iter()
            .map(percentile)
            .collect::<Result<_, _>>()?,
        goodput_ms: flags.goodput.iter().flatten().map(goodput).collect::<Result<_, _>>()?,
        save: flags.save_result,
        detailed: flags.save_detailed,
        append: flags.append_result,
        metadata: pairs("--metadata", flags.metadata.clone())?,
        directory: flags.result_dir.clone(),
        filename: flags.result_filename.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    fn run(line: &str) -> Result<Invocation, CliError> {
        parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    fn bench(line: &str) -> BenchServeArgs {
        match run(&format!("bench serve {line}")) {
            Ok(Invocation::BenchServe(args)) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn usage(line: &str) -> String {
        match run(line) {
            Err(CliError::Usage(message)) => message,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn refused(line: &str) -> String {
        match run(line) {
            Err(CliError::Refused(message)) => message,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn bench_serve_has_vllms_defaults() {
        let args = bench("--model m");
        assert_eq!(
            (args.base_url.as_str(), args.endpoint.as_str()),
            ("http://127.0.0.1:8000", "/v1/completions")
        );
        assert_eq!(
            (args.num_prompts, args.max_concurrency, args.ignore_eos),
            (1000, None, true)
        );
        assert_eq!(
            args.dataset,
            Dataset::Random {
                input_len: 1024,
                output_len: 128,
                range_ratio: 0.0,
                prefix_len: 0
            }
        );
        assert_eq!(
            args.arrivals,
            Arrivals {
                rate: None,
                burstiness: 1.0,
                ramp: None
            }
        );
        assert_eq!(args.result.percentile_metrics, ["ttft", "tpot", "itl"]);
        assert_eq!(args.result.percentiles, [99.0]);
        assert!(args.sampling.is_empty() && args.extra_body.is_empty());
    }

    #[test]
    fn bench_serve_reads_its_flags() {
        let args = bench(
            "--backend openai-chat --host ::1 --port 9 --request-rate 2.5 --burstiness 0.5 --max-concurrency 4 --header a=b c=d=e \
             --temperature 0 --top-k 5 --extra-body.chat_template_kwargs.enable_thinking false --goodput ttft:100 e2el:2000 \
             --percentile-metrics ttft,e2el --metric-percentiles 50,99.9 --metadata run=1 --input-len 7 --output-len 9",
        );
        assert_eq!(
            (args.base_url.as_str(), args.endpoint.as_str()),
            ("http://[::1]:9", "/v1/chat/completions")
        );
        assert_eq!((args.arrivals.rate, args.arrivals.burstiness), (Some(2.5), 0.5));
        assert_eq!(args.headers, [("a".into(), "b".into()), ("c".into(), "d=e".into())]);
        assert_eq!(
            Value::Object(args.sampling),
            serde_json::json!({"top_k": 5, "temperature": 0.0})
        );
        assert_eq!(args.extra_body["chat_template_kwargs"]["enable_thinking"], false);
        assert_eq!(
            args.result.goodput_ms,
            [("ttft".into(), 100.0), ("e2el".into(), 2000.0)]
        );
        assert_eq!(args.result.percentiles, [50.0, 99.9]);
        assert!(matches!(
            args.dataset,
            Dataset::Random {
                input_len: 7,
                output_len: 9,
                ..
            }
        ));
        assert_eq!(bench("--request-rate inf").arrivals.rate, None);
        let ramp = bench("--ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 5")
            .arrivals
            .ramp;
        assert_eq!(
            ramp,
            Some(Ramp {
                exponential: false,
                start_rps: 1.0,
                end_rps: 5.0
            })
        );
        let repeated = bench("--dataset-name prefix_repetition --output-len 3");
        assert!(!repeated.ignore_eos);
        assert!(matches!(
            repeated.dataset,
            Dataset::PrefixRepetition {
                num_prefixes: 10,
                output_len: 3,
                ..
            }
        ));
    }

    #[test]
    fn wrong_values_are_named() {
        for (line, expected) in [
            ("bench serve --max-concurrency 0", "--max-concurrency: 0 is less than 1"),
            ("bench serve --request-rate 0", "--request-rate: 0 is not positive"),
            ("bench serve --burstiness -1", "--burstiness: -1 is not positive"),
            (
                "bench serve --random-range-ratio 1",
                "--random-range-ratio: 1 is not in [0, 1)",
            ),
            ("bench serve --percentile-metrics x", "'x' (choose from ttft"),
            ("bench serve --metric-percentiles 101", "'101' is not from 0 to 100"),
            ("bench serve --goodput itl:3", "'itl:3' is not ttft:MS"),
            ("bench serve --header x", "'x' is not KEY=VALUE"),
            ("bench serve --dataset-name sharegpt", "sharegpt needs a file"),
            ("bench serve --dataset-path x", "random reads no file"),
            ("bench serve --extra-body [1]", "no JSON object"),
            ("bench serve --ramp-up-strategy linear", "needs --ramp-up-start-rps"),
            (
                "bench serve --ramp-up-strategy linear --request-rate 1",
                "sets the rate",
            ),
            ("bench serve x", "unrecognized arguments: x"),
            ("bench serve --max-num-seqs 4", "unrecognized arguments: --max-num-seqs"),
            ("bench serve -O3", "unrecognized arguments: -O3"),
            ("bench latency --batch-size 0", "--batch-size: 0 is less than 1"),
            ("chat hello", "unrecognized arguments: hello"),
            ("chat --device cpu", "unrecognized arguments: --device"),
            ("complete --max-tokens 0", "--max-tokens: 0 is less than 1"),
            ("run-batch --model demo", "required: -i/--input-file"),
            ("run-batch --model demo -i x", "required: -o/--output-file"),
            ("bench latency --model demo --dry-run", "--dry-run is for serve"),
        ] {
            let message = usage(line);
            assert!(message.contains(expected), "{line}: {message}");
        }
        assert!(refused("bench serve --profile").starts_with("--profile is not supported: "));
        assert!(refused("bench serve --backend vllm-pooling").contains("only generation is measured"));
        assert!(refused("bench serve --dataset-name sonnet").contains("use custom"));
        assert!(refused("run-batch -i a -o b --enable-metrics").contains("serves no port"));
    }

    #[test]
    fn clients_have_vllms_flags() {
        let Ok(Invocation::Chat(chat)) = run("chat -q hello --system-prompt short --url http://h/v1/") else {
            panic!()
        };
        assert_eq!(
            (chat.client.quick.as_deref(), chat.system_prompt.as_deref()),
            (Some("hello"), Some("short"))
        );
        assert_eq!((chat.client.url.as_str(), chat.client.stats), ("http://h/v1", false));
        let Ok(Invocation::Complete(args)) = run("complete --max-tokens 5 --api-key k --stats") else {
            panic!()
        };
        assert_eq!(
            (args.max_tokens, args.client.url.as_str()),
            (Some(5), "http://localhost:8000/v1")
        );
        assert!(args.client.stats && args.client.quick.is_none());
        assert!(matches!(run("collect-env"), Ok(Invocation::CollectEnv)));
        assert!(matches!(run("chat --help"), Ok(Invocation::Print(text)) if text.contains("--system-prompt")));
    }

    #[test]
    fn a_batch_has_the_engine_flags() {
        let line = "run-batch -i in.jsonl -o out.jsonl --model demo --max-num-seqs 4 --url x --port 9";
        let Ok(Invocation::RunBatch(args)) = run(line) else {
            panic!()
        };
        assert_eq!(
            (args.input_file.as_str(), args.output_file.as_str()),
            ("in.jsonl", "out.jsonl")
        );
        assert_eq!(
            (args.engine.model.as_deref(), args.engine.scheduler.max_num_seqs),
            (Some("demo"), Some(4))
        );
    }

    #[test]
    fn a_start_is_repeated_with_the_same_flags() {
        let line = "bench startup --model demo --num-iters-cold 0 --max-num-seqs 4 --no-enable-prefix-caching --port 7 \
                    --served-model-name a b --enforce-eager --device cpu --num-iters-warm 2";
        let Ok(Invocation::BenchStartup(args)) = run(line) else {
            panic!()
        };
        assert_eq!(
            (args.num_iters_cold, args.num_iters_warmup, args.num_iters_warm),
            (0, 1, 2)
        );
        let argv = args.serve_argv.join(" ");
        assert_eq!(
            argv,
            "serve demo --max-num-seqs=4 --no-enable-prefix-caching --served-model-name a b --enforce-eager --device=cpu"
        );
        assert!(matches!(parse(&args.serve_argv), Ok(Invocation::Serve(_))));
    }
}
