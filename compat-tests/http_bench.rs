//! What the HTTP layer costs: requests per second of the whole server over the scripted engine, beside a plain axum handler
//! that reads the same JSON and writes an answer of the same kind, with the same clients.
//!
//! `cargo bench --bench http`, or `cargo bench --bench http -- SECONDS`. Clients and server share the machine's cores, so the ratios mean
//! more than the rates.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use axum::Router;
use axum::routing::post;
use rvllm::cli::{self, Invocation};
use rvllm::config::args::Machine;
use rvllm::config::environment::Environment;
use rvllm::config::resolve;
use rvllm::engine::scripted::{ScriptedExecutor, capacity};
use rvllm::serve;
use rvllm::server::{listen, router};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const CLIENTS: usize = 16;
/// What each answer consists of.
const TOKENS: usize = 8;

fn main() -> anyhow::Result<()> {
    // Cargo adds `--bench`.
    let seconds: Option<u64> = std::env::args().skip(1).find_map(|argument| argument.parse().ok());
    let seconds = seconds.unwrap_or(5);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(compare(Duration::from_secs(seconds)))
}

async fn compare(time: Duration) -> anyhow::Result<()> {
    let plain = start(Router::new().route("/v1/completions", post(plain_answer)))?;
    let server = start(router(Arc::new(scripted_app()?)))?;
    let completion = json!({"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": true, "temperature": 0});
    let streamed = json!({"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": true, "temperature": 0, "stream": true});
    let chat = json!({"messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": TOKENS, "ignore_eos": true, "temperature": 0});
    let cases = [
        (
            "plain axum, JSON in and out",
            plain,
            "POST",
            "/v1/completions",
            Some(&completion),
        ),
        ("GET /version", server, "GET", "/version", None),
        ("completions", server, "POST", "/v1/completions", Some(&completion)),
        (
            "completions, streamed",
            server,
            "POST",
            "/v1/completions",
            Some(&streamed),
        ),
        ("chat completions", server, "POST", "/v1/chat/completions", Some(&chat)),
    ];
    println!(
        "{CLIENTS} connections, {TOKENS} tokens an answer, {} s each",
        time.as_secs()
    );
    let mut baseline = None;
    for (name, address, method, path, body) in cases {
        let request = raw_request(method, path, body);
        let rate = rate(address, &request, time).await.with_context(|| name.to_owned())?;
        let of = *baseline.get_or_insert(rate);
        println!(
            "{name:<30} {rate:>9.0} requests/s   {:>5.1} % of plain axum",
            100.0 * rate / of
        );
    }
    Ok(())
}

fn start(router: Router) -> anyhow::Result<SocketAddr> {
    let bound = listen::bind(Some("127.0.0.1"), 0)?;
    let address = bound.address().context("the port has an address")?;
    let listener = bound.listen()?;
    tokio::spawn(listen::serve(
        listener,
        router,
        listen::ListenOptions::default(),
        std::future::pending(),
    ));
    Ok(address)
}

/// The demo model's configuration, tokenizer and template over an engine that computes nothing.
fn scripted_app() -> anyhow::Result<rvllm::server::App> {
    let argv = ["serve", "demo", "--disable-uvicorn-access-log"].map(str::to_owned);
    let Ok(Invocation::Serve(args)) = cli::parse(&argv) else {
        anyhow::bail!("the command line is read otherwise");
    };
    let config = resolve::resolve(&args, &Environment::default(), &Machine::probe(Vec::new()))?;
    let mut capacity = capacity(config.model.vocab_size);
    capacity.max_num_seqs = 4 * CLIENTS;
    let executor = ScriptedExecutor::replying(capacity, |_| vec![20; TOKENS]);
    serve::build_app(&config, Box::new(executor))
}

async fn plain_answer(axum::Json(request): axum::Json<Value>) -> axum::Json<Value> {
    axum::Json(json!({
        "id": "cmpl-0", "object": "text_completion", "created": 0, "model": request["model"],
        "choices": [{"index": 0, "text": "eight words that stand for a short answer", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": TOKENS, "total_tokens": 4 + TOKENS},
    }))
}

fn raw_request(method: &str, path: &str, body: Option<&Value>) -> Vec<u8> {
    let body = body.map_or_else(String::new, Value::to_string);
    format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Answers per second over keep-alive connections.
async fn rate(address: SocketAddr, request: &[u8], time: Duration) -> anyhow::Result<f64> {
    let count = Arc::new(AtomicU64::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (count, over, request) = (count.clone(), over.clone(), request.to_vec());
            tokio::spawn(async move {
                let mut connection = TcpStream::connect(address).await?;
                connection.set_nodelay(true)?;
                while !over.load(Ordering::Relaxed) {
                    connection.write_all(&request).await?;
                    read_answer(&mut connection).await?;
                    count.fetch_add(1, Ordering::Relaxed);
                }
                anyhow::Ok(())
            })
        })
        .collect();
    // The first answers warm everything up.
    tokio::time::sleep(time / 5).await;
    let (before, start) = (count.load(Ordering::Relaxed), Instant::now());
    tokio::time::sleep(time).await;
    let rate = (count.load(Ordering::Relaxed) - before) as f64 / start.elapsed().as_secs_f64();
    over.store(true, Ordering::Relaxed);
    for client in clients {
        client.await??;
    }
    Ok(rate)
}

/// Reads one 200 to its end: by its length, or by the last chunk.
async fn read_answer(connection: &mut TcpStream) -> anyhow::Result<()> {
    let mut answer = Vec::with_capacity(4096);
    loop {
        let read = connection.read_buf(&mut answer).await?;
        ensure!(read > 0, "the connection was closed");
        let Some(head_end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else {
            continue;
        };
        let head = String::from_utf8_lossy(&answer[..head_end]).to_ascii_lowercase();
        ensure!(head.starts_with("http/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        let is_whole = match length {
            Some(length) => answer.len() >= head_end + 4 + length,
            None => answer.ends_with(b"0\r\n\r\n"),
        };
        if is_whole {
            return Ok(());
        }
    }
}
