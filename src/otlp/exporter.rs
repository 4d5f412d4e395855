//! The thread that sends batches of spans: OTLP over gRPC or over HTTP, one connection per batch.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response, Uri, body::Incoming, header};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;

use super::{Message, Span, TracerError, proto};
use crate::config::observability::{OtlpProtocol, TracesConfig};
use crate::metrics::SpanCounters;

const GRPC_PATH: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
/// Pause before the one repetition of an export that may succeed later.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
const USER_AGENT: &str = concat!("rvllm/", env!("CARGO_PKG_VERSION"));

pub struct Exporter {
    config: TracesConfig,
    counters: SpanCounters,
    target: Target,
    /// The last export failed: the next failure is not worth another line.
    failing: bool,
}

/// The endpoint, taken apart.
#[derive(Clone, Debug)]
struct Target {
    host: String,
    port: u16,
    path: String,
    tls: Option<TlsParts>,
}

#[derive(Clone)]
struct TlsParts {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl std::fmt::Debug for TlsParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.name.fmt(f)
    }
}

/// Why an export failed.
struct Failure {
    message: String,
    /// It may succeed later.
    retry: bool,
}

impl Failure {
    /// The network's fault, or a collector that is still starting.
    fn transport(error: impl std::fmt::Display) -> Self {
        Self {
            message: error.to_string(),
            retry: true,
        }
    }
}

/// A connection, encrypted or not.
trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

impl Exporter {
    pub fn new(config: TracesConfig, counters: SpanCounters) -> Result<Self, TracerError> {
        let target = Target::new(&config)?;
        Ok(Self {
            config,
            counters,
            target,
            failing: false,
        })
    }

    /// Exports until every tracer is gone.
    pub async fn run(mut self, mut queue: mpsc::Receiver<Message>) {
        let mut batch = Vec::new();
        while let Some(message) = queue.recv().await {
            let deadline = Instant::now() + self.config.schedule_delay;
            let mut next = Some(message);
            let mut flushed = None;
            while let Some(message) = next.take() {
                match message {
                    Message::Span(span) => batch.push(*span),
                    Message::Flush(done) => {
                        flushed = Some(done);
                        break;
                    }
                }
                if batch.len() >= self.config.max_export_batch_size {
                    break;
                }
                next = timeout_at(deadline, queue.recv()).await.ok().flatten();
            }
            if !batch.is_empty() {
                self.deliver(&batch).await;
                batch.clear();
            }
            if let Some(done) = flushed {
                // Whoever asked may have stopped waiting.
                let _ = done.send(());
            }
        }
    }

    async fn deliver(&mut self, batch: &[Span]) {
        let request = Bytes::from(proto::export_request(&self.config.resource, batch));
        let mut result = self.attempt(request.clone()).await;
        if result.as_ref().is_err_and(|failure| failure.retry) {
            tokio::time::sleep(RETRY_PAUSE).await;
            result = self.attempt(request).await;
        }
        match result {
            Ok(()) => {
                self.counters.exported.inc_by(batch.len() as u64);
                self.failing = false;
            }
            Err(failure) => {
                self.counters.dropped.inc_by(batch.len() as u64);
                if !self.failing {
                    tracing::warn!(
                        "{} spans could not be exported to {}: {} (said once until it works again)",
                        batch.len(),
                        self.config.endpoint,
                        failure.message
                    );
                }
                self.failing = true;
            }
        }
    }

    async fn attempt(&self, request: Bytes) -> Result<(), Failure> {
        let send = async {
            let stream = self.target.connect().await.map_err(Failure::transport)?;
            match self.config.protocol {
                OtlpProtocol::Grpc => self.send_grpc(stream, request).await,
                OtlpProtocol::HttpProtobuf => self.send_http(stream, request).await,
            }
        };
        timeout(self.config.timeout, send)
            .await
            .unwrap_or_else(|_| Err(Failure::transport("no answer in time")))
    }

