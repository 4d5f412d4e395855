use std::convert::Infallible;
use std::sync::Mutex;

use bytes::Bytes;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

use super::*;
use crate::config::observability::OtlpProtocol;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[test]
fn trace_parents_are_read_or_start_a_new_trace() {
    let context = TraceContext::parse(PARENT, Some("a=b")).unwrap();
    assert_eq!(context.trace_id[..2], [0x4b, 0xf9]);
    assert_eq!(context.span_id[6..], [0x02, 0xb7]);
    assert!(context.sampled && context.state == "a=b");
    assert!(
        !TraceContext::parse(&PARENT.replace("-01", "-00"), None)
            .unwrap()
            .sampled
    );
    assert!(TraceContext::parse(&format!("01{}-future", &PARENT[2..]), None).is_some());
    for wrong in [
        "",
        "x",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
    ] {
        assert_eq!(TraceContext::parse(wrong, None), None, "{wrong}");
    }
}

fn config(endpoint: &str, protocol: OtlpProtocol) -> TracesConfig {
    TracesConfig {
        endpoint: endpoint.into(),
        protocol,
        insecure: true,
        ca_file: None,
        headers: vec![("api-key".into(), "k".into())],
        timeout: Duration::from_secs(5),
        resource: vec![("service.name".into(), "test".into())],
        sampler: Sampler {
            parent_based: true,
            ratio: 1.0,
        },
        max_queue_size: 4,
        max_export_batch_size: 512,
        schedule_delay: Duration::from_millis(10),
    }
}

fn counters() -> SpanCounters {
    crate::metrics::Metrics::new("m", 10).span_counters()
}

fn span(ids: SpanIds) -> Span {
    Span {
        name: "llm_request",
        ids,
        start_unix_ns: 1,
        end_unix_ns: 2,
        attributes: vec![
            ("gen_ai.request.id", Value::Text("cmpl-1".into())),
            ("gen_ai.usage.prompt_tokens", Value::Int(300)),
            ("gen_ai.latency.e2e", Value::Double(0.5)),
        ],
        error: None,
    }
}

/// What a collector was sent.
#[derive(Clone, Default)]
struct Received(Arc<Mutex<Vec<(String, HeaderMap, Bytes)>>>);

