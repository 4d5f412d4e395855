//! What a run comes to, by vLLM's definitions.

use super::load::{Outcome, Run};
use crate::bench::stats::{Summary, mean};
use crate::config::args::ResultArgs;

/// One reported figure: (key of the JSON, short name, heading, milliseconds).
#[derive(Clone, Debug)]
pub struct Figure {
    pub key: &'static str,
    pub name: &'static str,
    pub heading: &'static str,
    pub summary: Summary,
}

/// Figures in the order of the table.
const FIGURES: [(&str, &str, &str); 6] = [
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
    ("client_queue_time", "Client Queue Time", "Client-side Queueing"),
    (
        "e2el_including_client_queue",
        "E2EL incl. Client Queue",
        "Queue-inclusive End-to-end Latency",
    ),
];

/// The result of a run.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub completed: usize,
    pub failed: usize,
    pub duration_s: f64,
    pub total_input: usize,
    pub total_output: usize,
    /// Good requests per second, with `--goodput`.
    pub goodput: Option<f64>,
    /// Chunks of the fullest second.
    pub peak_output_per_s: f64,
    pub peak_concurrent: usize,
    /// Over the run's time.
    pub mean_concurrent: f64,
    /// Prompt and half of the answer, on average.
    pub mean_context: f64,
    pub client_cpu_s: f64,
    /// Those that were asked for.
    pub figures: Vec<Figure>,
    /// Milliseconds.
    pub median_tpot_ms: f64,
}

impl Metrics {
    pub fn new(run: &Run, args: &ResultArgs) -> Self {
        let good: Vec<&Outcome> = run.outcomes.iter().filter(|outcome| outcome.error.is_none()).collect();
        let of_each = |f: fn(&Outcome) -> f64| -> Vec<f64> { good.iter().map(|outcome| f(outcome) * 1e3).collect() };
        let values = |key: &str| match key {
            "ttft" => of_each(|outcome| outcome.ttft_s),
            "tpot" => good.iter().filter_map(|outcome| Some(tpot_s(outcome)? * 1e3)).collect(),
            "itl" => good
                .iter()
                .flat_map(|outcome| &outcome.itl_s)
                .map(|s| s * 1e3)
                .collect(),
            "e2el" => of_each(|outcome| outcome.latency_s),
            "client_queue_time" => of_each(|outcome| outcome.queue_s),
            _ => of_each(|outcome| outcome.latency_s + outcome.queue_s),
        };
        let asked = FIGURES
            .iter()
            .filter(|(key, ..)| args.percentile_metrics.iter().any(|metric| metric == key));
        let figures = asked.map(|&(key, name, heading)| Figure {
            key,
            name,
            heading,
            summary: Summary::new(&values(key), &args.percentiles),
        });
        let meets = |outcome: &&&Outcome| {
            args.goodput_ms.iter().all(|(metric, most_ms)| {
                let seconds = match metric.as_str() {
                    "ttft" => outcome.ttft_s,
                    // An answer of one token has no time per further token.
                    "tpot" => tpot_s(outcome).unwrap_or(0.0),
                    _ => outcome.latency_s,
                };
                seconds * 1e3 <= *most_ms
            })
        };
        let contexts = good
            .iter()
            .map(|o| o.prompt_tokens as f64 + o.output_tokens as f64 / 2.0);
        Self {
            completed: good.len(),
            failed: run.outcomes.len() - good.len(),
            duration_s: run.duration_s,
            total_input: good.iter().map(|outcome| outcome.prompt_tokens).sum(),
            total_output: good.iter().map(|outcome| outcome.output_tokens).sum(),
            goodput: (!args.goodput_ms.is_empty()).then(|| good.iter().filter(meets).count() as f64 / run.duration_s),
            peak_output_per_s: peak_output_per_s(&good),
            peak_concurrent: peak_concurrent(&good),
            mean_concurrent: good.iter().map(|outcome| outcome.latency_s).sum::<f64>() / run.duration_s,
            mean_context: mean(&contexts.collect::<Vec<_>>()),
            client_cpu_s: run.client_cpu_s,
            figures: figures.collect(),
            median_tpot_ms: Summary::new(&values("tpot"), &[]).median,
        }
    }

    pub fn request_throughput(&self) -> f64 {
        self.completed as f64 / self.duration_s
    }

    pub fn output_throughput(&self) -> f64 {
        self.total_output as f64 / self.duration_s
    }

    pub fn total_throughput(&self) -> f64 {
        (self.total_input + self.total_output) as f64 / self.duration_s
    }
}

/// Seconds per token after the first; none for an answer of one.
fn tpot_s(outcome: &Outcome) -> Option<f64> {
    let further = outcome.output_tokens.checked_sub(1).filter(|count| *count > 0)?;
    Some((outcome.latency_s - outcome.ttft_s) / further as f64)
}

