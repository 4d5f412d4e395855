//! The only file that knows every part: backend → runner → engine → text → chat → server.

pub mod logging;
pub mod memory;
mod phases;
mod progress;

pub use phases::Phases;

use std::io::Write;
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
use crate::config::{Config, DeviceKind, ServerConfig, ServerInfo, VLLM_VERSION};
use crate::engine::{EngineConfig, EngineHandle, Exit};
use crate::metrics::Metrics;
use crate::otlp::Tracer;
use crate::runner::build_executor;
use crate::server::tls::Tls;
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
/// What the last spans get to reach their collector.
const LAST_SPANS: Duration = Duration::from_secs(2);
/// Exit codes: as after an unhandled error, and as shells report a second SIGTERM.
const FAILED: u8 = 1;
const INTERRUPTED: u8 = 143;

/// Serves until a signal or the engine's death. `phases` began with the process.
///
/// # Errors
/// The server could not start: port, checkpoint, memory. The text is for the operator.
pub fn run(config: Config, mut phases: Phases) -> anyhow::Result<ExitCode> {
    tracing::info!(
        "vLLM API server version {VLLM_VERSION}, served by rvllm {}",
        env!("CARGO_PKG_VERSION")
    );
    tracing::info!("model {}, served as {:?}", config.model.name, config.model.served_names);
    raise_open_file_limit();
    let bound = bind(&config.server)?;
    let tls = match &config.server.http.tls {
        Some(tls) => Some(Arc::new(Tls::load(tls.clone())?)),
        None => None,
    };

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
    let server = Server { app, bound, tls };
    let code = runtime.block_on(server.serve())?;
    // A blocking task may be inside a long template; its client is gone.
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(code)
}

fn bind(config: &ServerConfig) -> anyhow::Result<listen::Bound> {
    match &config.http.uds {
        Some(path) => listen::bind_unix(path).with_context(|| format!("--uds {} cannot be used", path.display())),
        None => listen::bind(config.host.as_deref(), config.port).with_context(|| {
            format!(
                "port {} of {} cannot be used",
                config.port,
                config.host.as_deref().unwrap_or("0.0.0.0")
            )
        }),
    }
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
    memory::log(&plan, config.device.kind != DeviceKind::Cpu);
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
    let observability = &config.observability;
    let metrics = Arc::new(Metrics::with_config(
        main_name,
        config.model.max_model_len,
        observability.metrics.clone(),
    ));
    metrics.engine.set_cache_config(&cache_labels(config));
    let tracer = match &observability.traces {
        Some(traces) => {
            tracing::info!("traces go to {}", traces.endpoint);
            Some(Tracer::start(traces.clone(), metrics.span_counters())?)
        }
        None => None,
    };
    let mut engine_config = EngineConfig::new(
        config.scheduler.clone(),
        config.cache.prefix_caching,
        config.model.max_model_len,
    );
    engine_config.log_stats_interval = observability.log_stats_interval;
    engine_config.tracer = tracer;
    let engine =
        EngineHandle::start(executor, engine_config, metrics.clone()).context("the engine cannot be started")?;
    let tokenizer = Arc::new(Tokenizer::load(&config.model.tokenizer_files)?);
    let text = TextEngine::with_log(engine, tokenizer, (&config.model).into(), observability.requests);
    let chat = ChatEngine::from_config(&config.chat, text)?;
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

/// What the flags say of the KV cache, as labels of `vllm:cache_config_info`; the engine adds what came of them.
fn cache_labels(config: &Config) -> Vec<(&'static str, String)> {
    let cache = &config.cache;
    let option = |value: Option<usize>| value.map_or_else(|| "None".into(), |value| value.to_string());
    vec![
        (
            "cache_dtype",
            cache.kv_dtype.map_or_else(|| "auto".into(), |dtype| dtype.to_string()),
        ),
        ("gpu_memory_utilization", cache.memory_utilization.to_string()),
        ("kv_cache_memory_bytes", option(cache.memory_bytes)),
        ("num_gpu_blocks_override", option(cache.num_blocks_override)),
        ("is_attention_free", "False".into()),
        ("user_specified_block_size", "False".into()),
    ]
}

/// All that serves, ready to open the port.
struct Server {
    app: Arc<App>,
    bound: listen::Bound,
    tls: Option<Arc<Tls>>,
}

impl Server {
    /// Opens the port and serves until it is time to go.
    async fn serve(self) -> anyhow::Result<ExitCode> {
        let Self { app, bound, tls } = self;
        let mut signals = Signals::new().context("signals cannot be handled")?;
        let engine = app.engine().clone();
        let uvicorn = Uvicorn {
            speaks: app.config.lifecycle_log,
        };
        let drain = Duration::from_secs(app.config.shutdown_timeout_s);
        let options = listen::ListenOptions {
            limits: app.config.http.limits,
            tls: tls.clone(),
            drain: LAST_FRAMES,
        };
        let listener = bound.listen().context("the port cannot be opened")?;
        uvicorn.started(&app);
        if let Some(tls) = tls {
            tokio::spawn(tls.refresh());
        }

        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let stopped = async {
            // A dropped sender means the same as a sent message.
            let _ = stopped.await;
        };
        let serving = tokio::spawn(listen::serve(listener, server::router(app), options, stopped));

        let code = tokio::select! {
            exit = engine.stopped() => failed(&exit),
            name = signals.next() => {
                uvicorn.say("Shutting down");
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
        let last = async {
            // The task can only have ended, or panicked with the listener: either way it serves nobody any more.
            let _ = serving.await;
            if let Some(tracer) = engine.tracer() {
                tracer.flush(LAST_SPANS).await;
            }
        };
        tokio::select! {
            () = last => {}
            _ = signals.next() => return Ok(ExitCode::from(INTERRUPTED)),
        }
        uvicorn.say("Application shutdown complete.");
        Ok(code)
    }
}

fn failed(exit: &Exit) -> ExitCode {
    tracing::error!("the engine is dead: {exit:?}");
    ExitCode::from(FAILED)
}

/// The lines that scripts wait for, as uvicorn prints them.
struct Uvicorn {
    speaks: bool,
}

impl Uvicorn {
    fn say(&self, text: &str) {
        if self.speaks {
            // Nobody may be listening any more.
            let _ = writeln!(std::io::stderr(), "INFO:     {text}");
        }
    }

    fn started(&self, app: &App) {
        tracing::info!("Starting vLLM server on {}", app.config.address());
        tracing::info!("Available routes are:");
        for route in server::routes::ROUTES.iter().filter(|route| route.when.holds(app)) {
            let methods = route.methods.replace('|', ", ");
            tracing::info!("Route: {}, Methods: {methods}", route.path);
        }
        self.say(&format!("Started server process [{}]", std::process::id()));
        self.say("Waiting for application startup.");
        self.say("Application startup complete.");
    }
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