/// Answers `answers` connections, over HTTP/2 with a gRPC status or over HTTP/1.1 with a 200.
async fn collector(grpc: bool) -> (String, Received) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let received = Received::default();
    let store = received.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let store = store.clone();
            let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                let store = store.clone();
                async move {
                    let (parts, body) = request.into_parts();
                    let bytes = body.collect().await.unwrap().to_bytes();
                    store
                        .0
                        .lock()
                        .unwrap()
                        .push((parts.uri.path().to_owned(), parts.headers, bytes));
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", "0".parse().unwrap());
                    let frames = [Ok::<_, Infallible>(Frame::<Bytes>::trailers(trailers))];
                    let frames = futures_util::stream::iter(if grpc { Vec::from(frames) } else { Vec::new() });
                    Ok::<_, Infallible>(Response::new(StreamBody::new(frames)))
                }
            });
            if grpc {
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
            } else {
                let server = hyper::server::conn::http1::Builder::new();
                tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
            }
        }
    });
    (address.to_string(), received)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_arrive_over_grpc_and_over_http() {
    for (grpc, path) in [
        (true, "/opentelemetry.proto.collector.trace.v1.TraceService/Export"),
        (false, "/v1/traces"),
    ] {
        let (address, received) = collector(grpc).await;
        let (endpoint, protocol) = match grpc {
            true => (format!("grpc://{address}"), OtlpProtocol::Grpc),
            false => (format!("http://{address}/v1/traces"), OtlpProtocol::HttpProtobuf),
        };
        let counters = counters();
        let tracer = Tracer::start(config(&endpoint, protocol), counters.clone()).unwrap();
        let parent = TraceContext::parse(PARENT, None);
        let ids = in_context(parent.clone(), async { tracer.begin().unwrap() }).await;
        let parent = parent.unwrap();
        assert_eq!(
            (ids.trace_id, ids.parent_span_id),
            (parent.trace_id, Some(parent.span_id))
        );
        tracer.export(span(ids.clone()));
        tracer.flush(Duration::from_secs(10)).await;
        let received = received.0.lock().unwrap();
        let (found_path, headers, body) = &received[0];
        assert_eq!(
            (found_path.as_str(), &headers["api-key"]),
            (path, &"k".parse().unwrap())
        );
        let message = proto::export_request(&config(&endpoint, protocol).resource, &[span(ids)]);
        let sent = if grpc { &body[5..] } else { &body[..] };
        assert_eq!(sent, message);
        if grpc {
            assert_eq!(
                body[..5],
                [[0].as_slice(), &(message.len() as u32).to_be_bytes()].concat()
            );
        }
        assert_eq!((counters.exported.get(), counters.dropped.get()), (1, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_away_costs_spans_and_no_time() {
    let counters = counters();
    let mut config = config("http://127.0.0.1:1", OtlpProtocol::Grpc);
    config.max_export_batch_size = 1;
    let tracer = Tracer::start(config, counters.clone()).unwrap();
    let ids = tracer.begin().unwrap();
    for _ in 0..100 {
        tracer.export(span(ids.clone()));
    }
    // The queue holds four, and one may be on its way: all others are dropped at once.
    assert!(counters.dropped.get() >= 95, "{}", counters.dropped.get());
    assert_eq!(counters.exported.get(), 0);
}

#[tokio::test]
async fn the_callers_decision_counts() {
    let tracer = Tracer::start(config("grpc://127.0.0.1:1", OtlpProtocol::Grpc), counters()).unwrap();
    let unsampled = TraceContext::parse(&PARENT.replace("-01", "-00"), None);
    assert_eq!(in_context(unsampled, async { tracer.begin() }).await, None);
    assert!(tracer.begin().unwrap().parent_span_id.is_none());
    assert!(keeps(0.5, &[0; 16]) && !keeps(0.5, &[0xff; 16]) && !keeps(0.0, &[0; 16]) && keeps(1.0, &[0xff; 16]));
}

#[test]
fn unusable_endpoints_are_named() {
    for endpoint in ["", "/v1/traces", "ftp://x", "not a url"] {
        let error = Tracer::start(config(endpoint, OtlpProtocol::Grpc), counters()).unwrap_err();
        assert!(error.to_string().starts_with("--otlp-traces-endpoint"), "{error}");
    }
    assert!(Tracer::start(config("collector:4317", OtlpProtocol::Grpc), counters()).is_ok());
    assert!(Tracer::start(config("collector:4318", OtlpProtocol::HttpProtobuf), counters()).is_err());
}

#[test]
fn the_request_is_protobuf() {
    let ids = SpanIds {
        trace_id: [1; 16],
        span_id: [2; 8],
        parent_span_id: None,
        trace_state: String::new(),
    };
    let span = Span {
        attributes: vec![("n", Value::Int(300))],
        error: Some("x".into()),
        ..span(ids)
    };
    let bytes = proto::export_request(&[], &[span]);
    // The span ends: attribute 9 {1: "n", 2: {3: 300}}, status 15 {2: "x", 3: 2}.
    let end = [
        &[0x4a, 8, 0x0a, 1, b'n', 0x12, 3, 0x18, 0xac, 0x02][..],
        &[0x7a, 5, 0x12, 1, b'x', 0x18, 2],
    ]
    .concat();
    assert!(bytes.ends_with(&end), "{bytes:x?}");
    // The request: field 1, a length; resource 1 empty; scope spans 2.
    assert_eq!((bytes[0], bytes[2..5].to_vec()), (0x0a, vec![0x0a, 0, 0x12]));
}
