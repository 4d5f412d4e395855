//! `rvllm serve … --dry-run`: what a command line would do, without a device and without weights.
//!
//! The numbers are those of the real start: the same resolution of flags and the same memory plan. What may differ is the
//! device's free memory, of which a driver keeps some.

use std::fmt::Write;
use std::process::ExitCode;

use serde::Serialize;

use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::config::args::{DeviceChoice, DryRun, Effect, Gpu, Machine, Notice, ServeArgs};
use crate::config::{CacheConfig, Config, DeviceKind, ServerConfig};
use crate::model::cost::ModelCost;
use crate::model::registry::read_config;
use crate::runner::MemoryPlan;
use crate::serve::memory::{self, grouped};

use super::print;

/// Everything that is printed, in the JSON's form.
#[derive(Debug, Serialize)]
struct Report<'a> {
    model: Model<'a>,
    device: Device<'a>,
    memory: Memory,
    limits: Limits,
    server: Server<'a>,
    flags: Vec<Flag<'a>>,
    notices: Vec<&'a str>,
}

#[derive(Debug, Serialize)]
struct Model<'a> {
    name: &'a str,
    served_model_names: &'a [String],
    architecture: Option<&'a str>,
    dtype: String,
    parameters: u64,
    /// Parameters that a decode step of one sequence reads.
    active_parameter_bytes: u64,
    vocab_size: usize,
}

#[derive(Debug, Serialize)]
struct Device<'a> {
    /// `cpu` or `cuda:0`.
    kind: String,
    name: Option<&'a str>,
    memory_bytes: usize,
    /// The memory was given with --dry-run-device-memory.
    assumed: bool,
    threads: usize,
}

#[derive(Debug, Serialize)]
struct Memory {
    utilization: f64,
    usable_bytes: usize,
    weight_bytes: usize,
    workspace_bytes: usize,
    conv_bytes: usize,
    conv_slots: usize,
    sampler_bytes: usize,
    kv_bytes: usize,
    kv_dtype: String,
    kv_bytes_per_token: usize,
    num_blocks: usize,
    block_size: usize,
    kv_tokens: usize,
    /// Sequences of the whole context that the cache holds at once.
    max_concurrency: f64,
}

#[derive(Debug, Serialize)]
struct Limits {
    max_model_len: usize,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    max_queued_requests: Option<usize>,
    max_queued_tokens: Option<usize>,
    prefix_caching: bool,
    chunked_prefill: bool,
}

#[derive(Debug, Serialize)]
struct Server<'a> {
    host: &'a str,
    port: u16,
    root_path: &'a str,
    api_keys: usize,
    max_body_bytes: usize,
    shutdown_timeout_s: u64,
}

#[derive(Debug, Serialize)]
struct Flag<'a> {
    flag: &'a str,
    value: &'a str,
    /// `honoured`, `unchanged`, `no effect` or `refused`.
    here: &'static str,
    text: &'a str,
}

/// The machine that a dry run plans for: the real one, or one with a device of the assumed memory.
pub fn machine(args: &ServeArgs, real: Machine) -> Machine {
    match args.dry_run_device_memory {
        Some(memory_bytes) if args.device != DeviceChoice::Cpu => Machine {
            gpus: vec![Gpu {
                name: "assumed".to_owned(),
                memory_bytes,
            }],
            ..real
        },
        _ => real,
    }
}

