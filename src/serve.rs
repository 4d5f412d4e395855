//! The only file that knows every part: backend → runner → engine → text → chat → server.

pub mod logging;
pub mod memory;
mod phases;
mod progress;

pub use phases::Phases;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
#[cfg(not(feature = "cuda"))]
use anyhow::bail;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::chat::ChatEngine;
use crate::config::args::Gpu;
use crate::config::{Config, DeviceKind, ServerInfo, VLLM_VERSION};
use crate::engine::{EngineConfig, EngineHandle, Exit};
use crate::metrics::Metrics;
use crate::runner::build_executor;
use crate::server::{self, App, ServedModel, listen};
use crate::step::Executor;
use crate::text::{TextEngine, Tokenizer};
use progress::WeightProgress;

/// Threads that serve HTTP; more only spin.
const MAX_HTTP_THREADS: usize = 8;
/// Threads per HTTP thread that render templates and tokenize.
const BLOCKING_THREADS_PER_HTTP_THREAD: usize = 4;
/// What open connections get to write their last frames after the engine has stopped.
const LAST_FRAMES: Duration = Duration::from_secs(2);
/// Exit codes: as after an unhandled error, and as shells report a second SIGTERM.
const FAILED: u8 = 1;
const INTERRUPTED: u8 = 143;

/// Serves until a signal or the engine's death. `phases` began with the process.
///
/// # Errors
/// The server could not start: port, checkpoint, memory. The text is for the operator.
pub fn run(config: Config, mut phases: Phases) -> anyhow::Result<ExitCode> {
    tracing::info!(
        "rvllm API server version {} (API of vLLM {VLLM_VERSION})",
        env!("CARGO_PKG_VERSION")
    );
    tracing::info!("model {}, served as {:?}", config.model.name, config.model.served_names);
    raise_open_file_limit();
    let bound = listen::bind(config.server.host.as_deref(), config.server.port).with_context(|| {
        format!(
            "port {} of {} cannot be used",
            config.server.port,
            config.server.host.as_deref().unwrap_or("0.0.0.0")
        )
    })?;

    let (config, executor) = load(config, &mut phases)?;
    let app = Arc::new(build_app(&config, executor)?);
    phases.done("tokenizer and template");
    tracing::info!("{phases}");
    tracing::info!("ready after {:.2} s", phases.total().as_secs_f64());

    let http_threads = std::thread::available_parallelism()
        .map_or(2, |n| n.get())
        .clamp(2, MAX_HTTP_THREADS);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(http_threads)
        .max_blocking_threads(http_threads * BLOCKING_THREADS_PER_HTTP_THREAD)
        .thread_name("http")
        .enable_all()
        .build()
        .context("the HTTP threads cannot be started")?;
    let code = runtime.block_on(serve(app, bound))?;
    // A blocking task may be inside a long template; its client is gone.
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(code)
}

/// GPUs that this build can use.
pub fn gpus() -> Vec<Gpu> {
    #[cfg(feature = "cuda")]
    let gpus = crate::backend::cuda::driver::list_devices();
    #[cfg(not(feature = "cuda"))]
    let gpus: Vec<(String, u64)> = Vec::new();
    gpus.into_iter()
        .map(|(name, memory_bytes)| Gpu { name, memory_bytes })
        .collect()
}

/// Loads the model onto its device. The configuration comes back with what the device decided.
///
/// # Errors
/// No such device, or a checkpoint or a size that it cannot take.
pub fn load(mut config: Config, phases: &mut Phases) -> anyhow::Result<(Config, Box<dyn Executor>)> {
    phases.done("configuration");
    let executor = match config.device.kind {
        DeviceKind::Cpu => load_on(cpu(&config), &mut config, phases)?,
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda { ordinal } => load_on(cuda(&config, ordinal)?, &mut config, phases)?,
        #[cfg(not(feature = "cuda"))]
        DeviceKind::Cuda { ordinal } => {
            bail!("--device cuda:{ordinal}: this build of rvllm has no CUDA backend; use --device cpu")
        }
    };
    Ok((config, executor))
}

/// Bytes per second that the device reads now; see [`Backend::read_bandwidth`].
///
/// # Errors
/// No such device.
pub fn read_bandwidth(config: &Config) -> anyhow::Result<f64> {
    Ok(match config.device.kind {
        DeviceKind::Cpu => cpu(config).read_bandwidth()?,
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda { ordinal } => cuda(config, ordinal)?.read_bandwidth()?,
        #[cfg(not(feature = "cuda"))]
        DeviceKind::Cuda { ordinal } => {
            bail!("--device cuda:{ordinal}: this build of rvllm has no CUDA backend; use --device cpu")
        }
    })
}

fn cpu(config: &Config) -> CpuBackend {
    CpuBackend::new(config.device.threads, config.model.dtype)
}

