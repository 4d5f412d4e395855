//! The HTTP layer's series, as vLLM's instrumentator names them.

use std::time::Duration;

use prometheus::{Histogram, HistogramVec, IntCounterVec};

use super::families::Families;

const HTTP_DURATION_S: &[f64] = &[0.1, 0.5, 1.0];
const HTTP_DURATION_FINE_S: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0,
];

/// What the server observes.
#[derive(Debug)]
pub struct HttpMetrics {
    requests: IntCounterVec,
    request_size_bytes: HistogramVec,
    response_size_bytes: HistogramVec,
    duration_fine: Histogram,
    duration: HistogramVec,
}

impl HttpMetrics {
    pub(super) fn new(http: &Families) -> Self {
        let sum_and_count = &[f64::MAX];
        Self {
            requests: http.counters(
                "http_requests_total",
                "Requests by method, status class and route.",
                &["handler", "method", "status"],
                &[],
            ),
            request_size_bytes: http.histograms(
                "http_request_size_bytes",
                "Bytes of request bodies.",
                &["handler"],
                sum_and_count,
            ),
            response_size_bytes: http.histograms(
                "http_response_size_bytes",
                "Bytes of response bodies.",
                &["handler"],
                sum_and_count,
            ),
            duration_fine: http.histogram(
                "http_request_duration_highr_seconds",
                "Time to answer a request, in fine steps.",
                HTTP_DURATION_FINE_S,
            ),
            duration: http.histograms(
                "http_request_duration_seconds",
                "Time to answer a request, by route.",
                &["handler", "method"],
                HTTP_DURATION_S,
            ),
        }
    }

    /// An answered request. `handler` is the route's template, `none` where no route matched; routes for probes and
    /// scrapers are not to be reported.
    pub fn observe(
        &self,
        handler: &str,
        method: &str,
        status: u16,
        duration: Duration,
        request_bytes: u64,
        response_bytes: u64,
    ) {
        let class = format!("{}xx", status / 100);
        self.requests.with_label_values(&[handler, method, &class]).inc();
        self.request_size_bytes
            .with_label_values(&[handler])
            .observe(request_bytes as f64);
        self.response_size_bytes
            .with_label_values(&[handler])
            .observe(response_bytes as f64);
        self.duration_fine.observe(duration.as_secs_f64());
        self.duration
            .with_label_values(&[handler, method])
            .observe(duration.as_secs_f64());
    }
}
