//! How families are made: their labels, and vLLM's bucket families.

use prometheus::core::Collector;
use prometheus::{Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry};

use crate::config::observability::MetricsConfig;

const REQUEST_LATENCY_S: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const TIME_TO_FIRST_TOKEN_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const INTER_TOKEN_LATENCY_S: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const ITERATION_TOKENS: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
const REQUEST_N: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const REQUEST_PREEMPTIONS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];
/// Bounds of the histograms that share them, by vLLM's family names.
pub(super) struct Buckets<'a> {
    pub request_tokens: Vec<f64>,
    pub config: &'a MetricsConfig,
}

impl Buckets<'_> {
    pub fn of(&self, family: &str) -> Vec<f64> {
        let default = match family {
            "request_latency" => REQUEST_LATENCY_S,
            "time_to_first_token" => TIME_TO_FIRST_TOKEN_S,
            "inter_token_latency" => INTER_TOKEN_LATENCY_S,
            "iteration_tokens" => ITERATION_TOKENS,
            "request_params_n" => REQUEST_N,
            "request_num_preemptions" => REQUEST_PREEMPTIONS,
            _ => &self.request_tokens,
        };
        self.config.buckets.of(family, default)
    }
}

/// Makes and registers families that share constant labels.
pub(super) struct Families<'a> {
    pub registry: &'a Registry,
    pub labels: &'a [(&'a str, &'a str)],
}

/// Names, labels and buckets are this file's own: an invalid or repeated one fails every test that makes [`Metrics`].
impl Families<'_> {
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::with_opts(self.opts(name, help)))
    }

    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.register(GaugeVec::new(self.opts(name, help), labels))
    }

    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::with_opts(self.opts(name, help)))
    }

    /// The label values in `preset` are shown from the start, at 0.
    pub fn counters(&self, name: &str, help: &str, labels: &[&str], preset: &[&[&str]]) -> IntCounterVec {
        let counters = self.register(IntCounterVec::new(self.opts(name, help), labels));
        for values in preset {
            counters.with_label_values(values);
        }
        counters
    }

    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts {
            common_opts: self.opts(name, help),
            buckets: buckets.to_vec(),
        };
        self.register(Histogram::with_opts(opts))
    }

    pub fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
        let opts = HistogramOpts {
            common_opts: self.opts(name, help),
            buckets: buckets.to_vec(),
        };
        self.register(HistogramVec::new(opts, labels))
    }

    fn opts(&self, name: &str, help: &str) -> Opts {
        self.labels.iter().fold(Opts::new(name, help), |opts, &(label, value)| {
            opts.const_label(label, value)
        })
    }

    fn register<C: Collector + Clone + 'static>(&self, collector: prometheus::Result<C>) -> C {
        let collector = collector.expect("the family is well formed");
        self.registry
            .register(Box::new(collector.clone()))
            .expect("the family is registered once");
        collector
    }
}

/// 1, 2, 5, 10, 20, ... up to `max`.
pub(super) fn one_two_five(max: usize) -> Vec<f64> {
    let mut buckets = Vec::new();
    let mut decade = 1usize;
    loop {
        for mantissa in [1, 2, 5] {
            match decade.checked_mul(mantissa) {
                Some(bound) if bound <= max => buckets.push(bound as f64),
                _ if buckets.is_empty() => return vec![1.0],
                _ => return buckets,
            }
        }
        decade = decade.saturating_mul(10);
    }
}