/// Prints the plan. The exit code is 1 when a flag is refused.
///
/// # Errors
/// The model does not fit, or its configuration is none that is known.
pub fn run(
    mut config: Config,
    args: &ServeArgs,
    machine: &Machine,
    notices: &[Notice],
    form: DryRun,
) -> anyhow::Result<ExitCode> {
    let device_bytes = device_bytes(&config, args, machine)?;
    let plan = memory::plan(&mut config, device_bytes)?;
    let report = report(&config, args, machine, notices, &plan)?;
    print(&match form {
        DryRun::Json => serde_json::to_string_pretty(&report)? + "\n",
        DryRun::Text => text(&report, &plan),
    });
    let refused = args.given.iter().any(|flag| flag.effect == Effect::Refused);
    Ok(if refused { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn device_bytes(config: &Config, args: &ServeArgs, machine: &Machine) -> anyhow::Result<usize> {
    let bytes = match (config.device.kind, args.dry_run_device_memory) {
        (_, Some(bytes)) => usize::try_from(bytes)?,
        (DeviceKind::Cpu, None) => CpuBackend::new(1, config.model.dtype).memory_bytes()?,
        (DeviceKind::Cuda { .. }, None) => match machine.gpu(config.device.kind) {
            Some(gpu) => usize::try_from(gpu.memory_bytes)?,
            None => anyhow::bail!("--dry-run: the device's memory is unknown; use --dry-run-device-memory"),
        },
    };
    Ok(bytes)
}

fn report<'a>(
    config: &'a Config,
    args: &'a ServeArgs,
    machine: &'a Machine,
    notices: &'a [Notice],
    plan: &MemoryPlan,
) -> anyhow::Result<Report<'a>> {
    let Config {
        model,
        cache,
        scheduler,
        server,
        device,
        ..
    } = config;
    let CacheConfig { kv_dtype, .. } = cache;
    let kv_dtype = kv_dtype.unwrap_or(model.dtype);
    let cost = ModelCost::new(&read_config(&model.hf_config)?, model.dtype, kv_dtype);
    let ServerConfig {
        host, port, root_path, ..
    } = server;
    Ok(Report {
        model: Model {
            name: &model.name,
            served_model_names: &model.served_names,
            architecture: model
                .hf_config
                .pointer("/architectures/0")
                .and_then(|name| name.as_str()),
            dtype: model.dtype.to_string(),
            parameters: cost.parameters,
            active_parameter_bytes: cost.decode_weight_bytes(1) as u64,
            vocab_size: model.vocab_size,
        },
        device: Device {
            kind: match device.kind {
                DeviceKind::Cpu => "cpu".to_owned(),
                DeviceKind::Cuda { ordinal } => format!("cuda:{ordinal}"),
            },
            name: machine.gpu(device.kind).map(|gpu| gpu.name.as_str()),
            memory_bytes: plan.device_bytes,
            assumed: args.dry_run_device_memory.is_some(),
            threads: device.threads,
        },
        memory: Memory {
            utilization: plan.utilization,
            usable_bytes: (plan.device_bytes as f64 * plan.utilization) as usize,
            weight_bytes: plan.weight_bytes,
            workspace_bytes: plan.workspace_bytes,
            conv_bytes: plan.conv_bytes,
            conv_slots: scheduler.max_num_seqs,
            sampler_bytes: plan.sampler_bytes,
            kv_bytes: plan.kv_bytes,
            kv_dtype: kv_dtype.to_string(),
            kv_bytes_per_token: plan.kv_bytes_per_token,
            num_blocks: plan.num_blocks,
            block_size: plan.block_size,
            kv_tokens: plan.largest_model_len(),
            max_concurrency: plan.largest_model_len() as f64 / plan.max_model_len.max(1) as f64,
        },
        limits: Limits {
            max_model_len: model.max_model_len,
            max_num_seqs: scheduler.max_num_seqs,
            max_num_batched_tokens: scheduler.max_num_batched_tokens,
            max_queued_requests: scheduler.max_queued_requests,
            max_queued_tokens: scheduler.max_queued_tokens,
            prefix_caching: cache.prefix_caching,
            chunked_prefill: scheduler.chunked_prefill,
        },
        server: Server {
            host: host.as_deref().unwrap_or("0.0.0.0"),
            port: *port,
            root_path,
            api_keys: server.api_keys.len(),
            max_body_bytes: server.max_body_bytes,
            shutdown_timeout_s: server.shutdown_timeout_s,
        },
        flags: args
            .given
            .iter()
            .map(|given| Flag {
                flag: &given.flag,
                value: &given.value,
                here: match given.effect {
                    Effect::Honoured => "honoured",
                    Effect::Unchanged => "unchanged",
                    Effect::Accepted => "no effect",
                    Effect::Refused => "refused",
                },
                text: &given.text,
            })
            .collect(),
        notices: notices
            .iter()
            .map(|notice| match notice {
                Notice::Info(text) | Notice::Warning(text) => text.as_str(),
            })
            .collect(),
    })
}

/// The report for people.
fn text(report: &Report, plan: &MemoryPlan) -> String {
    let Report {
        model,
        device,
        memory,
        limits,
        server,
        flags,
        notices,
    } = report;
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(out, "{name:<20} {value}");
    };
    let billions = model.parameters as f64 / 1e9;
    line(
        "model",
        format!("{} ({billions:.2} B parameters, {})", model.name, model.dtype),
    );
    line("served as", model.served_model_names.join(", "));
    let assumed = if device.assumed { ", memory assumed" } else { "" };
    line(
        "device",
        format!("{} {}{assumed}", device.kind, device.name.unwrap_or_default()).replace(" ,", ","),
    );
    line("context", format!("{} tokens", grouped(limits.max_model_len)));
    line(
        "a step",
        format!(
            "{} sequences, {} tokens",
            limits.max_num_seqs,
            grouped(limits.max_num_batched_tokens)
        ),
    );
    line(
        "maximum concurrency",
        format!(
            "{:.2} sequences of {} tokens",
            memory.max_concurrency,
            grouped(limits.max_model_len)
        ),
    );
    let queue = match limits.max_queued_requests {
        Some(requests) => format!("{requests} requests"),
        None => "unbounded".to_owned(),
    };
    line("queue", queue);
    line(
        "address",
        format!("http://{}:{}{}", server.host, server.port, server.root_path),
    );
    line("API keys", server.api_keys.to_string());
    let _ = writeln!(out, "\n{plan}\n  conv slots  {:>12}", memory.conv_slots);
    if device.kind != "cpu" {
        out +=
            "The driver's context, the kernels and the CUDA graphs are not in the plan: they take of what is left.\n";
    }

    if !flags.is_empty() {
        out += "\nflags\n";
        for flag in flags {
            let value = if flag.value.is_empty() {
                String::new()
            } else {
                format!(" {}", flag.value)
            };
            let _ = writeln!(
                out,
                "  {:<10} {}{value}\n             {}",
                flag.here, flag.flag, flag.text
            );
        }
    }
    if !notices.is_empty() {
        out += "\nnotices\n";
        for notice in notices {
            let _ = writeln!(out, "  {notice}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{self, Invocation};
    use crate::config::environment::Environment;
    use crate::config::resolve::resolve;

    fn planned(line: &str) -> (Config, ServeArgs, Machine, MemoryPlan) {
        let argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let Ok(Invocation::Serve(args)) = cli::parse(&argv) else {
            panic!("{line}")
        };
        let real = Machine {
            cpu_threads: 4,
            gpus: Vec::new(),
        };
        let machine = machine(&args, real);
        let mut config = resolve(&args, &Environment::default(), &machine).unwrap();
        let bytes = device_bytes(&config, &args, &machine).unwrap();
        let plan = memory::plan(&mut config, bytes).unwrap();
        (config, args, machine, plan)
    }

    #[test]
    fn an_assumed_gpu_needs_none() {
        let (config, args, machine, plan) = planned(
            "serve demo --dry-run=json --dry-run-device-memory 80G --max-num-seqs 8 --enable-lora --api-key s3cret",
        );
        assert_eq!(config.device.kind, DeviceKind::Cuda { ordinal: 0 });
        let notices = [Notice::Warning("careful".into())];
        let report = report(&config, &args, &machine, &notices, &plan).unwrap();
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["device"]["memory_bytes"], 80u64 << 30);
        assert_eq!(json["device"]["assumed"], true);
        assert_eq!(json["memory"]["conv_slots"], 8);
        assert_eq!(json["memory"]["num_blocks"], plan.num_blocks);
        let parts = [
            "weight_bytes",
            "workspace_bytes",
            "conv_bytes",
            "sampler_bytes",
            "kv_bytes",
        ];
        let used: u64 = parts.iter().map(|part| json["memory"][part].as_u64().unwrap()).sum();
        assert!(used <= json["memory"]["usable_bytes"].as_u64().unwrap());
        let by_name = |name: &str| {
            let flags = json["flags"].as_array().unwrap();
            flags.iter().find(|flag| flag["flag"] == name).unwrap().clone()
        };
        assert_eq!(by_name("--enable-lora")["here"], "refused");
        assert_eq!(by_name("--max-num-seqs")["here"], "honoured");
        assert_eq!(json["notices"][0], "careful");

        let text = text(&report, &plan);
        for part in [
            "conv slots",
            "KV cache",
            "--enable-lora true",
            "maximum concurrency",
            "memory assumed",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("s3cret") && !json.to_string().contains("s3cret"));
    }

    #[test]
    fn the_host_can_be_assumed_too() {
        let (config, .., plan) = planned("serve demo --dry-run --device cpu --dry-run-device-memory 2G");
        assert_eq!((config.device.kind, plan.device_bytes), (DeviceKind::Cpu, 2 << 30));
    }
}
