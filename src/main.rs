//! Parse, resolve, run.

use std::io::Write;
use std::process::ExitCode;

use rvllm::cli::{self, Invocation};
use rvllm::config::args::{Machine, Notice, ServeArgs};
use rvllm::config::environment::Environment;
use rvllm::config::logging;
use rvllm::config::{Config, resolve};
use rvllm::serve;
use tracing::{info, warn};

fn main() -> ExitCode {
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
    match run(invocation) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("rvllm: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(invocation: Invocation) -> anyhow::Result<ExitCode> {
    match invocation {
        Invocation::Print(text) => {
            print(&text);
            Ok(ExitCode::SUCCESS)
        }
        Invocation::Serve(args) => {
            let config = configure(&args)?;
            if args.dry_run {
                print(&config.summary());
                return Ok(ExitCode::SUCCESS);
            }
            serve::run(config)
        }
        Invocation::Bench(args) => {
            let config = configure(&args.engine)?;
            print(&config.summary());
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Writes to stdout; a reader that went away (`| head`) is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Sets up logging, then decides everything else.
fn configure(args: &ServeArgs) -> anyhow::Result<Config> {
    let env = Environment::of_process();
    serve::logging::init(&logging::resolve(&args.logging, &env)?);
    let environment_notices = env.check(args.general.fail_on_environ_validation)?;
    for notice in args.notices.iter().chain(&environment_notices) {
        match notice {
            Notice::Info(text) => info!("{text}"),
            Notice::Warning(text) => warn!("{text}"),
        }
    }
    Ok(resolve::resolve(args, &env, &Machine::probe())?)
}
