//! How far downloads are: bars on a terminal, log lines elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tracing::info;

/// Between two log lines of one file.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// All downloads of a snapshot.
pub struct Progress {
    bars: Option<MultiProgress>,
}

/// One file's download.
pub enum FileProgress {
    Bar(ProgressBar),
    Log {
        name: String,
        total_bytes: Option<u64>,
        state: Mutex<(u64, Instant)>,
    },
}

impl Progress {
    pub fn new() -> Self {
        Self {
            bars: std::io::stderr().is_terminal().then(MultiProgress::new),
        }
    }

    pub fn file(&self, name: &str, total_bytes: Option<u64>) -> FileProgress {
        let Some(bars) = &self.bars else {
            let state = Mutex::new((0, Instant::now()));
            return FileProgress::Log {
                name: name.to_owned(),
                total_bytes,
                state,
            };
        };
        let template = "{msg:34!} {bar:30} {bytes:>11}/{total_bytes:11} {bytes_per_sec:>13} {eta:>5}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = bars.add(ProgressBar::new(total_bytes.unwrap_or(0)).with_style(style));
        bar.set_message(name.to_owned());
        FileProgress::Bar(bar)
    }
}

impl FileProgress {
    /// `bytes` of the file are there.
    pub fn at(&self, bytes: u64) {
        match self {
            FileProgress::Bar(bar) => bar.set_position(bytes),
            FileProgress::Log {
                name,
                total_bytes,
                state,
            } => {
                let mut state = state.lock().unwrap_or_else(|e| e.into_inner());
                let elapsed = state.1.elapsed();
                if elapsed < LOG_INTERVAL {
                    return;
                }
                let rate = bytes.saturating_sub(state.0) as f64 / elapsed.as_secs_f64() / 1e6;
                match total_bytes {
                    Some(total) => info!(
                        "{name}: {} of {} MB, {rate:.1} MB/s",
                        bytes / 1_000_000,
                        total / 1_000_000
                    ),
                    None => info!("{name}: {} MB, {rate:.1} MB/s", bytes / 1_000_000),
                }
                *state = (bytes, Instant::now());
            }
        }
    }

    pub fn done(&self) {
        if let FileProgress::Bar(bar) = self {
            bar.finish();
        }
    }
}
