//! The surface over real sockets: what only a connection can do.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::config::http::HttpLimits;
use crate::server::listen::{self, ListenOptions};

/// A server on a port of its own.
struct Listening {
    server: Server,
    address: std::net::SocketAddr,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

async fn listening(setup: Setup) -> Listening {
    let server = setup.start();
    let bound = listen::bind(Some("127.0.0.1"), 0).unwrap();
    let address = bound.address().unwrap();
    assert!(TcpStream::connect(address).await.is_err(), "bound is not listening");
    let (stop, stopped) = oneshot::channel::<()>();
    let wait = async {
        let _ = stopped.await;
    };
    let options = ListenOptions {
        limits: HttpLimits {
            keep_alive_s: 1,
            ..HttpLimits::default()
        },
        tls: None,
        drain: Duration::from_secs(5),
    };
    let listener = bound.listen().unwrap();
    let serving = tokio::spawn(listen::serve(listener, server.router.clone(), options, wait));
    Listening {
        server,
        address,
        stop,
        serving,
    }
}

/// Sends raw bytes and reads until the other side closes.
async fn exchange(address: std::net::SocketAddr, request: &[u8]) -> String {
    let mut connection = TcpStream::connect(address).await.unwrap();
    // The server may answer and close before it has read all.
    let _ = connection.write_all(request).await;
    let mut answer = Vec::new();
    let _ = connection.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

fn raw_post(body: &str) -> String {
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_connection_frees_the_slot() {
    let listening = listening(Setup::default()).await;
    listening.server.control.set_step_delay(Duration::from_millis(5));
    for stream in [true, false] {
        let body = format!(r#"{{"prompt":"a","max_tokens":400,"ignore_eos":true,"stream":{stream}}}"#);
        let mut connection = TcpStream::connect(listening.address).await.unwrap();
        connection.write_all(raw_post(&body).as_bytes()).await.unwrap();
        listening.server.running(1).await;
        let steps = listening.server.control.counters().steps;
        drop(connection);
        listening.server.idle().await;
        assert!(
            listening.server.control.counters().steps < steps + 200,
            "it ran to its end"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_requests_hurt_nobody() {
    let listening = listening(Setup::default()).await;
    let many_headers: String = (0..300).map(|i| format!("h{i}: v\r\n")).collect();
    for request in [
        format!("GET /health HTTP/1.1\r\nhost: x\r\n{many_headers}\r\n"),
        format!(
            "GET /health HTTP/1.1\r\nhost: x\r\nlong: {}\r\n\r\n",
            "a".repeat(5 << 20)
        ),
        "\u{16}\u{3}\u{1} not http at all\r\n\r\n".to_owned(),
        "GET /health HTTP/1.1\r\nhost: x\r\n".to_owned(),
    ] {
        let answer = exchange(listening.address, request.as_bytes()).await;
        assert!(!answer.contains(" 200 OK"), "{answer}");
    }
    let answer = exchange(
        listening.address,
        b"GET http://elsewhere/health HTTP/1.1\r\nhost: y\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_streams_end_when_the_engine_drains() {
    let listening = listening(Setup::default()).await;
    listening.server.control.set_step_delay(Duration::from_millis(5));
    let body = r#"{"prompt":"a","max_tokens":400,"ignore_eos":true,"stream":true}"#;
    let address = listening.address;
    let answer = tokio::spawn(async move { exchange(address, raw_post(body).as_bytes()).await });
    listening.server.running(1).await;
    listening.server.engine.drain(std::time::Instant::now()).await;
    drop(listening.stop);
    let answer = answer.await.unwrap();
    assert!(
        answer.contains(r#""type":"Service Unavailable""#) && answer.contains("data: [DONE]"),
        "{answer}"
    );
    listening.serving.await.unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}
