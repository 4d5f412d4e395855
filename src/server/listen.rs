//! Sockets: bound before the model loads, listening once it serves, drained at the end.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpSocket};
use tower::ServiceExt;

use super::middleware::Peer;

const BACKLOG: u32 = 2048;
const MAX_HEADERS: usize = 256;
/// Bytes of one request's head.
const MAX_HEAD_BYTES: usize = 1 << 20;
/// Pause after `accept` failed, which mostly means that the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A port that is ours but refuses connections until [`Bound::listen`].
pub struct Bound {
    socket: TcpSocket,
    address: SocketAddr,
}

/// Takes the port.
///
/// # Errors
/// The host name does not resolve, or the port is taken or not permitted.
pub fn bind(host: Option<&str>, port: u16) -> io::Result<Bound> {
    let host = match host {
        None | Some("") => "0.0.0.0",
        Some(host) => host,
    };
    let wanted = (host, port)
        .to_socket_addrs()?
        .next()
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("host {host:?} has no address")))?;
    let socket = if wanted.is_ipv6() {
        TcpSocket::new_v6()?
    } else {
        TcpSocket::new_v4()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(wanted)?;
    let address = socket.local_addr()?;
    Ok(Bound { socket, address })
}

impl Bound {
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// # Errors
    /// As the system call's.
    pub fn listen(self) -> io::Result<TcpListener> {
        self.socket.listen(BACKLOG)
    }
}

/// Serves until `stop`, then lets open connections finish their responses for `drain`.
///
/// `keep_alive` bounds how long a connection may stay idle, and how long a request's head may take.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    keep_alive: Duration,
    stop: impl Future<Output = ()>,
    drain: Duration,
) {
    let graceful = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let (stream, peer) = tokio::select! {
            biased;
            () = &mut stop => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("a connection could not be accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        // Tokens leave one by one; waiting to fill packets would delay each of them.
        let _ = stream.set_nodelay(true);
        let router = router.clone();
        let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
            let mut request: Request = request.map(axum::body::Body::new);
            request.extensions_mut().insert(Peer(peer));
            router.clone().oneshot(request)
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(keep_alive)
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("the connection with {peer} ended: {error}");
            }
        });
    }
    drop(listener);
    if tokio::time::timeout(drain, graceful.shutdown()).await.is_err() {
        tracing::warn!(
            "connections were still open {} s after the shutdown signal",
            drain.as_secs()
        );
    }
}
