//! Flags exactly as vLLM spells them: a table of every flag, one typed struct per group of `vllm serve --help`.
//!
//! [`parse`] goes through four steps: [`normalize`] reads the tokens as argparse would, [`command`] reads the values and
//! asks the table ([`table`], `flags.json`) what becomes of each flag, the groups are handed to [`config`](crate::config)
//! as its [`args`](crate::config::args).

mod command;
pub mod compatibility;
mod config_file;
mod help;
mod normalize;
#[cfg(test)]
mod resolution_tests;
mod table;
#[cfg(test)]
mod tests;
mod values;

use std::path::PathBuf;

use serde::Deserialize;

use crate::config::args::{BenchArgs, BenchKind, Notice, ServeArgs};
use command::Values;
use normalize::{Normalized, normalize};
use table::{Command, FlagSet};

/// What the command line asks for.
#[derive(Clone, Debug)]
pub enum Invocation {
    Serve(ServeArgs),
    Bench(BenchArgs),
    /// Text for stdout: help, version.
    Print(String),
}

/// Why there is nothing to run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CliError {
    /// The command line is malformed; argparse exits with 2. The text lacks usage and program name.
    #[error("{0}")]
    Usage(String),
    /// The command line is well-formed but asks for what cannot be done.
    #[error("{0}")]
    Refused(String),
}

impl CliError {
    /// vLLM's: 2 for a usage error, 1 for a failed start.
    pub fn exit_code(&self) -> u8 {
        match self {
            CliError::Usage(_) => 2,
            CliError::Refused(_) => 1,
        }
    }
}

/// The lines argparse prints on stderr for `error` in `argv` (without the program's name).
pub fn render_error(argv: &[String], error: &CliError) -> String {
    match (error, subcommand(argv)) {
        (CliError::Refused(message), _) => format!("rvllm: error: {message}"),
        (CliError::Usage(message), Ok(Subcommand::Flags(command, _))) => {
            format!("{}\nrvllm {}: error: {message}", help::usage(command), command.path())
        }
        (CliError::Usage(message), _) => {
            format!("usage: rvllm [-h] [-v] {{serve,bench}} ...\nrvllm: error: {message}")
        }
    }
}

/// Reads the command line (without the program's name).
///
/// # Errors
/// See [`CliError`].
pub fn parse(argv: &[String]) -> Result<Invocation, CliError> {
    let (command, tokens) = match subcommand(argv)? {
        Subcommand::Print(text) => return Ok(Invocation::Print(text)),
        Subcommand::Flags(command, tokens) => (command, tokens),
    };
    let set = FlagSet::new(command);
    let mut normalized = normalize(&set, tokens)?;
    if let Some(filter) = &normalized.help {
        return help::render(&set, filter)
            .map(Invocation::Print)
            .map_err(CliError::Usage);
    }
    if let Some([path]) = normalized.values("config") {
        let file = config_file::read(&set, &path.clone())?;
        normalized.fill_from(file);
    }
    let values = Values::read(&set, &normalized)?;
    let notices = values.judge(&normalized)?;
    match command {
        Command::Serve => Ok(Invocation::Serve(serve_args(command, normalized, &values, notices)?)),
        Command::BenchLatency | Command::BenchThroughput => {
            Ok(Invocation::Bench(bench_args(command, normalized, &values, notices)?))
        }
    }
}

enum Subcommand<'a> {
    Print(String),
    Flags(Command, &'a [String]),
}

/// Splits off the subcommand. Flags without one mean `serve`: older images had the server itself as entry point.
fn subcommand(argv: &[String]) -> Result<Subcommand<'_>, CliError> {
    let Some(first) = argv.first() else {
        return Ok(Subcommand::Print(help::top()));
    };
    match first.as_str() {
        "-h" | "--help" => Ok(Subcommand::Print(help::top())),
        "-v" | "--version" => Ok(Subcommand::Print(format!("{}\n", env!("CARGO_PKG_VERSION")))),
        "serve" => Ok(Subcommand::Flags(Command::Serve, &argv[1..])),
        "bench" => match argv.get(1).map(String::as_str) {
            Some("latency") => Ok(Subcommand::Flags(Command::BenchLatency, &argv[2..])),
            Some("throughput") => Ok(Subcommand::Flags(Command::BenchThroughput, &argv[2..])),
            Some("-h" | "--help") => Ok(Subcommand::Print(help::top())),
            Some(other @ ("serve" | "startup" | "sweep" | "mm-processor" | "forward")) => Err(CliError::Refused(
                format!("bench {other} is not built; `vllm bench serve` can measure this server from another machine"),
            )),
            Some(other) => Err(CliError::Usage(format!(
                "argument bench_type: invalid choice: '{other}' (choose from latency, throughput)"
            ))),
            None => Err(CliError::Usage(
                "the following arguments are required: bench_type".into(),
            )),
        },
        other @ ("chat" | "complete" | "collect-env" | "run-batch" | "launch" | "download-kernels" | "preload"
        | "snapshot") => Err(CliError::Refused(format!(
            "{other} is not built; use an OpenAI client against `rvllm serve`"
        ))),
        flag if flag.starts_with('-') => Ok(Subcommand::Flags(Command::Serve, argv)),
        other => Err(CliError::Usage(format!(
            "argument subparser: invalid choice: '{other}' (choose from serve, bench)"
        ))),
    }
}

