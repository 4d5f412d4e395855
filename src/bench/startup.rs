//! `rvllm bench startup`: from the start of the process to the first answer of `/health`.
//!
//! Each start is this program's own `serve` in a new process, over plain TCP whatever `--uds` and `--ssl-*` say. Before a cold one the checkpoint's files are dropped from the page
//! cache; there is no other cache to drop, as nothing is compiled. The phases are those of the server's own log line.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Map, Value, json};

use super::stats::{mean, percentile};
use super::write_json;
use crate::commands::say;
use crate::config::args::BenchStartupArgs;
use crate::config::{Config, LoadFormat, ModelFiles};
use crate::serve::Phases;

/// What vLLM reports.
const PERCENTILES: [u32; 6] = [10, 25, 50, 75, 90, 99];
/// Between two questions whether the port answers.
const POLL: Duration = Duration::from_millis(2);
/// What a server that listens may take to answer.
const ANSWER: Duration = Duration::from_secs(60);
/// What a stopping server gets before it is killed.
const STOP: Duration = Duration::from_secs(10);
/// The line after which the port is open.
const LISTENING: &str = "Starting vLLM server on ";

/// Starts the server as often as asked.
///
/// # Errors
/// A start fails; the message has the server's last lines.
pub fn run(config: &Config, args: &BenchStartupArgs) -> anyhow::Result<ExitCode> {
    let weights = weight_files(config);
    let mut result = Map::new();
    say!("Measuring cold startup time...");
    if weights.is_empty() {
        say!("The weights come from no file: cold starts are warm ones.");
    }
    let cold = (0..args.num_iters_cold)
        .map(|_| {
            weights.iter().try_for_each(|path| drop_from_page_cache(path))?;
            start_once(&args.serve_argv)
        })
        .collect::<anyhow::Result<Vec<Start>>>()?;
    say!("Warming up for warm startup measurement...");
    for _ in 0..args.num_iters_warmup {
        start_once(&args.serve_argv)?;
    }
    say!("Measuring warm startup time...");
    let warm = (0..args.num_iters_warm)
        .map(|_| start_once(&args.serve_argv))
        .collect::<anyhow::Result<Vec<Start>>>()?;

    let bar = "=".repeat(60);
    say!("\n{bar}\nSTARTUP TIME BENCHMARK RESULTS\n{bar}");
    for (name, key, starts) in [("COLD STARTUP", "cold", &cold), ("WARM STARTUP", "warm", &warm)] {
        if !starts.is_empty() {
            report(name, key, starts, &mut result);
        }
    }
    say!("{bar}");
    write_json(args.output_json.as_deref(), &Value::Object(result))?;
    Ok(ExitCode::SUCCESS)
}

fn report(name: &str, key: &str, starts: &[Start], result: &mut Map<String, Value>) {
    let totals: Vec<f64> = starts.iter().map(|start| start.ready_s).collect();
    say!("\n{name}:\nAvg startup time: {:.2} seconds", mean(&totals));
    say!("Startup time percentiles:");
    let mut percentiles = Map::new();
    for p in PERCENTILES {
        let value = percentile(&totals, f64::from(p));
        say!("  {p}%: {value:.2} seconds");
        percentiles.insert(p.to_string(), json!(value));
    }
    say!("Phases (average):");
    let mut phases = Map::new();
    for (i, (phase, _)) in starts[0].phases.iter().enumerate() {
        let seconds: Vec<f64> = starts.iter().filter_map(|start| Some(start.phases.get(i)?.1)).collect();
        say!("  {phase:<24} {:>9.4} seconds", mean(&seconds));
        phases.insert(phase.clone(), json!(mean(&seconds)));
    }
    result.insert(format!("avg_{key}_startup_time"), json!(mean(&totals)));
    result.insert(format!("{key}_startup_times"), json!(totals));
    result.insert(format!("{key}_startup_percentiles"), Value::Object(percentiles));
    result.insert(format!("{key}_startup_phases"), Value::Object(phases));
}

