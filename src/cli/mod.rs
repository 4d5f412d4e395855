//! Flags exactly as vLLM spells them: a table of every flag, one typed struct per group of `vllm serve --help`.
//!
//! [`parse`] goes through four steps: [`normalize`] reads the tokens as argparse would, [`command`] reads the values and
//! asks the table ([`table`]: `flags.json` for `serve`, `subcommands.json` for what the others have of their own) what becomes
//! of each flag, the groups are handed to [`config`](crate::config) as its [`args`](crate::config::args).

mod command;
pub mod compatibility;
mod config_file;
mod help;
mod normalize;
#[cfg(test)]
mod resolution_tests;
mod subcommands;
mod table;
#[cfg(test)]
mod tests;
mod values;

use crate::config::args::{
    BenchArgs, BenchServeArgs, BenchStartupArgs, ChatArgs, CompleteArgs, Effect, Notice, RunBatchArgs, ServeArgs,
};
use command::Values;
use normalize::{Normalized, normalize};
use table::{Command, FlagSet};

/// What the command line asks for.
#[derive(Clone, Debug)]
pub enum Invocation {
    Serve(ServeArgs),
    Chat(ChatArgs),
    Complete(CompleteArgs),
    /// `latency` or `throughput`.
    Bench(BenchArgs),
    BenchStartup(BenchStartupArgs),
    BenchServe(Box<BenchServeArgs>),
    RunBatch(RunBatchArgs),
    CollectEnv,
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
        (CliError::Usage(message), _) => format!("{}\nrvllm: error: {message}", help::top_usage()),
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
    if command != Command::Serve && (normalized.dry_run.is_some() || normalized.dry_run_device_memory.is_some()) {
        return Err(CliError::Usage("unrecognized arguments: --dry-run is for serve".into()));
    }
    let values = Values::read(&set, &normalized)?;
    match command {
        Command::Serve => Ok(Invocation::Serve(serve_args(command, normalized, &values)?)),
        _ => subcommands::invocation(command, normalized, &values),
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
        "bench" => match argv.get(1).map(String::as_str) {
            None => Err(CliError::Usage(
                "the following arguments are required: bench_type".into(),
            )),
            Some("-h" | "--help") => Ok(Subcommand::Print(help::top())),
            Some(other @ ("sweep" | "mm-processor" | "forward" | "iterations")) => Err(CliError::Refused(format!(
                "bench {other} is not built; use bench latency, throughput, startup or serve, in a loop for a sweep"
            ))),
            Some(other) => match named(&format!("bench {other}")) {
                Some(command) => Ok(Subcommand::Flags(command, &argv[2..])),
                None => Err(CliError::Usage(format!(
                    "argument bench_type: invalid choice: '{other}' (choose from latency, throughput, startup, serve)"
                ))),
            },
        },
        "launch" => Err(CliError::Refused(
            "launch is not built; /tokenize renders a chat without running it".into(),
        )),
        other @ ("download-kernels" | "preload" | "snapshot") => Err(CliError::Refused(format!(
            "{other} has nothing to do here: kernels are part of the program, and a start takes seconds"
        ))),
        flag if flag.starts_with('-') => Ok(Subcommand::Flags(Command::Serve, argv)),
        other => match named(other) {
            Some(command) => Ok(Subcommand::Flags(command, &argv[1..])),
            None => Err(CliError::Usage(format!(
                "argument subparser: invalid choice: '{other}' (choose from chat, complete, serve, bench, collect-env, \
                 run-batch)"
            ))),
        },
    }
}

fn named(path: &str) -> Option<Command> {
    Command::ALL.into_iter().find(|command| command.path() == path)
}

/// The engine's part of the command line.
///
/// # Errors
/// A flag that is refused has another value than its default, except in a dry run, which lists it; or flags contradict one
/// another.
fn serve_args(command: Command, normalized: Normalized, values: &Values) -> Result<ServeArgs, CliError> {
    let given = values.judge(&normalized);
    let refused = given.iter().find(|flag| flag.effect == Effect::Refused);
    if let Some(flag) = refused.filter(|_| normalized.dry_run.is_none()) {
        return Err(CliError::Refused(flag.text.clone()));
    }
    let ineffective = given.iter().take(normalized.occurrences.len());
    let notices: Vec<Notice> = ineffective
        .filter(|flag| flag.effect == Effect::Accepted)
        .map(|flag| Notice::Info(format!("{} has no effect: {}", flag.flag, flag.text)))
        .collect();
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
        http: values.group()?,
        request_log: values.group()?,
        observability: values.group()?,
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
        dry_run_device_memory: normalized.dry_run_device_memory,
        given,
        notices: all_notices,
    };
    if args.dry_run.is_none() && args.dry_run_device_memory.is_some() {
        return Err(CliError::Usage(
            "argument --dry-run-device-memory: only with --dry-run".into(),
        ));
    }
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
