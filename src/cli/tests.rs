//! One test per parsing rule, and one over every flag of the table.

use serde_json::{Value, json};

use super::command::Values;
use super::normalize::normalize;
use super::table::{Command, FlagSet, Kind, SUBCOMMAND_FLAGS, TABLE, Tier, Verdict};
use super::values::human_int;
use super::{CliError, Invocation, parse, render_error};
use crate::config::args::{BenchKind, DeviceChoice, DryRun, Effect, Notice, ServeArgs};

fn argv(line: &[&str]) -> Vec<String> {
    line.iter().map(|s| s.to_string()).collect()
}

/// `rvllm serve m <line>`.
fn serve(line: &[&str]) -> Result<ServeArgs, CliError> {
    match parse(&argv(&[&["serve", "m"], line].concat()))? {
        Invocation::Serve(args) => Ok(args),
        other => panic!("{other:?}"),
    }
}

fn usage_error(line: &[&str]) -> String {
    match serve(line) {
        Err(CliError::Usage(message)) => message,
        other => panic!("expected a usage error, got {other:?}"),
    }
}

fn refusal(line: &[&str]) -> String {
    match serve(line) {
        Err(CliError::Refused(message)) => message,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

/// The value that `line` gives the flag `dest`, without the table's verdict.
fn value(line: &[&str], dest: &str) -> Value {
    let set = FlagSet::new(Command::Serve);
    let normalized = normalize(&set, &argv(line)).unwrap();
    Values::read(&set, &normalized).unwrap().get(dest).clone()
}

#[test]
fn every_flag_takes_its_default_and_a_value() {
    let set = FlagSet::new(Command::Serve);
    for flag in set.iter().filter(|f| !f.is_positional() && f.kind != Kind::Help) {
        let dest = flag.dest();
        assert_eq!(value(&[], &dest), flag.default, "{dest}: default");
        for spelling in &flag.flags {
            let (text, expected) = match (flag.choices.last(), flag.kind) {
                (_, Kind::Bool | Kind::Switch) => (None, json!(flag.bool_value(spelling))),
                (Some(choice), _) => (
                    Some(choice.as_str().map_or(choice.to_string(), str::to_owned)),
                    choice.clone(),
                ),
                (None, Kind::Int) => (Some("7".to_owned()), json!(7)),
                (None, Kind::Float | Kind::FloatOrInf) => (Some("0.5".to_owned()), json!(0.5)),
                (None, Kind::HumanInt | Kind::HumanIntOrAuto) => (Some("2k".to_owned()), json!(2000)),
                (None, Kind::Json | Kind::JsonOrStr) => (Some(r#"{"a": [1, "b"]}"#.to_owned()), json!({"a": [1, "b"]})),
                (None, Kind::Str | Kind::Help) => (Some("some text".to_owned()), json!("some text")),
            };
            let expected = if flag.is_list() { json!([expected]) } else { expected };
            let line: Vec<&str> = std::iter::once(spelling.as_str()).chain(text.as_deref()).collect();
            assert_eq!(value(&line, &dest), expected, "{line:?}");
        }
    }
}

#[test]
fn the_table_is_consistent() {
    assert_eq!(TABLE.serve.len(), 322);
    for flag in TABLE.serve.iter().chain(SUBCOMMAND_FLAGS.iter()) {
        assert!(!flag.text.is_empty(), "{}", flag.name());
        assert_eq!(
            flag.otherwise.is_some(),
            flag.here == Verdict::Honoured && flag.allow.is_some(),
            "{}",
            flag.name()
        );
    }
    for command in Command::ALL {
        let set = FlagSet::new(command);
        let mut spellings: Vec<&String> = set.iter().flat_map(|f| &f.flags).collect();
        let all = spellings.len();
        spellings.sort();
        spellings.dedup();
        assert_eq!(spellings.len(), all, "a spelling occurs twice for {}", command.path());
    }
}

proptest::proptest! {
    #[test]
    fn no_command_line_panics(tokens in proptest::collection::vec(token(), 0..8)) {
        let line: Vec<String> = std::iter::once("serve".to_owned()).chain(tokens).collect();
        if let Err(error) = parse(&line) {
            proptest::prop_assert!(render_error(&line, &error).contains("error: "));
        }
    }

    #[test]
    fn suffixed_integers_are_products(number in -1_000_000_000i64..1_000_000_000, power in 0usize..5) {
        for (suffixes, base) in [(["", "k", "m", "g", "t"], 1000i64), (["", "K", "M", "G", "T"], 1024)] {
            let expected = number.checked_mul(base.pow(power as u32));
            proptest::prop_assert_eq!(human_int(&format!("{number}{}", suffixes[power])).ok(), expected);
        }
    }
}

/// Pieces of command lines: real flags, halves of them, values, noise.
fn token() -> impl proptest::strategy::Strategy<Value = String> {
    use proptest::prelude::*;
    let spellings: Vec<String> = TABLE
        .serve
        .iter()
        .flat_map(|f| f.flags.clone())
        .filter(|f| f != "--config")
        .collect();
    let spelling = proptest::sample::select(spellings);
    prop_oneof![
        spelling.clone(),
        (spelling.clone(), 0usize..30).prop_map(|(s, n)| s.chars().take(n).collect()),
        (spelling.clone(), "[a-z.+]{0,6}", ".{0,4}").prop_map(|(s, path, value)| format!("{s}.{path}={value}")),
        (spelling, ".{0,6}").prop_map(|(s, value)| format!("{s}={value}")),
        "[0-9.]{1,4}[kKmMgGtT]?",
        "-?.{0,6}",
    ]
}

#[test]
fn underscores_are_dashes_before_the_first_dot() {
    assert_eq!(
        serve(&["--max_model_len", "64"]).unwrap().model_args.max_model_len,
        Some(64)
    );
    assert_eq!(
        serve(&["--gpu_memory-utilization=0.5"])
            .unwrap()
            .cache
            .gpu_memory_utilization,
        0.5
    );
    let kwargs = serve(&["--default_chat_template_kwargs.enable_thinking", "false"]).unwrap();
    assert_eq!(
        kwargs.frontend.default_chat_template_kwargs.unwrap()["enable_thinking"],
        json!(false)
    );
}

#[test]
fn unambiguous_prefixes_are_accepted() {
    assert_eq!(serve(&["--max-num-se", "3"]).unwrap().scheduler.max_num_seqs, Some(3));
    let message = usage_error(&["--max-num-b", "3", "--enable-p"]);
    assert!(
        message.starts_with("ambiguous option: --enable-p could match --enable-prompt-tokens-details, "),
        "{message}"
    );
}

#[test]
fn booleans_have_their_opposites() {
    for (spelling, expected) in [
        ("--enable-prefix-caching", true),
        ("--no-enable-prefix-caching", false),
        ("--disable-prefix-caching", false),
    ] {
        assert_eq!(
            serve(&[spelling]).unwrap().cache.enable_prefix_caching,
            Some(expected),
            "{spelling}"
        );
    }
    for (spelling, expected) in [
        ("--disable-uvicorn-access-log", true),
        ("--no-disable-uvicorn-access-log", false),
        ("--enable-uvicorn-access-log", false),
    ] {
        assert_eq!(
            serve(&[spelling]).unwrap().frontend.disable_uvicorn_access_log,
            expected,
            "{spelling}"
        );
    }
    assert!(serve(&["--disable-log-requests"]).is_ok());
    assert_eq!(
        serve(&["--enable-chunked-prefill=False"])
            .unwrap()
            .scheduler
            .enable_chunked_prefill,
        Some(false)
    );
    assert_eq!(
        serve(&["--no-enable-chunked-prefill=False"])
            .unwrap()
            .scheduler
            .enable_chunked_prefill,
        Some(true)
    );
    assert!(usage_error(&["--enable-lora=maybe"]).contains("ignored explicit argument 'maybe'"));
}

#[test]
fn json_flags_take_dotted_values() {
    let object = |line: &[&str]| value(line, "compilation_config");
    assert_eq!(object(&["--compilation-config", r#"{"mode": 3}"#]), json!({"mode": 3}));
    assert_eq!(object(&["-cc.mode", "3"]), json!({"mode": 3}));
    assert_eq!(
        object(&["-cc.pass_config.fuse=true", "-cc.backend", "x"]),
        json!({"pass_config": {"fuse": true}, "backend": "x"})
    );
    assert_eq!(
        object(&["-cc.custom_ops+", "a", "-cc.custom_ops+=b,c"]),
        json!({"custom_ops": ["a", "b", "c"]})
    );
    assert_eq!(
        object(&["-cc.size", "2K", "-cc.sizes", "[1, 2k]"]),
        json!({"size": 2048, "sizes": [1, 2000]})
    );
    assert!(usage_error(&["--port.x", "3"]).contains("unrecognized arguments: --port.x"));
    assert!(usage_error(&["-cc.a", "1", "-cc.a.b", "2"]).contains("already has a value"));
}

#[test]
fn repeated_dotted_keys_warn() {
    let args = serve(&["--hf-overrides.a", "1", "--hf-overrides.a", "2"]).unwrap();
    assert_eq!(args.model_args.hf_overrides, json!({"a": 2}));
    assert!(matches!(&args.notices[0], Notice::Warning(text) if text.starts_with("--hf-overrides.a is given more")));
}

#[test]
fn integers_have_suffixes() {
    for (text, expected) in [
        ("1k", 1000),
        ("1K", 1024),
        ("25.6k", 25600),
        ("2M", 2 << 20),
        ("1.5g", 1_500_000_000),
        ("7", 7),
    ] {
        assert_eq!(
            serve(&["--max-num-batched-tokens", text])
                .unwrap()
                .scheduler
                .max_num_batched_tokens,
            Some(expected)
        );
    }
    assert!(usage_error(&["--max-num-batched-tokens", "1.5K"]).contains("decimals are not allowed"));
    assert!(usage_error(&["--max-num-batched-tokens", "9223372036854775807T"]).contains("too large"));
    for text in ["k", "1q", "1kk", ".k", "١k", "1e3k"] {
        assert!(
            usage_error(&["--max-num-batched-tokens", text]).contains("invalid human_readable_int"),
            "{text}"
        );
    }
    assert_eq!(
        serve(&["--max-model-len", "auto"]).unwrap().model_args.max_model_len,
        Some(-1)
    );
    assert_eq!(
        serve(&["--max-model-len", "-1"]).unwrap().model_args.max_model_len,
        Some(-1)
    );
    assert_eq!(
        value(
            &["--hf-overrides", r#"{"a": 1k, "b": "1k", "c": [2K]}"#],
            "hf_overrides"
        ),
        json!({"a": 1000, "b": "1k", "c": [2048]})
    );
}

#[test]
fn optional_values_may_be_none() {
    for text in ["", "None"] {
        assert_eq!(serve(&["--host", text]).unwrap().frontend.host, None);
        assert_eq!(
            value(&["--speculative-config", text], "speculative_config"),
            Value::Null
        );
        assert!(serve(&["--speculative-config", text]).is_ok());
    }
    assert_eq!(
        serve(&["--response-role", "None"]).unwrap().frontend.response_role,
        "None"
    );
}

#[test]
fn optimization_levels_have_a_short_form() {
    for line in [&["-O3"][..], &["-O=3"], &["-O", "3"], &["--optimization-level", "3"]] {
        assert_eq!(value(line, "optimization_level"), json!("3"), "{line:?}");
    }
    assert!(usage_error(&["-O"]).contains("expected one argument"));
}

#[test]
fn short_flags_have_several_letters() {
    for line in [&["-tp", "2"][..], &["-tp=2"], &["-t", "2"]] {
        assert_eq!(value(line, "tensor_parallel_size"), json!(2), "{line:?}");
    }
    assert_eq!(value(&["-n2"], "nnodes"), json!(2));
    assert_eq!(value(&["-qawq"], "quantization"), json!("awq"));
    assert!(usage_error(&["-d", "2"]).starts_with("ambiguous option: -d could match "));
}

#[test]
fn the_last_of_a_repeated_flag_counts() {
    let args = serve(&["--port", "1", "--api-key", "a", "b", "--port=2", "--api-key", "c"]).unwrap();
    assert_eq!((args.frontend.port, args.frontend.api_key), (2, Some(argv(&["c"]))));
    let warnings = args.notices.iter().filter(|n| matches!(n, Notice::Warning(_))).count();
    assert_eq!(warnings, 2);
    assert_eq!(
        value(&["--middleware", "a", "--middleware", "b"], "middleware"),
        json!(["a", "b"])
    );
}

#[test]
fn lists_end_at_the_next_flag() {
    let args = serve(&["--served-model-name", "a", "b", "--port", "3"]).unwrap();
    assert_eq!(args.model_args.served_model_name, Some(argv(&["a", "b"])));
    assert!(usage_error(&["--served-model-name", "--port", "3"]).contains("expected at least one argument"));
    assert_eq!(
        serve(&["--hf-token", "--port", "3"]).unwrap().model_args.hf_token,
        Some(json!(true))
    );
    assert_eq!(
        serve(&["--hf-token", "abc"]).unwrap().model_args.hf_token,
        Some(json!("abc"))
    );
}

#[test]
fn bad_command_lines_exit_with_two() {
    for (line, expected) in [
        (&["--prot", "3"][..], "unrecognized arguments: --prot"),
        (&["--port", "x"], "argument --port: invalid int value: 'x'"),
        (&["--port"], "argument --port: expected one argument"),
        (
            &["--dtype", "int8"],
            "argument --dtype: invalid choice: 'int8' (choose from 'auto', 'bfloat16', 'float',",
        ),
        (&["extra"], "unrecognized arguments: extra"),
        (
            &["--hf-overrides", "{"],
            "argument --hf-overrides: value { cannot be read as JSON",
        ),
        (
            &["--gpu-memory-utilization", "nan"],
            "argument --gpu-memory-utilization/--device-memory-utilization: invalid float",
        ),
        (&["--allowed-origins", "3"], "argument --allowed-origins: invalid type"),
        (&["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ] {
        let message = usage_error(line);
        assert!(message.starts_with(expected), "{line:?}: {message}");
    }
    let line = argv(&["serve", "m", "--port", "x"]);
    let error = parse(&line).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let text = render_error(&line, &error);
    assert_eq!(
        text,
        "usage: rvllm serve [model_tag] [options]\nrvllm serve: error: argument --port: invalid int value: 'x'"
    );
}

#[test]
fn flags_that_cannot_be_honoured_are_refused() {
    for (line, expected) in [
        (
            &["--tensor-parallel-size", "2"][..],
            "--tensor-parallel-size 2 is not supported: ",
        ),
        (&["--load-format", "pt"], "--load-format pt is not supported: "),
        (
            &["--worker-cls", "my.Worker"],
            "--worker-cls my.Worker is not supported: Python classes",
        ),
        (&["--enable-lora"], "--enable-lora is not supported: "),
        (
            &["--lora-modules", "a=b", "c=d"],
            "--lora-modules a=b c=d is not supported: ",
        ),
        (
            &["--rope-scaling", "{}"],
            "--rope-scaling is gone from vLLM and not supported: use --hf-overrides",
        ),
        (
            &["--kv-transfer-config.kv_role", "kv_both"],
            "--kv-transfer-config {\"kv_role\":\"kv_both\"} is not supported",
        ),
    ] {
        let message = refusal(line);
        assert!(message.starts_with(expected), "{line:?}: {message}");
    }
    let harmless = [
        "-tp",
        "1",
        "--load-format",
        "dummy",
        "--worker-cls",
        "auto",
        "--no-enable-lora",
        "--cpu-offload-gb",
        "0",
    ];
    assert!(serve(&harmless).is_ok());
}

#[test]
fn flags_without_effect_are_noted_once() {
    let args = serve(&[
        "--trust-remote-code",
        "--swap-space",
        "4",
        "--cuda-graph-sizes",
        "1",
        "2",
        "-asc",
        "2",
    ])
    .unwrap();
    let texts: Vec<String> = args.notices.iter().map(|n| format!("{n:?}")).collect();
    assert_eq!(texts.len(), 4, "{texts:?}");
    assert!(
        texts
            .iter()
            .all(|t| t.starts_with("Info") && t.contains(" has no effect: ")),
        "{texts:?}"
    );
}

#[test]
fn the_model_may_be_a_flag() {
    let parsed = |line: &[&str]| match parse(&argv(line)).unwrap() {
        Invocation::Serve(args) => (args.model, args.model_is_positional),
        other => panic!("{other:?}"),
    };
    assert_eq!(parsed(&["serve", "--model", "x"]), (Some("x".into()), false));
    assert_eq!(parsed(&["--model", "x", "--port", "1"]), (Some("x".into()), false));
    assert_eq!(
        parsed(&["serve", "--port", "1", "x", "--model", "y"]),
        (Some("x".into()), true)
    );
    assert_eq!(
        parsed(&["serve", "--api-key", "k", "--", "x"]),
        (Some("x".into()), true)
    );
    let error = parse(&argv(&["serve", "--served-model-name", "x"])).unwrap_err();
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn automatic_tool_choice_needs_a_parser() {
    assert!(refusal(&["--enable-auto-tool-choice"]).contains("--tool-call-parser"));
    assert!(refusal(&["--enable-auto-tool-choice", "--tool-call-parser", "None"]).contains("--tool-call-parser"));
    assert!(serve(&["--enable-auto-tool-choice", "--tool-call-parser", "lfm2"]).is_ok());
}

#[test]
fn a_file_counts_less_than_the_command_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.yaml");
    let yaml = "model: file-model\nport: 9000\nmax_model_len: 1k\nenable-prefix-caching: false\ntrust-remote-code: true\n\
                served-model-name: [a, b]\nhf-overrides:\n  x: {y: 1}\nallowed-origins: ['*']\nhost: null\ndevice: cpu\n";
    std::fs::write(&path, yaml).unwrap();
    let path = path.to_str().unwrap();
    let args = serve(&["--config", path, "--port", "1"]).unwrap();
    assert_eq!(args.model.as_deref(), Some("m"));
    assert_eq!((args.frontend.port, args.model_args.max_model_len), (1, Some(1000)));
    assert_eq!(args.cache.enable_prefix_caching, Some(false));
    assert_eq!(args.model_args.served_model_name, Some(argv(&["a", "b"])));
    assert_eq!(args.model_args.hf_overrides, json!({"x": {"y": 1}}));
    assert_eq!(args.frontend.allowed_origins, ["*"]);
    assert_eq!(args.device, DeviceChoice::Cpu);
    let Invocation::Serve(args) = parse(&argv(&["serve", "--config", path])).unwrap() else {
        panic!()
    };
    assert_eq!((args.model.as_deref(), args.frontend.port), (Some("file-model"), 9000));

    for (yaml, expected) in [
        ("prot: 1", "prot is no flag"),
        ("- 1", "the file is no mapping"),
        ("config: x.yaml", "cannot name another"),
        ("port: [1, 2]", "port: expected one value"),
        ("port: yes", "argument --port: invalid int value: 'yes'"),
        ("enable-lora: 3", "enable-lora: expected true or false"),
        ("a: [", "did not find"),
    ] {
        std::fs::write(path, yaml).unwrap();
        let message = usage_error(&["--config", path]);
        assert!(message.contains(expected), "{yaml}: {message}");
    }
    assert!(usage_error(&["--config", "x.json"]).contains("only .yaml and .yml"));
    assert!(usage_error(&["--config", "/nowhere/x.yaml"]).contains("No such file"));
}

#[test]
fn help_can_be_filtered() {
    let help = |line: &[&str]| match parse(&argv(line)).unwrap() {
        Invocation::Print(text) => text,
        other => panic!("{other:?}"),
    };
    assert!(help(&["serve", "--help"]).contains("\n  SchedulerConfig "));
    let all = help(&["serve", "--help=all"]);
    assert!(TABLE.serve.iter().all(|f| all.contains(f.name())));
    let group = help(&["serve", "--help=SchedulerConfig"]);
    assert!(group.contains("--max-num-seqs") && !group.contains("--port"));
    let flag = help(&["serve", "--help=max_model"]);
    assert!(flag.contains("--max-model-len") && !flag.contains("--port"));
    let own = help(&["serve", "--help=rvllm"]);
    assert!(own.contains("--dry-run[=VALUE]") && own.contains("--device VALUE") && !own.contains("--port"));
    assert!(all.contains("--dry-run-device-memory") && help(&["serve", "--help=dry-run"]).contains("memory plan"));
    assert!(help(&["serve", "--help"]).contains("\n  rvllm  "));
    let latency = help(&["bench", "latency", "--help=all"]);
    assert!(latency.contains("--device") && latency.contains("--batch-size") && !latency.contains("--dry-run"));
    assert!(usage_error(&["--help=nothing-like-it"]).contains("no group and no flag"));
    assert_eq!(help(&["--version"]).trim(), env!("CARGO_PKG_VERSION"));
    assert_eq!(help(&[]), help(&["--help"]));
}

#[test]
fn other_subcommands_are_named() {
    assert_eq!(parse(&argv(&["frobnicate"])).unwrap_err().exit_code(), 2);
    assert_eq!(parse(&argv(&["bench"])).unwrap_err().exit_code(), 2);
    assert_eq!(parse(&argv(&["bench", "frobnicate"])).unwrap_err().exit_code(), 2);
    for line in [&["bench", "sweep"][..], &["launch", "render"], &["preload"]] {
        assert_eq!(parse(&argv(line)).unwrap_err().exit_code(), 1, "{line:?}");
    }
    let help = match parse(&argv(&["--help"])).unwrap() {
        Invocation::Print(text) => text,
        other => panic!("{other:?}"),
    };
    for command in Command::ALL {
        assert!(
            help.contains(command.path()) && help.contains(command.about()),
            "{}",
            command.path()
        );
    }
}

/// Words that tell a user what to do.
const ADVICE: [&str; 14] = [
    "use ", "leave ", "send ", "serve ", "run ", "read ", "end ", "log ", "stop ", "merge ", "raise ", "route ",
    "give ", "set ",
];

#[test]
fn refused_core_flags_say_what_to_do_instead() {
    for flag in TABLE
        .serve
        .iter()
        .filter(|f| f.tier == Tier::Core && f.here == Verdict::Refused)
    {
        let says = ADVICE
            .iter()
            .any(|word| flag.text.starts_with(word) || flag.text.contains(&format!(" {word}")));
        assert!(says, "{}: {}", flag.name(), flag.text);
    }
}

#[test]
fn every_subcommand_flag_belongs_to_one() {
    for flag in SUBCOMMAND_FLAGS.iter() {
        assert!(!flag.commands.is_empty(), "{}", flag.name());
        for command in &flag.commands {
            assert!(
                Command::ALL.iter().any(|c| c.path() == command),
                "{}: {command}",
                flag.name()
            );
        }
    }
}

#[test]
fn a_dry_run_lists_every_flag() {
    let args = serve(&[
        "--dry-run=json",
        "--port",
        "1",
        "--api-key",
        "secret",
        "--trust-remote-code",
        "--enable-lora",
        "--rope-theta",
        "3",
        "--dry-run-device-memory=80G",
    ])
    .unwrap();
    assert_eq!(args.dry_run, Some(DryRun::Json));
    assert_eq!(args.dry_run_device_memory, Some(80 << 30));
    let seen: Vec<(&str, &str, Effect)> = args
        .given
        .iter()
        .map(|g| (g.flag.as_str(), g.value.as_str(), g.effect))
        .collect();
    assert_eq!(
        seen[..4],
        [
            ("--port", "1", Effect::Honoured),
            ("--api-key", "***", Effect::Honoured),
            ("--trust-remote-code", "true", Effect::Accepted),
            ("--enable-lora", "true", Effect::Refused),
        ]
    );
    assert!(seen.contains(&("--rope-theta", "3", Effect::Refused)));
    assert!(!format!("{:?}", args.given).contains("secret"));

    assert_eq!(
        serve(&["--dry-run", "--port", "1"]).unwrap().dry_run,
        Some(DryRun::Text)
    );
    assert!(usage_error(&["--dry-run=xml"]).contains("invalid choice: 'xml'"));
    assert!(usage_error(&["--dry-run-device-memory", "1G"]).contains("only with --dry-run"));
    assert!(usage_error(&["--dry-run", "--dry-run-device-memory", "0"]).contains("not positive"));
    assert!(refusal(&["--rope-theta", "3"]).contains("--hf-overrides"));
}

#[test]
fn bench_has_the_engine_flags() {
    let bench = |line: &[&str]| match parse(&argv(line)) {
        Ok(Invocation::Bench(args)) => Ok(args),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error),
    };
    let args = bench(&[
        "bench",
        "latency",
        "--model",
        "x",
        "--load-format",
        "dummy",
        "--batch-size",
        "1",
    ])
    .unwrap();
    assert_eq!(
        args.kind,
        BenchKind::Latency {
            batch_size: 1,
            num_iters_warmup: 10,
            num_iters: 30
        }
    );
    assert_eq!(
        (args.input_len, args.output_len, args.engine.load.load_format.as_str()),
        (32, 128, "dummy")
    );
    assert!(args.engine.notices.is_empty());
    let args = bench(&[
        "bench",
        "throughput",
        "--model",
        "x",
        "--num-prompts",
        "9",
        "--dataset-name",
        "random",
    ])
    .unwrap();
    assert_eq!(args.kind, BenchKind::Throughput { num_prompts: 9 });
    assert!(
        bench(&["bench", "latency", "--batch-size", "0"])
            .unwrap_err()
            .to_string()
            .contains("--batch-size: 0")
    );
    assert_eq!(
        bench(&["bench", "throughput", "--dataset-path", "x"])
            .unwrap_err()
            .exit_code(),
        1
    );
    assert!(FlagSet::new(Command::Serve).get("--batch-size").is_none());
}