    async fn send_grpc(&self, stream: Box<dyn Io>, request: Bytes) -> Result<(), Failure> {
        let mut framed = BytesMut::with_capacity(5 + request.len());
        framed.put_u8(0);
        framed.put_u32(request.len() as u32);
        framed.put(request);
        let scheme = if self.target.tls.is_some() { "https" } else { "http" };
        let uri = format!("{scheme}://{}{GRPC_PATH}", self.target.authority());
        let request = self.request(&uri, "application/grpc", framed.freeze())?;
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(Failure::transport)?;
        // It ends when the sender is dropped.
        tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(Failure::transport)?;
        let status = response.status();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map_err(Failure::transport)?;
        let field = |name: &str| {
            let trailers = body.trailers().unwrap_or(&parts.headers);
            let value = trailers.get(name).or_else(|| parts.headers.get(name))?;
            Some(value.to_str().ok()?.to_owned())
        };
        match field("grpc-status").as_deref() {
            Some("0") => Ok(()),
            Some(code) => Err(Failure {
                message: format!("gRPC status {code} {}", field("grpc-message").unwrap_or_default()),
                // DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, ABORTED, UNAVAILABLE.
                retry: matches!(code, "4" | "8" | "10" | "14"),
            }),
            None => Err(Failure {
                message: format!("HTTP status {status} without a gRPC status"),
                retry: status.is_server_error(),
            }),
        }
    }

    async fn send_http(&self, stream: Box<dyn Io>, request: Bytes) -> Result<(), Failure> {
        let mut request = self.request(&self.target.path, "application/x-protobuf", request)?;
        let authority = self.target.authority().parse().map_err(Failure::transport)?;
        request.headers_mut().insert(header::HOST, authority);
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(Failure::transport)?;
        tokio::spawn(connection);
        let response: Response<Incoming> = sender.send_request(request).await.map_err(Failure::transport)?;
        match response.status() {
            status if status.is_success() => Ok(()),
            status => Err(Failure {
                message: format!("HTTP status {status}"),
                retry: matches!(status.as_u16(), 429 | 502 | 503 | 504),
            }),
        }
    }

    fn request(&self, uri: &str, content_type: &str, body: Bytes) -> Result<Request<Full<Bytes>>, Failure> {
        let mut builder = Request::post(uri)
            .header(header::CONTENT_TYPE, content_type)
            .header(header::USER_AGENT, USER_AGENT);
        if self.config.protocol == OtlpProtocol::Grpc {
            builder = builder.header(header::TE, "trailers");
        }
        for (name, value) in &self.config.headers {
            builder = builder.header(name, value);
        }
        builder.body(Full::new(body)).map_err(|error| Failure {
            message: error.to_string(),
            retry: false,
        })
    }
}

impl Target {
    fn new(config: &TracesConfig) -> Result<Self, TracerError> {
        let wrong = |message: &str| TracerError::Endpoint(format!("'{}' {message}", config.endpoint));
        // `http` knows no URI with an authority and a scheme of its own that lacks a path; `host:port` alone it does.
        let uri: Uri = config.endpoint.parse().map_err(|_| wrong("is no URL"))?;
        let host = uri.host().ok_or_else(|| wrong("names no host"))?.to_owned();
        let encrypted = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            Some("grpc") | None if config.protocol == OtlpProtocol::Grpc => !config.insecure,
            _ => return Err(wrong("has no scheme that is known: http, https or grpc")),
        };
        let port = uri.port_u16().unwrap_or(match (config.protocol, encrypted) {
            (OtlpProtocol::Grpc, _) => 4317,
            (OtlpProtocol::HttpProtobuf, true) => 443,
            (OtlpProtocol::HttpProtobuf, false) => 80,
        });
        let path = match uri.path_and_query().map(|path| path.as_str()) {
            None | Some("") => "/".to_owned(),
            Some(path) => path.to_owned(),
        };
        let tls = encrypted
            .then(|| {
                let bare = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                let name = ServerName::try_from(bare).map_err(|_| wrong("has no valid host name"))?;
                let connector = connector(config)?;
                Ok(TlsParts { connector, name })
            })
            .transpose()?;
        Ok(Self { host, port, path, tls })
    }

    fn authority(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    async fn connect(&self) -> std::io::Result<Box<dyn Io>> {
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((host, self.port)).await?;
        match &self.tls {
            None => Ok(Box::new(stream)),
            Some(tls) => Ok(Box::new(tls.connector.connect(tls.name.clone(), stream).await?)),
        }
    }
}

fn connector(config: &TracesConfig) -> Result<TlsConnector, TracerError> {
    let mut roots = RootCertStore::empty();
    match &config.ca_file {
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Some(path) => {
            let fail = |error: &dyn std::fmt::Display| TracerError::Certificate(format!("{}: {error}", path.display()));
            for certificate in CertificateDer::pem_file_iter(path).map_err(|error| fail(&error))? {
                roots
                    .add(certificate.map_err(|error| fail(&error))?)
                    .map_err(|error| fail(&error))?;
            }
        }
    }
    let mut client = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| TracerError::Certificate(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    if config.protocol == OtlpProtocol::Grpc {
        client.alpn_protocols = vec![b"h2".to_vec()];
    }
    Ok(TlsConnector::from(Arc::new(client)))
}
