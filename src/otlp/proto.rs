//! `opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest` as protobuf bytes.
//!
//! A dozen fields of eight messages that are frozen: the numbers below are those of opentelemetry-proto 1.x. See
//! docs/decisions for why no crate does this.

use super::{Span, Value};

/// Wire types.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;

/// `Span.kind`.
const SPAN_KIND_SERVER: u64 = 2;
/// `Status.code`.
const STATUS_ERROR: u64 = 2;
/// The instrumentation's name, as vLLM's.
const SCOPE: &str = "vllm.llm_engine";

/// The request that carries `spans`.
pub fn export_request(resource: &[(String, String)], spans: &[Span]) -> Vec<u8> {
    message(|request| {
        request.message(1, |resource_spans| {
            resource_spans.message(1, |out| {
                for (key, value) in resource {
                    out.attribute(1, key, &Value::Text(value.clone()));
                }
            });
            resource_spans.message(2, |scope_spans| {
                scope_spans.message(1, |scope| {
                    scope.text(1, SCOPE);
                    scope.text(2, env!("CARGO_PKG_VERSION"));
                });
                for span in spans {
                    scope_spans.message(2, |out| out.span(span));
                }
            });
        });
    })
}

fn message(fill: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut writer = Writer(Vec::new());
    fill(&mut writer);
    writer.0
}

struct Writer(Vec<u8>);

impl Writer {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(&mut self, field: u64, wire_type: u64) {
        self.varint(field << 3 | wire_type);
    }

    fn number(&mut self, field: u64, value: u64) {
        self.key(field, VARINT);
        self.varint(value);
    }

    fn fixed64(&mut self, field: u64, value: u64) {
        self.key(field, FIXED64);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, BYTES);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    /// Absent when empty, as proto3 has it.
    fn text(&mut self, field: u64, value: &str) {
        if !value.is_empty() {
            self.bytes(field, value.as_bytes());
        }
    }

    fn message(&mut self, field: u64, fill: impl FnOnce(&mut Writer)) {
        self.bytes(field, &message(fill));
    }

    /// A `KeyValue` with its `AnyValue`.
    fn attribute(&mut self, field: u64, key: &str, value: &Value) {
        self.message(field, |pair| {
            pair.text(1, key);
            pair.message(2, |any| match value {
                Value::Text(text) => any.bytes(1, text.as_bytes()),
                Value::Int(int) => any.number(3, *int as u64),
                Value::Double(double) => any.fixed64(4, double.to_bits()),
            });
        });
    }

    fn span(&mut self, span: &Span) {
        self.bytes(1, &span.ids.trace_id);
        self.bytes(2, &span.ids.span_id);
        self.text(3, &span.ids.trace_state);
        if let Some(parent) = &span.ids.parent_span_id {
            self.bytes(4, parent);
        }
        self.text(5, span.name);
        self.number(6, SPAN_KIND_SERVER);
        self.fixed64(7, span.start_unix_ns);
        self.fixed64(8, span.end_unix_ns);
        for (key, value) in &span.attributes {
            self.attribute(9, key, value);
        }
        if let Some(error) = &span.error {
            self.message(15, |status| {
                status.text(2, error);
                status.number(3, STATUS_ERROR);
            });
        }
    }
}