/// Chunks in the fullest second after the first request was sent.
fn peak_output_per_s(good: &[&Outcome]) -> f64 {
    let first = good.iter().map(|outcome| outcome.start_s).fold(f64::INFINITY, f64::min);
    let mut seconds: Vec<usize> = Vec::new();
    for outcome in good {
        let mut now = outcome.start_s - first + outcome.ttft_s;
        for gap in std::iter::once(&0.0).chain(&outcome.itl_s) {
            now += gap;
            let second = now.max(0.0) as usize;
            if second >= seconds.len() {
                seconds.resize(second + 1, 0);
            }
            seconds[second] += 1;
        }
    }
    seconds.into_iter().max().unwrap_or(0) as f64
}

/// Most requests in flight at one moment; one that ends when another begins does not overlap it.
fn peak_concurrent(good: &[&Outcome]) -> usize {
    let mut events: Vec<(f64, i64)> = good
        .iter()
        .flat_map(|outcome| [(outcome.start_s, 1), (outcome.start_s + outcome.latency_s, -1)])
        .collect();
    events.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut running = 0;
    let peaks = events.iter().map(|(_, change)| {
        running += change;
        running
    });
    peaks.max().map_or(0, |peak| usize::try_from(peak).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(start_s: f64, ttft_s: f64, itl_s: &[f64]) -> Outcome {
        Outcome {
            error: None,
            prompt_tokens: 10,
            output_tokens: itl_s.len() + 1,
            start_s,
            queue_s: 0.5,
            ttft_s,
            itl_s: itl_s.to_vec(),
            latency_s: ttft_s + itl_s.iter().sum::<f64>(),
            text: String::new(),
        }
    }

    fn args(metrics: &[&str], goodput_ms: &[(&str, f64)]) -> ResultArgs {
        ResultArgs {
            label: None,
            percentile_metrics: metrics.iter().map(|metric| metric.to_string()).collect(),
            percentiles: vec![50.0],
            goodput_ms: goodput_ms.iter().map(|(name, ms)| (name.to_string(), *ms)).collect(),
            save: false,
            detailed: false,
            append: false,
            metadata: Vec::new(),
            directory: None,
            filename: None,
        }
    }

    fn run() -> Run {
        let failed = Outcome {
            error: Some("no".into()),
            ..outcome(0.0, 9.0, &[9.0])
        };
        Run {
            outcomes: vec![
                outcome(0.0, 0.25, &[0.25, 0.5]),
                failed,
                outcome(0.5, 0.5, &[1.0]),
                outcome(2.0, 0.25, &[]),
            ],
            duration_s: 4.0,
            client_cpu_s: 0.1,
        }
    }

    #[test]
    fn failures_count_for_nothing_else() {
        let metrics = Metrics::new(&run(), &args(&["itl", "ttft", "tpot", "e2el"], &[]));
        assert_eq!(
            (
                metrics.completed,
                metrics.failed,
                metrics.total_input,
                metrics.total_output
            ),
            (3, 1, 30, 6)
        );
        assert_eq!((metrics.request_throughput(), metrics.output_throughput()), (0.75, 1.5));
        assert_eq!(metrics.total_throughput(), 9.0);
        let keys: Vec<&str> = metrics.figures.iter().map(|figure| figure.key).collect();
        assert_eq!(keys, ["ttft", "tpot", "itl", "e2el"]);
        let mean = |i: usize| metrics.figures[i].summary.mean;
        assert!((mean(0) - 1000.0 / 3.0).abs() < 1e-9);
        // The third answer has one token and no TPOT: (0.375 + 1.0) / 2.
        assert!((mean(1) - 687.5).abs() < 1e-9 && (metrics.median_tpot_ms - 687.5).abs() < 1e-9);
        assert!((mean(2) - 1750.0 / 3.0).abs() < 1e-9);
        assert_eq!(metrics.goodput, None);
        assert_eq!(metrics.mean_context, (11.5 + 11.0 + 10.5) / 3.0);
    }

    #[test]
    fn peaks_are_those_of_moments() {
        let metrics = Metrics::new(&run(), &args(&[], &[]));
        // Tokens at 0.25, 0.5, 1.0; 1.0, 2.0; 2.25.
        assert_eq!(metrics.peak_output_per_s, 2.0);
        // The second ends when the third begins.
        assert_eq!(metrics.peak_concurrent, 2);
        assert!((metrics.mean_concurrent - 2.75 / 4.0).abs() < 1e-12);
    }

    #[test]
    fn goodput_needs_every_limit() {
        let goodput = |limits: &[(&str, f64)]| Metrics::new(&run(), &args(&[], limits)).goodput.unwrap();
        assert_eq!(goodput(&[("ttft", 250.0)]), 0.5);
        assert_eq!(goodput(&[("ttft", 250.0), ("e2el", 999.0)]), 0.25);
        assert_eq!(goodput(&[("tpot", 500.0)]), 0.5);
    }
}