fn serve_args(
    command: Command,
    normalized: Normalized,
    values: &Values,
    notices: Vec<Notice>,
) -> Result<ServeArgs, CliError> {
    let flag_model = normalized.values("model").and_then(|values| values.first().cloned());
    let mut positionals = normalized.positionals.into_iter();
    let positional = positionals.next();
    let rest: Vec<String> = positionals.collect();
    if !rest.is_empty() {
        return Err(CliError::Usage(format!("unrecognized arguments: {}", rest.join(" "))));
    }
    let mut all_notices = normalized.notices;
    all_notices.extend(notices);
    let model_is_positional = positional.is_some();
    if flag_model.is_some() && model_is_positional {
        all_notices.push(Notice::Warning(
            "--model has no effect: the model is given as positional argument".into(),
        ));
    } else if flag_model.is_some() && command == Command::Serve {
        all_notices.push(Notice::Warning(
            "--model is deprecated for serve: give the model as positional argument".into(),
        ));
    }
    let args = ServeArgs {
        model: positional.or(flag_model),
        model_is_positional,
        general: values.group()?,
        frontend: values.group()?,
        model_args: values.group()?,
        load: values.group()?,
        structured_outputs: values.group()?,
        parallel: values.group()?,
        cache: values.group()?,
        scheduler: values.group()?,
        logging: values.group()?,
        vllm: values.group()?,
        device: normalized.device,
        dry_run: normalized.dry_run,
        notices: all_notices,
    };
    check(&args)?;
    Ok(args)
}

/// Rules over several flags that vLLM checks before it looks at the model.
fn check(args: &ServeArgs) -> Result<(), CliError> {
    let parser = args.frontend.tool_call_parser.as_deref().unwrap_or("none");
    if args.frontend.enable_auto_tool_choice && parser.eq_ignore_ascii_case("none") {
        return Err(CliError::Refused(
            "--enable-auto-tool-choice requires --tool-call-parser".into(),
        ));
    }
    if args.model_args.served_model_name.is_some() && args.model.is_none() {
        return Err(CliError::Refused(
            "--served-model-name needs a model: give it as positional argument".into(),
        ));
    }
    Ok(())
}

/// Flags of the bench subcommands as typed.
#[derive(Deserialize)]
struct BenchFlags {
    input_len: Option<i64>,
    output_len: Option<i64>,
    n: i64,
    output_json: Option<PathBuf>,
    disable_detokenize: bool,
    #[serde(default)]
    batch_size: i64,
    #[serde(default)]
    num_iters_warmup: i64,
    #[serde(default)]
    num_iters: i64,
    #[serde(default)]
    num_prompts: i64,
}

fn bench_args(
    command: Command,
    normalized: Normalized,
    values: &Values,
    notices: Vec<Notice>,
) -> Result<BenchArgs, CliError> {
    let flags: BenchFlags = values.group()?;
    let at_least = |flag: &str, value: i64, least: i64| {
        let message = || CliError::Usage(format!("argument {flag}: {value} is less than {least}"));
        usize::try_from(value)
            .ok()
            .filter(|v| *v >= least as usize)
            .ok_or_else(message)
    };
    let (input_len, output_len) = match command {
        Command::BenchThroughput => (flags.input_len.unwrap_or(1024), flags.output_len.unwrap_or(128)),
        Command::BenchLatency | Command::Serve => (flags.input_len.unwrap_or(32), flags.output_len.unwrap_or(128)),
    };
    let kind = match command {
        Command::BenchThroughput => BenchKind::Throughput {
            num_prompts: at_least("--num-prompts", flags.num_prompts, 1)?,
        },
        Command::BenchLatency | Command::Serve => BenchKind::Latency {
            batch_size: at_least("--batch-size", flags.batch_size, 1)?,
            num_iters_warmup: at_least("--num-iters-warmup", flags.num_iters_warmup, 0)?,
            num_iters: at_least("--num-iters", flags.num_iters, 1)?,
        },
    };
    Ok(BenchArgs {
        kind,
        input_len: at_least("--input-len", input_len, 1)?,
        output_len: at_least("--output-len", output_len, 1)?,
        n: at_least("--n", flags.n, 1)?,
        output_json: flags.output_json,
        disable_detokenize: flags.disable_detokenize,
        engine: serve_args(command, normalized, values, notices)?,
    })
}
