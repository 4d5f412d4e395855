//! From a command line to the configuration: what the flags come to mean on a real checkpoint.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::{Invocation, parse};
use crate::backend::DType;
use crate::config::args::{Gpu, Machine, ServeArgs};
use crate::config::environment::Environment;
use crate::config::logging;
use crate::config::resolve::{ConfigError, resolve};
use crate::config::{Config, DeviceKind, LoadFormat, ModelFiles, ParserChoice, SchedulingPolicy};

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/compat-tests/goldens/tiny-moe/checkpoint");

fn environment(variables: &[(&str, &str)]) -> Environment {
    variables
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .collect()
}

fn cpu() -> Machine {
    Machine {
        cpu_threads: 6,
        gpus: Vec::new(),
    }
}

fn h200() -> Machine {
    Machine {
        cpu_threads: 6,
        gpus: vec![Gpu {
            name: "NVIDIA H200".into(),
            memory_bytes: 141 << 30,
        }],
    }
}

fn args(model: &str, line: &[&str]) -> ServeArgs {
    let argv: Vec<String> = ["serve", model].iter().chain(line).map(|s| s.to_string()).collect();
    match parse(&argv) {
        Ok(Invocation::Serve(args)) => args,
        other => panic!("{other:?}"),
    }
}

fn tiny(line: &[&str]) -> Config {
    resolve(&args(TINY, line), &environment(&[]), &cpu()).unwrap()
}

fn error(line: &[&str]) -> ConfigError {
    resolve(&args(TINY, line), &environment(&[]), &cpu()).unwrap_err()
}

/// A checkpoint folder with the given files.
fn checkpoint(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(directory.path().join(name), text).unwrap();
    }
    directory
}

fn at(directory: &Path, line: &[&str]) -> Result<Config, ConfigError> {
    resolve(&args(directory.to_str().unwrap(), line), &environment(&[]), &cpu())
}

#[test]
fn defaults_are_vllms() {
    let config = tiny(&[]);
    let Config {
        model,
        cache,
        scheduler,
        chat,
        server,
        observability,
        device,
    } = &config;
    assert_eq!(model.served_names, [TINY]);
    assert!(matches!(&model.files, ModelFiles::Directory(path) if path == Path::new(TINY)));
    assert_eq!((model.dtype, model.load_format), (DType::Bf16, LoadFormat::Safetensors));
    assert_eq!(
        (model.max_model_len, model.fit_max_model_len, model.vocab_size),
        (128_000, false, 2048)
    );
    assert_eq!(
        (model.eos_token_id, model.extra_eos_token_ids.len(), model.max_logprobs),
        (Some(1873), 0, 20)
    );
    assert_eq!(
        (cache.block_size, cache.memory_utilization, cache.prefix_caching),
        (16, 0.92, true)
    );
    assert_eq!((scheduler.max_num_batched_tokens, scheduler.max_num_seqs), (2048, 256));
    assert_eq!(
        (scheduler.policy, scheduler.chunked_prefill),
        (SchedulingPolicy::Fcfs, true)
    );
    assert!(chat.template.as_ref().is_some_and(|t| t.contains("<|im_start|>")));
    assert_eq!(
        (&chat.reasoning_parser, &chat.tool_parser),
        (&ParserChoice::Detect, &ParserChoice::Detect)
    );
    assert_eq!(
        (server.port, server.host.as_deref(), server.api_keys.len()),
        (8000, None, 0)
    );
    assert_eq!(
        (
            server.max_body_bytes,
            server.http.limits.keep_alive_s,
            observability.log_stats_interval
        ),
        (32 << 20, 5, Some(Duration::from_secs(10)))
    );
    assert_eq!((device.kind, device.threads), (DeviceKind::Cpu, 6));
}

