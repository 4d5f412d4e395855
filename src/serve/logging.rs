//! Log lines in vLLM's form: `(APIServer pid=7) INFO 11-23 21:06:00 [file.rs:195] message`.

use std::fmt;
use std::io::IsTerminal;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::logging::LoggingConfig;

/// Starts logging; later calls change nothing.
pub fn init(config: &LoggingConfig) {
    let Some(level) = config.level else { return };
    let color = config.color.unwrap_or_else(|| match config.to_stderr {
        true => std::io::stderr().is_terminal(),
        false => std::io::stdout().is_terminal(),
    });
    // Other crates speak only when something is wrong.
    let targets = Targets::new()
        .with_default(level.min(Level::WARN))
        .with_target("rvllm", level);
    let layer = tracing_subscriber::fmt::layer()
        .event_format(VllmFormat {
            pid: std::process::id(),
        })
        .with_ansi(color)
        .with_writer(Output {
            to_stderr: config.to_stderr,
        });
    // A test or an embedding program may have installed a subscriber before; its choice stands.
    let _ = tracing_subscriber::registry().with(targets).with(layer).try_init();
}

#[derive(Clone, Copy, Debug)]
struct Output {
    to_stderr: bool,
}

impl<'a> MakeWriter<'a> for Output {
    type Writer = Box<dyn std::io::Write>;

    fn make_writer(&'a self) -> Self::Writer {
        if self.to_stderr {
            Box::new(std::io::stderr())
        } else {
            Box::new(std::io::stdout())
        }
    }
}

struct VllmFormat {
    pid: u32,
}

impl<S, N> FormatEvent<S, N> for VllmFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        let mut text = Message::default();
        event.record(&mut text);
        let file = metadata.file().and_then(|file| file.rsplit('/').next()).unwrap_or("-");
        let (name, color) = level(metadata.level());
        let name = if writer.has_ansi_escapes() {
            format!("\x1b[{color}m{name}\x1b[0m")
        } else {
            name.to_owned()
        };
        let prefix = format!(
            "(APIServer pid={}) {name} {} [{file}:{}]",
            self.pid,
            chrono::Local::now().format("%m-%d %H:%M:%S"),
            metadata.line().unwrap_or(0),
        );
        for line in text.whole().lines() {
            writeln!(writer, "{prefix} {line}")?;
        }
        Ok(())
    }
}

/// Python's name of a level and its colour.
fn level(level: &Level) -> (&'static str, u8) {
    match *level {
        Level::ERROR => ("ERROR", 31),
        Level::WARN => ("WARNING", 33),
        Level::INFO => ("INFO", 32),
        Level::DEBUG | Level::TRACE => ("DEBUG", 37),
    }
}

/// The event's message, then its other fields.
#[derive(Default)]
struct Message {
    message: String,
    fields: String,
}

impl Message {
    fn whole(self) -> String {
        self.message + &self.fields
    }
}

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        use fmt::Write as _;
        // Writing into a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn each_line_has_vllms_prefix() {
        let captured = Captured::default();
        let writer = captured.clone();
        let layer = tracing_subscriber::fmt::layer()
            .event_format(VllmFormat { pid: 7 })
            .with_ansi(false)
            .with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::warn!(slots = 3, "first\nsecond");
        });
        let text = String::from_utf8(captured.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].starts_with("(APIServer pid=7) WARNING "), "{text}");
        assert!(
            lines[0].contains("[logging.rs:") && lines[0].ends_with("] first"),
            "{text}"
        );
        assert!(lines[1].ends_with("] second slots=3"), "{text}");
    }
}
