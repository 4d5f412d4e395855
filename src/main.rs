//! Parse, resolve, run.

use std::process::ExitCode;

use rvllm::cli::{self, Invocation};
use rvllm::commands::{collect_env, dry_run, print, run_batch, talk};
use rvllm::config::args::{Machine, Notice, ServeArgs};
use rvllm::config::environment::Environment;
use rvllm::config::logging;
use rvllm::config::{Config, resolve};
use rvllm::serve::Phases;
use rvllm::{bench, serve};
use tracing::{info, warn};

fn main() -> ExitCode {
    let phases = Phases::default();
    let argv: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    let invocation = match cli::parse(&argv) {
        Ok(invocation) => invocation,
        Err(error) => {
            eprintln!("{}", cli::render_error(&argv, &error));
            return ExitCode::from(error.exit_code());
        }
    };
    match run(invocation, phases) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("rvllm: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(invocation: Invocation, phases: Phases) -> anyhow::Result<ExitCode> {
    let env = Environment::of_process();
    match invocation {
        Invocation::Print(text) => {
            print(&text);
            Ok(ExitCode::SUCCESS)
        }
        Invocation::Serve(args) => {
            let (config, machine, notices) = configure(&args, &env)?;
            match args.dry_run {
                Some(form) => dry_run::run(config, &args, &machine, &notices, form),
                None => serve::run(config, phases),
            }
        }
        Invocation::Chat(args) => talk::chat(&args, &env),
        Invocation::Complete(args) => talk::complete(&args, &env),
        Invocation::Bench(args) => bench::run(configure(&args.engine, &env)?.0, &args),
        Invocation::BenchStartup(args) => bench::startup::run(&configure(&args.engine, &env)?.0, &args),
        Invocation::BenchServe(args) => bench::serve::run(&args, &env),
        Invocation::RunBatch(args) => run_batch::run(configure(&args.engine, &env)?.0, &args, phases),
        Invocation::CollectEnv => collect_env::run(),
    }
}

/// Sets up logging, then decides everything else. What is to be known about flags and variables is logged, and returned for
/// a dry run, whose output has stdout to itself.
fn configure(args: &ServeArgs, env: &Environment) -> anyhow::Result<(Config, Machine, Vec<Notice>)> {
    let mut log = logging::resolve(&args.logging, env)?;
    log.to_stderr |= args.dry_run.is_some();
    serve::logging::init(&log);
    let mut notices = args.notices.clone();
    notices.extend(env.check(args.general.fail_on_environ_validation)?);
    if args.dry_run.is_none() {
        for notice in &notices {
            match notice {
                Notice::Info(text) => info!("{text}"),
                Notice::Warning(text) => warn!("{text}"),
            }
        }
    }
    let machine = dry_run::machine(args, Machine::probe(serve::gpus()));
    let config = resolve::resolve(args, env, &machine)?;
    Ok((config, machine, notices))
}