#[test]
fn limits_depend_on_the_device() {
    let limits = |machine: &Machine, line: &[&str]| {
        let config = resolve(&args(TINY, line), &environment(&[]), machine).unwrap();
        (config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs)
    };
    assert_eq!(limits(&h200(), &[]), (8192, 1024));
    assert_eq!(limits(&h200(), &["--device", "cpu"]), (2048, 256));
    assert_eq!(limits(&h200(), &["--performance-mode", "throughput"]), (16384, 2048));
    assert_eq!(
        limits(&cpu(), &["--max-num-seqs", "4", "--max-model-len", "100"]),
        (400, 4)
    );
    assert_eq!(limits(&cpu(), &["--max-num-batched-tokens", "64"]), (64, 64));
    assert_eq!(
        limits(&cpu(), &["--no-enable-chunked-prefill", "--max-model-len", "4k"]),
        (4000, 256)
    );
    let a100 = Machine {
        gpus: vec![Gpu {
            name: "NVIDIA A100".into(),
            memory_bytes: 80 << 30,
        }],
        ..cpu()
    };
    assert_eq!(limits(&a100, &[]), (2048, 256));
    let b300 = Machine {
        gpus: vec![Gpu {
            name: "B300".into(),
            memory_bytes: 288 << 30,
        }],
        ..cpu()
    };
    assert_eq!(limits(&b300, &[]), (16384, 1024));
}

#[test]
fn a_gpu_bounds_the_logprobs() {
    let max = |machine: &Machine, asked: &str| {
        let args = args(TINY, &["--max-logprobs", asked]);
        resolve(&args, &environment(&[]), machine).unwrap().model.max_logprobs
    };
    for (asked, on_cpu, on_gpu) in [("20", 20, 20), ("128", 128, 128), ("129", 129, 128), ("-1", -1, 128)] {
        assert_eq!((max(&cpu(), asked), max(&h200(), asked)), (on_cpu, on_gpu), "{asked}");
    }
}

