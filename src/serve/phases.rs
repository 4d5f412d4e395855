//! What a start spends its time on, as one log line that `rvllm bench startup` reads back.

use std::fmt;
use std::time::{Duration, Instant};

/// What the line begins with.
const LINE: &str = "Start phases: ";

/// Named stretches of time, one after the other, from the start of the process.
#[derive(Debug)]
pub struct Phases {
    start: Instant,
    last: Instant,
    done: Vec<(&'static str, Duration)>,
}

impl Default for Phases {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            start: now,
            last: now,
            done: Vec::new(),
        }
    }
}

impl Phases {
    /// What happened since the last phase was `name`.
    pub fn done(&mut self, name: &'static str) {
        self.done_at(name, Instant::now());
    }

    /// As [`done`](Self::done), of a phase that ended at `end`.
    pub fn done_at(&mut self, name: &'static str, end: Instant) {
        self.done.push((name, end.saturating_duration_since(self.last)));
        self.last = end;
    }

    /// From the first instant to the end of the last phase.
    pub fn total(&self) -> Duration {
        self.last - self.start
    }

    /// Names and seconds out of a log line that shows phases.
    pub fn parse(line: &str) -> Option<Vec<(String, f64)>> {
        let list = line.split_once(LINE)?.1.trim_end();
        let phase = |item: &str| {
            let (name, seconds) = item.strip_suffix(" s")?.rsplit_once(' ')?;
            Some((name.to_owned(), seconds.parse().ok()?))
        };
        list.split(", ").map(phase).collect()
    }
}

impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(LINE)?;
        for (i, (name, time)) in self.done.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(f, "{comma}{name} {:.4} s", time.as_secs_f64())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_read_back() {
        let mut phases = Phases::default();
        let start = phases.start;
        phases.done_at("configuration", start + Duration::from_millis(250));
        phases.done_at("weights", start + Duration::from_millis(1250));
        assert_eq!(phases.total(), Duration::from_millis(1250));
        let line = format!("(APIServer pid=1) INFO 11-23 21:06:00 [serve.rs:80] {phases}\n");
        let expected = [("configuration".to_owned(), 0.25), ("weights".to_owned(), 1.0)];
        assert_eq!(Phases::parse(&line).unwrap(), expected);
        assert_eq!(Phases::parse("INFO ready"), None);
        assert_eq!(Phases::parse("Start phases: weights 1 minute"), None);
    }
}
