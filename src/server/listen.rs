//! Sockets: bound before the model loads, listening once it serves, drained at the end.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixSocket, UnixStream};
use tower::ServiceExt;

use super::middleware::Peer;
use super::tls::Tls;
use crate::config::http::HttpLimits;

const BACKLOG: u32 = 2048;
/// What a head may take to arrive where no connection is kept alive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// What a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after `accept` failed, which mostly means that the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// An address that is ours but refuses connections until [`Bound::listen`].
#[derive(Debug)]
pub enum Bound {
    Tcp(TcpSocket),
    Unix(UnixSocket, SocketFile),
}

/// Removes a Unix socket's file when the server is done with it.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.0);
    }
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
    Ok(Bound::Tcp(socket))
}

/// Takes the path. A socket that a dead server left there is replaced; anything else is left alone.
///
/// # Errors
/// The path is in use, too long, or not permitted.
pub fn bind_unix(path: &Path) -> io::Result<Bound> {
    let is_stale = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
        && std::os::unix::net::UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if is_stale {
        std::fs::remove_file(path)?;
    }
    let socket = UnixSocket::new_stream()?;
    socket.bind(path)?;
    Ok(Bound::Unix(socket, SocketFile(path.to_owned())))
}

impl Bound {
    /// None of a Unix socket.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Bound::Tcp(socket) => socket.local_addr().ok(),
            Bound::Unix(..) => None,
        }
    }

    /// # Errors
    /// As the system call's.
    pub fn listen(self) -> io::Result<Listener> {
        Ok(match self {
            Bound::Tcp(socket) => Listener::Tcp(socket.listen(BACKLOG)?),
            Bound::Unix(socket, file) => Listener::Unix(socket.listen(BACKLOG)?, file),
        })
    }
}

/// Accepts connections.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

enum Stream {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Listener {
    async fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // Tokens leave one by one; waiting to fill packets would delay each of them.
                let _ = stream.set_nodelay(true);
                Ok(Stream::Tcp(stream, peer))
            }
            Listener::Unix(listener, _) => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

/// How connections are served.
#[derive(Clone, Debug, Default)]
pub struct ListenOptions {
    pub limits: HttpLimits,
    /// None = plain HTTP.
    pub tls: Option<Arc<Tls>>,
    /// What open connections get after the end to finish their responses.
    pub drain: Duration,
}

/// Serves until `stop`.
pub async fn serve(listener: Listener, router: Router, options: ListenOptions, stop: impl Future<Output = ()>) {
    let graceful = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let stream = tokio::select! {
            biased;
            () = &mut stop => break,
            accepted = listener.accept() => match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!("a connection could not be accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let connection = Connection {
            router: router.clone(),
            limits: options.limits,
            watcher: graceful.watcher(),
        };
        let tls = options.tls.clone();
        tokio::spawn(async move {
            match stream {
                Stream::Tcp(stream, peer) => connection.secure_and_run(stream, Some(peer), tls).await,
                Stream::Unix(stream) => connection.secure_and_run(stream, None, tls).await,
            }
        });
    }
    drop(listener);
    if tokio::time::timeout(options.drain, graceful.shutdown()).await.is_err() {
        tracing::warn!(
            "connections were still open {} s after the shutdown signal",
            options.drain.as_secs()
        );
    }
}

/// One accepted connection.
struct Connection {
    router: Router,
    limits: HttpLimits,
    watcher: Watcher,
}

impl Connection {
    async fn secure_and_run<S>(self, stream: S, peer: Option<SocketAddr>, tls: Option<Arc<Tls>>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Some(tls) = tls else {
            return self.run(stream, peer).await;
        };
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.acceptor().accept(stream)).await {
            Ok(Ok(stream)) => self.run(stream, peer).await,
            Ok(Err(error)) => tracing::debug!("the TLS handshake with {peer:?} failed: {error}"),
            Err(_) => tracing::debug!("the TLS handshake with {peer:?} took too long"),
        }
    }

    async fn run<S>(self, stream: S, peer: Option<SocketAddr>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Self {
            router,
            limits,
            watcher,
        } = self;
        let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
            let mut request: Request = request.map(axum::body::Body::new);
            if let Some(peer) = peer {
                request.extensions_mut().insert(Peer(peer));
            }
            router.clone().oneshot(request)
        });
        let keeps_alive = limits.keep_alive_s > 0;
        let head_timeout = match keeps_alive {
            true => Duration::from_secs(limits.keep_alive_s),
            false => HEAD_TIMEOUT,
        };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .keep_alive(keeps_alive)
            .header_read_timeout(head_timeout)
            .max_headers(limits.max_headers)
            .max_header_size(limits.max_head_bytes)
            .max_buf_size(limits.max_head_bytes)
            .serve_connection(TokioIo::new(stream), service);
        if let Err(error) = watcher.watch(connection).await {
            tracing::debug!("the connection with {peer:?} ended: {error}");
        }
    }
}
