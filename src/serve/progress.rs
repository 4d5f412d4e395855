//! How far the weights are: a bar on a terminal, a line for each quarter elsewhere.

use std::io::IsTerminal;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

/// Follows the loading of one checkpoint.
pub struct WeightProgress {
    bar: Option<ProgressBar>,
    next_percent: u64,
    finished: Option<Instant>,
}

impl WeightProgress {
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = "Loading weights {bar:40} {bytes:>11}/{total_bytes:11} {bytes_per_sec:>13} {eta:>5}";
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style)
        });
        Self {
            bar,
            next_percent: 25,
            finished: None,
        }
    }

    /// `loaded` of `total` bytes are on the device.
    pub fn at(&mut self, loaded: u64, total: u64) {
        if loaded >= total {
            self.finished.get_or_insert_with(Instant::now);
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(loaded);
            if loaded >= total {
                bar.finish_and_clear();
            }
            return;
        }
        let percent = (loaded * 100).checked_div(total).unwrap_or(100);
        if percent >= self.next_percent {
            tracing::info!("loading weights: {percent} %");
            self.next_percent = (percent / 25 + 1) * 25;
        }
    }

    /// When the last byte was there.
    pub fn finished(&self) -> Option<Instant> {
        self.finished
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_noted_once() {
        let mut progress = WeightProgress::new();
        progress.at(10, 100);
        assert_eq!((progress.finished(), progress.next_percent), (None, 25));
        progress.at(60, 100);
        assert_eq!(progress.next_percent, 75);
        progress.at(100, 100);
        let end = progress.finished();
        assert!(end.is_some());
        progress.at(100, 100);
        assert_eq!(progress.finished(), end);
    }
}