/// The files that hold the weights; none for those of the program itself and for random ones.
fn weight_files(config: &Config) -> Vec<std::path::PathBuf> {
    let ModelFiles::Directory(directory) = &config.model.files else {
        return Vec::new();
    };
    if config.model.load_format == LoadFormat::Dummy {
        return Vec::new();
    }
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect()
}

fn drop_from_page_cache(path: &std::path::Path) -> anyhow::Result<()> {
    let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    // Pages that were never written to disk stay.
    file.sync_all().with_context(|| path.display().to_string())?;
    // SAFETY: a plain call on an open descriptor.
    let code = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    match code {
        0 => Ok(()),
        code => Err(std::io::Error::from_raw_os_error(code)).with_context(|| path.display().to_string()),
    }
}

/// One start.
struct Start {
    /// Seconds from the start of the process to the first answer.
    ready_s: f64,
    phases: Vec<(String, f64)>,
}

/// A server that is stopped when it is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // SAFETY: the child is ours and has not been waited for.
        unsafe { libc::kill(self.0.id() as libc::pid_t, libc::SIGTERM) };
        let end = Instant::now() + STOP;
        while Instant::now() < end {
            if matches!(self.0.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(POLL);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_once(serve_argv: &[String]) -> anyhow::Result<Start> {
    let program = std::env::current_exe().context("the program does not find itself")?;
    let address = free_address().context("no port is free")?;
    let start = Instant::now();
    let child = Command::new(program)
        .args(serve_argv)
        .args(["--host", "127.0.0.1", "--port", &address.port().to_string()])
        .env("VLLM_CONFIGURE_LOGGING", "1")
        .env("VLLM_LOGGING_LEVEL", "INFO")
        .env("VLLM_LOGGING_STREAM", "ext://sys.stdout")
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .context("the server cannot be started")?;
    let mut server = Server(child);
    let stdout = server.0.stdout.take().context("the server has no output")?;
    let mut phases = None;
    let mut lines = BufReader::new(stdout).lines();
    for line in lines.by_ref() {
        let line = line.context("the server's output cannot be read")?;
        phases = Phases::parse(&line).or(phases);
        if !line.contains(LISTENING) {
            continue;
        }
        let listening = Instant::now();
        while !answers(address) {
            if listening.elapsed() > ANSWER {
                bail!("the server listens on {address} and does not answer /health with 200");
            }
            if let Ok(Some(status)) = server.0.try_wait() {
                bail!("the server ended before it answered: {status}");
            }
            std::thread::sleep(POLL);
        }
        let ready_s = start.elapsed().as_secs_f64();
        // The pipe must not fill up while the server stops.
        std::thread::spawn(move || lines.for_each(drop));
        let phases = phases.context("the server logged no phases; is its log below INFO?")?;
        return Ok(Start { ready_s, phases });
    }
    bail!("the server did not start");
}

/// An address of this machine that nobody listens on.
fn free_address() -> std::io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

/// `GET /health` is 200.
fn answers(address: SocketAddr) -> bool {
    let ask = || -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut reply = vec![0; 12];
        stream.read_exact(&mut reply)?;
        Ok(reply)
    };
    ask().is_ok_and(|reply| reply == b"HTTP/1.1 200")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_are_taken_phase_by_phase() {
        let phases = |a: f64, b: f64| vec![("device".to_owned(), a), ("weights".to_owned(), b)];
        let starts = [
            Start {
                ready_s: 1.0,
                phases: phases(0.2, 0.6),
            },
            Start {
                ready_s: 3.0,
                phases: phases(0.4, 2.0),
            },
        ];
        let mut result = Map::new();
        report("COLD STARTUP", "cold", &starts, &mut result);
        assert_eq!(result["avg_cold_startup_time"], 2.0);
        assert_eq!(result["cold_startup_percentiles"]["50"], 2.0);
        let weights = result["cold_startup_phases"]["weights"].as_f64().unwrap();
        assert!((weights - 1.3).abs() < 1e-12);
    }

    #[test]
    fn a_file_leaves_the_page_cache_unchanged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        std::fs::write(&path, [7u8; 4096]).unwrap();
        drop_from_page_cache(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [7u8; 4096]);
        assert!(drop_from_page_cache(&directory.path().join("none")).is_err());
    }
}
