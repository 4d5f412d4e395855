//! W3C trace context: the caller's place in its trace.

use std::future::Future;

pub const TRACE_PARENT: &str = "traceparent";
pub const TRACE_STATE: &str = "tracestate";
/// Longest `tracestate` that is passed on.
const MAX_STATE_BYTES: usize = 512;

/// The span that called this server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    pub trace_id: [u8; 16],
    pub span_id: [u8; 8],
    pub sampled: bool,
    /// `tracestate`, unread.
    pub state: String,
}

impl TraceContext {
    /// Reads the headers' values; none where `traceparent` is not valid, which starts a new trace.
    pub fn parse(parent: &str, state: Option<&str>) -> Option<Self> {
        let mut fields = parent.trim().split('-');
        let (version, trace_id, span_id, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let [version] = hex::<1>(version)?;
        // Version 0 ends here; later ones may add fields.
        if version == 0xff || (version == 0 && fields.next().is_some()) {
            return None;
        }
        let context = Self {
            trace_id: hex(trace_id)?,
            span_id: hex(span_id)?,
            sampled: hex::<1>(flags)?[0] & 1 == 1,
            state: state
                .filter(|state| state.len() <= MAX_STATE_BYTES)
                .unwrap_or_default()
                .to_owned(),
        };
        (context.trace_id != [0; 16] && context.span_id != [0; 8]).then_some(context)
    }
}

/// Lower-case hexadecimal of exactly `N` bytes.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}

tokio::task_local! {
    static CONTEXT: TraceContext;
}

/// Runs `work` inside the caller's trace.
pub async fn in_context<F: Future>(context: Option<TraceContext>, work: F) -> F::Output {
    match context {
        Some(context) => CONTEXT.scope(context, work).await,
        None => work.await,
    }
}

/// The context of the current task.
pub fn current() -> Option<TraceContext> {
    CONTEXT.try_with(Clone::clone).ok()
}
