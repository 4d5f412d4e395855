//! The series of sleep mode.

use std::time::Instant;

use prometheus::{GaugeVec, HistogramVec};

use super::families::Families;

const DURATION_S: &[f64] = &[0.01, 0.1, 1.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];

#[derive(Debug)]
pub(super) struct SleepMetrics {
    duration: HistogramVec,
    in_flight: GaugeVec,
}

impl SleepMetrics {
    pub fn new(families: &Families) -> Self {
        Self {
            duration: families.histograms(
                "vllm:sleep_mode_operation_duration_seconds",
                "Time that going to sleep and waking up take.",
                &["operation"],
                DURATION_S,
            ),
            in_flight: families.gauges(
                "vllm:sleep_mode_operations_in_flight",
                "Sleeps and wake-ups that are under way.",
                &["operation"],
            ),
        }
    }

    pub fn begin(&self, operation: &'static str) -> SleepOperation<'_> {
        self.in_flight.with_label_values(&[operation]).inc();
        SleepOperation {
            metrics: self,
            operation,
            start: Instant::now(),
        }
    }
}

/// A sleep or a wake-up that is under way.
#[derive(Debug)]
pub struct SleepOperation<'a> {
    metrics: &'a SleepMetrics,
    operation: &'static str,
    start: Instant,
}

impl Drop for SleepOperation<'_> {
    fn drop(&mut self) {
        self.metrics.in_flight.with_label_values(&[self.operation]).dec();
        self.metrics
            .duration
            .with_label_values(&[self.operation])
            .observe(self.start.elapsed().as_secs_f64());
    }
}