#[cfg(feature = "cuda")]
fn cuda(config: &Config, ordinal: usize) -> anyhow::Result<crate::backend::cuda::CudaBackend> {
    let eager = config.device.enforce_eager;
    Ok(crate::backend::cuda::CudaBackend::new(
        ordinal,
        config.model.dtype,
        eager,
    )?)
}

fn load_on<B: Backend>(backend: B, config: &mut Config, phases: &mut Phases) -> anyhow::Result<Box<dyn Executor>> {
    tracing::info!("running on {}", backend.describe());
    memory::fit_context(config, backend.memory_bytes()?)?;
    phases.done("device");

    let start = Instant::now();
    let mut progress = WeightProgress::new();
    let options = memory::executor_options(config, config.model.max_model_len);
    let (executor, plan) = build_executor(&options, backend, &mut |loaded, total| progress.at(loaded, total))?;
    let loaded = progress.finished().unwrap_or_else(Instant::now);
    tracing::info!("Loading weights took {:.2} seconds", (loaded - start).as_secs_f64());
    phases.done_at("weights", loaded);
    phases.done("buffers");
    memory::log(&plan);
    Ok(executor)
}

/// From the executor up to what the router needs.
///
/// # Errors
/// Tokenizer, template or a parser cannot be used, or a thread cannot be started.
pub fn build_app(config: &Config, executor: Box<dyn Executor>) -> anyhow::Result<App> {
    let main_name = config
        .model
        .served_names
        .first()
        .map_or(config.model.name.as_str(), String::as_str);
    let metrics = Arc::new(Metrics::new(main_name, config.model.max_model_len));
    let mut engine_config = EngineConfig::new(
        config.scheduler.clone(),
        config.cache.prefix_caching,
        config.model.max_model_len,
    );
    engine_config.log_stats_interval = config
        .server
        .log_stats
        .then(|| Duration::try_from_secs_f64(config.server.log_stats_interval_s).ok())
        .flatten();
    let engine =
        EngineHandle::start(executor, engine_config, metrics.clone()).context("the engine cannot be started")?;
    let tokenizer = Arc::new(Tokenizer::load(&config.model.tokenizer_files)?);
    let chat = ChatEngine::from_config(&config.chat, TextEngine::new(engine, tokenizer, (&config.model).into()))?;
    let parsers = chat.parsers();
    tracing::info!(
        "reasoning parser: {}, tool call parser: {}",
        parsers.reasoning.map_or("none", |entry| entry.name),
        parsers.tool.map_or("none", |entry| entry.name)
    );
    Ok(App::new(
        config.server.clone(),
        config.chat.clone(),
        ServedModel::new(&config.model),
        chat,
        metrics,
    )
    .with_info(ServerInfo::new(config)))
}

/// Opens the port and serves until it is time to go.
async fn serve(app: Arc<App>, bound: listen::Bound) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new().context("signals cannot be handled")?;
    let engine = app.engine().clone();
    let keep_alive = Duration::from_secs(app.config.http_keep_alive_s.max(1));
    let address = bound.address();
    let listener = bound.listen().context("the port cannot be opened")?;
    announce(address);

    let drain = Duration::from_secs(app.config.shutdown_timeout_s);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(listen::serve(
        listener,
        server::router(app),
        keep_alive,
        async {
            // A dropped sender means the same as a sent message.
            let _ = stopped.await;
        },
        LAST_FRAMES,
    ));

    let code = tokio::select! {
        exit = engine.stopped() => failed(&exit),
        name = signals.next() => {
            eprintln!("INFO:     Shutting down");
            tracing::info!("{name}: running requests get {} s; a second signal ends them at once", drain.as_secs());
            tokio::select! {
                exit = engine.drain(Instant::now() + drain) => match exit {
                    Exit::Finished => ExitCode::SUCCESS,
                    Exit::Failed(_) => failed(&exit),
                },
                name = signals.next() => {
                    tracing::warn!("{name} again: ending now");
                    return Ok(ExitCode::from(INTERRUPTED));
                }
            }
        }
    };
    drop(stop);
    tokio::select! {
        _ = serving => {}
        _ = signals.next() => return Ok(ExitCode::from(INTERRUPTED)),
    }
    eprintln!("INFO:     Application shutdown complete.");
    Ok(code)
}

fn failed(exit: &Exit) -> ExitCode {
    tracing::error!("the engine is dead: {exit:?}");
    ExitCode::from(FAILED)
}

/// The lines that scripts wait for, as vLLM and uvicorn print them.
fn announce(address: SocketAddr) {
    tracing::info!("Starting vLLM server on http://{address}");
    eprintln!("INFO:     Started server process [{}]", std::process::id());
    eprintln!("INFO:     Waiting for application startup.");
    eprintln!("INFO:     Application startup complete.");
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Every connection is a file: the soft limit, often 1024, is raised to the hard one.
fn raise_open_file_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both calls only read or write the struct, which outlives them.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit) == 0
        }
    };
    if !raised {
        tracing::warn!(
            "the limit on open files stays as it is: {}",
            std::io::Error::last_os_error()
        );
    }
}