#[test]
fn contradictions_name_a_flag() {
    for (line, flag) in [
        (
            &["--max-num-batched-tokens", "8", "--max-num-seqs", "9"][..],
            "--max-num-batched-tokens",
        ),
        (
            &["--no-enable-chunked-prefill", "--max-num-batched-tokens", "1k"],
            "--max-num-batched-tokens",
        ),
        (&["--max-num-seqs", "0"], "--max-num-seqs"),
        (&["--max-num-queued-reqs", "-3"], "--max-num-queued-reqs"),
        (
            &["--long-prefill-token-threshold", "-1"],
            "--long-prefill-token-threshold",
        ),
        (
            &["--long-prefill-token-threshold", "1000000"],
            "--long-prefill-token-threshold",
        ),
        (&["--max-model-len", "0"], "--max-model-len"),
        (&["--max-model-len", "1M"], "--max-model-len"),
        (&["--block-size", "0"], "--block-size"),
        (&["--gpu-memory-utilization", "0"], "--gpu-memory-utilization"),
        (&["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization"),
        (&["--kv-cache-memory-bytes", "-1"], "--kv-cache-memory-bytes"),
        (&["--port", "70000"], "--port"),
        (&["--shutdown-timeout", "-1"], "--shutdown-timeout"),
        (&["--seed", "-5"], "--seed"),
        (&["--max-logprobs", "-2"], "--max-logprobs"),
        (&["--device", "cuda"], "--device"),
        (&["--device-ids", "a"], "--device-ids"),
        (&["--fingerprint-mode", "custom"], "--fingerprint-mode"),
        (&["--chat-template", "/nowhere.jinja"], "--chat-template"),
        (&["--generation-config", "/nowhere"], "--generation-config"),
        (
            &["--override-generation-config", r#"{"top_p": 7}"#],
            "--override-generation-config",
        ),
        (&["--hf-overrides", "callable"], "--hf-overrides"),
        (&["--tokenizer", "/nowhere"], "--tokenizer"),
    ] {
        assert_eq!(error(line).parameter, flag, "{line:?}");
    }
}

#[test]
fn dtypes_follow_the_checkpoint() {
    let dtype = |config: &str, line: &[&str]| {
        let directory = checkpoint(&[("config.json", config)]);
        at(directory.path(), line).map(|config| config.model.dtype)
    };
    let with = |fields: &str| format!(r#"{{"vocab_size": 8, "max_position_embeddings": 64 {fields}}}"#);
    assert_eq!(dtype(&with(r#", "torch_dtype": "float16""#), &[]).unwrap(), DType::F16);
    assert_eq!(dtype(&with(r#", "dtype": "float32""#), &[]).unwrap(), DType::Bf16);
    assert_eq!(dtype(&with(""), &[]).unwrap(), DType::Bf16);
    assert_eq!(dtype(&with(""), &["--dtype", "float"]).unwrap(), DType::F32);
    assert_eq!(dtype(&with(""), &["--dtype", "half"]).unwrap(), DType::F16);
    assert!(dtype(&with(r#", "dtype": "float8""#), &[]).is_err());
}

#[test]
fn context_lengths() {
    assert_eq!(tiny(&["--max-model-len", "2K"]).model.max_model_len, 2048);
    let fitted = tiny(&["--max-model-len", "auto"]).model;
    assert_eq!((fitted.max_model_len, fitted.fit_max_model_len), (128_000, true));
    let long = environment(&[("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")]);
    let config = resolve(&args(TINY, &["--max-model-len", "1M"]), &long, &cpu()).unwrap();
    assert_eq!(config.model.max_model_len, 1 << 20);
}

#[test]
fn generation_defaults_come_from_three_places() {
    let config = r#"{"vocab_size": 99, "max_position_embeddings": 64, "eos_token_id": [7, 8]}"#;
    let generation =
        r#"{"temperature": 0.2, "top_k": 80, "max_new_tokens": 5, "eos_token_id": [7, 9], "do_sample": true}"#;
    let directory = checkpoint(&[("config.json", config), ("generation_config.json", generation)]);
    let model = |line: &[&str]| at(directory.path(), line).unwrap().model;

    let auto = model(&[]);
    assert_eq!((auto.eos_token_id, auto.extra_eos_token_ids), (Some(7), vec![8, 9]));
    assert_eq!(
        (auto.generation_defaults.temperature, auto.generation_defaults.top_k),
        (Some(0.2), Some(80))
    );
    assert_eq!(
        (
            auto.generation_defaults.max_new_tokens,
            auto.generation_defaults.max_new_tokens_is_cap
        ),
        (Some(5), false)
    );

    let neutral = model(&["--generation-config", "vllm"]);
    assert_eq!(
        (neutral.generation_defaults.temperature, neutral.extra_eos_token_ids),
        (None, vec![8, 9])
    );

    let over = model(&[
        "--override-generation-config.max_new_tokens",
        "3",
        "--override-generation-config.top_p=0.5",
    ]);
    let defaults = over.generation_defaults;
    assert_eq!(
        (defaults.temperature, defaults.top_p, defaults.max_new_tokens),
        (Some(0.2), Some(0.5), Some(3))
    );
    assert!(defaults.max_new_tokens_is_cap);

    let folder = checkpoint(&[("generation_config.json", r#"{"max_new_tokens": 4}"#)]);
    let folder_defaults = model(&["--generation-config", folder.path().to_str().unwrap()]).generation_defaults;
    assert_eq!(
        (folder_defaults.max_new_tokens, folder_defaults.max_new_tokens_is_cap),
        (Some(4), true)
    );

    fs::write(
        directory.path().join("generation_config.json"),
        r#"{"temperature": "hot"}"#,
    )
    .unwrap();
    assert_eq!(
        at(directory.path(), &[]).unwrap_err().to_string(),
        "generation_config.json: temperature \"hot\" is out of range"
    );
}

#[test]
fn the_tokenizer_names_an_eos_when_the_config_does_not() {
    let directory = checkpoint(&[
        ("config.json", r#"{"vocab_size": 99, "max_position_embeddings": 64}"#),
        ("tokenizer_config.json", r#"{"eos_token": {"content": "<end>"}}"#),
        (
            "tokenizer.json",
            r#"{"added_tokens": [{"id": 42, "content": "<end>"}]}"#,
        ),
    ]);
    assert_eq!(at(directory.path(), &[]).unwrap().model.eos_token_id, Some(42));
}

#[test]
fn damaged_configs_are_errors() {
    for (config, expected) in [
        ("", "EOF"),
        ("[]", "is no JSON object"),
        (r#"{"max_position_embeddings": 9}"#, "vocab_size is missing"),
        (
            r#"{"vocab_size": -1, "max_position_embeddings": 9}"#,
            "vocab_size is -1",
        ),
        (
            r#"{"vocab_size": 1e30, "max_position_embeddings": 9}"#,
            "vocab_size is 1e",
        ),
        (
            r#"{"vocab_size": 9, "max_position_embeddings": 99999999999}"#,
            "max_position_embeddings is 99999999999",
        ),
        (
            r#"{"vocab_size": 9, "max_position_embeddings": 9, "eos_token_id": 9}"#,
            "eos_token_id 9 is no id",
        ),
        (
            r#"{"vocab_size": 9, "max_position_embeddings": 9, "eos_token_id": "x"}"#,
            "eos_token_id \"x\" is no id",
        ),
    ] {
        let directory = checkpoint(&[("config.json", config)]);
        let message = at(directory.path(), &[]).unwrap_err().to_string();
        assert!(message.contains(expected), "{config}: {message}");
    }
    let empty = checkpoint(&[]);
    assert!(
        at(empty.path(), &[])
            .unwrap_err()
            .to_string()
            .contains("config.json: the file does not exist")
    );
}

#[test]
fn overrides_merge_into_the_config() {
    let config = tiny(&[
        "--hf-overrides.rope_parameters.rope_theta",
        "5",
        "--hf-overrides.extra",
        "x",
    ]);
    let hf = &config.model.hf_config;
    assert_eq!(hf["rope_parameters"], json!({"rope_theta": 5, "rope_type": "default"}));
    assert_eq!(hf["extra"], json!("x"));
}

#[test]
fn chat_templates_have_an_order() {
    let config = ("config.json", r#"{"vocab_size": 9, "max_position_embeddings": 9}"#);
    let list = r#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
    let directory = checkpoint(&[config, ("tokenizer_config.json", list)]);
    let template = |line: &[&str]| at(directory.path(), line).unwrap().chat.template;
    assert_eq!(template(&[]).as_deref(), Some("D"));
    fs::write(directory.path().join("chat_template.jinja"), "J").unwrap();
    assert_eq!(template(&[]).as_deref(), Some("J"));
    assert_eq!(template(&["--chat-template", "{{ x }}"]).as_deref(), Some("{{ x }}"));
    let file = directory.path().join("own.jinja");
    fs::write(&file, "F").unwrap();
    assert_eq!(
        template(&["--chat-template", file.to_str().unwrap()]).as_deref(),
        Some("F")
    );
}

#[test]
fn keys_come_from_the_flag_or_the_environment() {
    let env = environment(&[("VLLM_API_KEY", "e")]);
    let keys = |line: &[&str]| resolve(&args(TINY, line), &env, &cpu()).unwrap().server.api_keys;
    assert_eq!(keys(&[]), ["e"]);
    assert_eq!(keys(&["--api-key", "a", "b"]), ["a", "b"]);
}

#[test]
fn parsers_may_be_off() {
    let chat = tiny(&[
        "--reasoning-parser",
        "None",
        "--tool-call-parser",
        "lfm2",
        "--enable-auto-tool-choice",
    ])
    .chat;
    assert_eq!(
        (chat.reasoning_parser, chat.tool_parser),
        (ParserChoice::Off, ParserChoice::Named("lfm2".into()))
    );
    assert!(chat.auto_tool_choice);
    assert_eq!(
        tiny(&["--tool-call-parser", "none"]).chat.tool_parser,
        ParserChoice::Off
    );
}

#[test]
fn fingerprints_have_modes() {
    let fingerprint = |line: &[&str]| tiny(line).server.fingerprint;
    let full = fingerprint(&[]).unwrap();
    let digits = full.strip_prefix("vllm-0.33.0-").unwrap();
    assert!(
        digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_hexdigit()),
        "{full}"
    );
    assert_eq!(fingerprint(&["--fingerprint-mode", "hash"]).as_deref(), Some(digits));
    assert_eq!(fingerprint(&["--fingerprint-mode", "none"]), None);
    assert_eq!(
        fingerprint(&["--fingerprint-mode", "custom", "--fingerprint-value", "x"]).as_deref(),
        Some("x")
    );
    assert_ne!(fingerprint(&["--dtype", "float32"]), Some(full));
}

#[test]
fn paths_and_logs_of_the_server() {
    let server = tiny(&[
        "--root-path",
        "p/",
        "--disable-access-log-for-endpoints",
        "/health, metrics",
    ])
    .server;
    assert_eq!((server.root_path.as_str(), server.access_log), ("/p", true));
    assert_eq!(server.access_log_excluded_paths, ["/health", "/metrics"]);
    assert!(!tiny(&["--uvicorn-log-level", "warning"]).server.access_log);
    assert!(!tiny(&["--disable-uvicorn-access-log"]).server.access_log);
}

#[test]
fn environment_variables_count() {
    let env = environment(&[
        ("VLLM_CPU_KVCACHE_SPACE", "0.5"),
        ("VLLM_LOG_STATS_INTERVAL", "2.5"),
        ("VLLM_HTTP_MAX_REQUEST_BODY_SIZE", "1000"),
        ("OMP_NUM_THREADS", "3"),
    ]);
    let config = resolve(&args(TINY, &[]), &env, &cpu()).unwrap();
    assert_eq!(config.cache.memory_bytes, Some(1 << 29));
    assert_eq!(
        (
            config.observability.log_stats_interval,
            config.server.max_body_bytes,
            config.device.threads
        ),
        (Some(Duration::from_millis(2500)), 1000, 3)
    );
    let bad = environment(&[("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "soon")]);
    assert_eq!(
        resolve(&args(TINY, &[]), &bad, &cpu()).unwrap_err().parameter,
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
    );
}

#[test]
fn models_are_found_or_named() {
    let cache = tempfile::tempdir().unwrap();
    let env = environment(&[("HF_HOME", cache.path().to_str().unwrap()), ("HF_HUB_OFFLINE", "1")]);
    let find = |model: &str, line: &[&str]| resolve(&args(model, line), &env, &cpu()).map(|config| config.model);
    let message = |model: &str| find(model, &[]).unwrap_err().to_string();
    assert!(
        message("org/model").contains("is not in the cache"),
        "{}",
        message("org/model")
    );
    assert!(message("/no/such/dir").contains("the directory /no/such/dir does not exist"));
    assert!(message(&format!("{TINY}/config.json")).contains("is a file"));
    assert!(message("a b").contains("no hub id"));
    assert_eq!(find("", &[]).unwrap_err().parameter, "model_tag");

    let commit = "0123456789abcdef0123456789abcdef01234567";
    let root = cache.path().join("hub/models--org--model");
    fs::create_dir_all(root.join("refs")).unwrap();
    fs::create_dir_all(root.join("snapshots").join(commit)).unwrap();
    fs::write(root.join("refs/main"), commit).unwrap();
    fs::copy(
        Path::new(TINY).join("config.json"),
        root.join("snapshots").join(commit).join("config.json"),
    )
    .unwrap();
    assert!(message("org/model").contains("lacks model.safetensors"));
    let model = find(
        "org/model",
        &["--load-format", "dummy", "--served-model-name", "a", "b"],
    )
    .unwrap();
    assert_eq!(
        (model.load_format, model.served_names.join(",")),
        (LoadFormat::Dummy, "a,b".into())
    );
    assert_eq!(find("org/model", &["--hf-token"]).unwrap_err().parameter, "--hf-token");
}

#[test]
fn log_levels_have_an_order() {
    let level = |line: &[&str], variables: &[(&str, &str)]| {
        logging::resolve(&args("m", line).logging, &environment(variables)).map(|config| config.level)
    };
    assert_eq!(level(&[], &[]).unwrap(), Some(tracing::Level::INFO));
    assert_eq!(
        level(&[], &[("VLLM_LOGGING_LEVEL", "debug")]).unwrap(),
        Some(tracing::Level::DEBUG)
    );
    assert_eq!(
        level(&["--log-level", "ERROR"], &[("VLLM_LOGGING_LEVEL", "debug")]).unwrap(),
        Some(tracing::Level::ERROR)
    );
    assert_eq!(
        level(&["--logging-config.log_level", "WARNING"], &[]).unwrap(),
        Some(tracing::Level::WARN)
    );
    assert_eq!(
        level(&["--logging-config.configure_logging", "false"], &[]).unwrap(),
        None
    );
    assert_eq!(
        level(&[], &[("VLLM_LOGGING_LEVEL", "loud")]).unwrap_err().parameter,
        "VLLM_LOGGING_LEVEL"
    );
    assert!(level(&["--logging-config.formatter", "json"], &[]).is_err());
    assert!(level(&["--logging-config.nothing", "1"], &[]).is_err());
}
