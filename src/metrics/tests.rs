use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use super::*;
use crate::config::observability::HistogramBuckets;

#[test]
fn numbers_are_written_as_python_does() {
    for (value, text) in [
        (0.0, "0.0"),
        (1.0, "1.0"),
        (0.3, "0.3"),
        (7680.0, "7680.0"),
        (200_000.0, "200000.0"),
        (1_000_000.0, "1e+06"),
        (1_792_992.5, "1.7929925e+06"),
        (f64::INFINITY, "+Inf"),
    ] {
        assert_eq!(exposition::number(value), text);
    }
}

#[test]
fn request_buckets_end_at_the_context() {
    assert_eq!(one_two_five(100), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
    assert_eq!(one_two_five(1), [1.0]);
    assert_eq!(one_two_five(0), [1.0]);
}

/// Each family of a page with its type and the label names of its samples (without `le`).
fn families(page: &str) -> BTreeMap<String, (String, Vec<String>)> {
    let mut found = BTreeMap::new();
    let mut name = String::new();
    for line in page.lines() {
        if let Some(head) = line.strip_prefix("# TYPE ") {
            let (family, kind) = head.split_once(' ').unwrap();
            name = family.to_owned();
            found.insert(name.clone(), (kind.to_owned(), Vec::new()));
        } else if !line.starts_with('#') {
            assert!(line.starts_with(&name), "{line} stands under {name}");
            let labels = line
                .split_once('{')
                .map_or("", |(_, rest)| rest.rsplit_once('}').unwrap().0);
            let names = labels
                .split("\",")
                .filter(|label| !label.is_empty())
                .map(|label| label.split_once('=').unwrap().0);
            found.get_mut(&name).unwrap().1 = names.filter(|&label| label != "le").map(str::to_owned).collect();
        }
    }
    found
}

/// A family as the golden file lists it.
#[derive(Deserialize)]
struct Expected {
    name: String,
    r#type: String,
    labels: Vec<String>,
    #[serde(default)]
    created: bool,
    #[serde(default)]
    values: BTreeMap<String, Vec<String>>,
    bucket_family: Option<String>,
    buckets: Option<Vec<f64>>,
}

#[derive(Deserialize)]
struct Golden {
    bucket_families: BTreeMap<String, Vec<f64>>,
    metrics: Vec<Expected>,
}

/// A page on which every family has been observed.
fn full_page() -> String {
    let metrics = Metrics::new("a \"name\"", 4096);
    for status in [200, 302, 404, 503] {
        metrics
            .http
            .observe("/v1/models", "GET", status, Duration::from_millis(20), 0, 100);
    }
    for request_type in [RequestType::ChatCompletions, RequestType::Responses, RequestType::Other] {
        for (streaming, found_call) in [(true, true), (true, false), (false, true), (false, false)] {
            metrics
                .frontend
                .observe_tool_parser(streaming, found_call, request_type);
        }
    }
    assert!(!metrics.render().contains("sleep_mode"), "it has not slept yet");
    drop(metrics.sleep_operation("sleep"));
    metrics.engine.set_cache_config(&[("block_size", "16".into())]);
    metrics.render()
}

#[test]
fn the_page_has_vllms_families_types_labels_and_buckets() {
    let golden = include_str!("../../compat-tests/goldens/vllm-metrics.json");
    let golden: Golden = serde_json::from_str(golden).unwrap();
    let page = full_page();
    let found = families(&page);
    for expected in &golden.metrics {
        let name = &expected.name;
        let (kind, labels) = found.get(name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!((kind, labels), (&expected.r#type, &expected.labels), "{name}");
        let base = name
            .strip_suffix("_total")
            .filter(|_| kind == "counter")
            .unwrap_or(name);
        assert_eq!(
            found.contains_key(&format!("{base}_created")),
            expected.created,
            "{name}_created"
        );
        for (label, values) in &expected.values {
            for value in values {
                let pair = format!("{label}=\"{value}\"");
                let shown = page
                    .lines()
                    .any(|line| line.starts_with(name.as_str()) && line.contains(&pair));
                assert!(shown, "{name} has no {pair}");
            }
        }
        let family = expected
            .bucket_family
            .as_ref()
            .map(|family| &golden.bucket_families[family]);
        if let Some(bounds) = family.or(expected.buckets.as_ref()) {
            assert_eq!(&self::bounds(&page, name), bounds, "{name}");
        }
    }
    assert!(page.contains(r#"cache_dtype="None""#) && page.contains(r#",block_size="16","#));
    assert!(page.contains(r#"model_name="a \"name\"""#));
}

/// The finite bounds of a histogram's first series.
fn bounds(page: &str, name: &str) -> Vec<f64> {
    let prefix = format!("{name}_bucket{{");
    let all = page.lines().filter_map(|line| line.strip_prefix(prefix.as_str()));
    let texts = all.map(|rest| rest.split_once("le=\"").unwrap().1.split_once('"').unwrap().0);
    texts
        .take_while(|text| *text != "+Inf")
        .map(|text| text.parse().unwrap())
        .collect()
}

#[test]
fn flags_choose_series_and_buckets() {
    let mut buckets = HistogramBuckets::default();
    buckets.set("request_latency", vec![0.5, 2.0]);
    let config = MetricsConfig {
        created: false,
        buckets,
        ..MetricsConfig::default()
    };
    let page = Metrics::with_config("m", 10, config).render();
    assert!(!page.contains("_created"));
    assert_eq!(bounds(&page, "vllm:e2e_request_latency_seconds"), [0.5, 2.0]);
    let config = MetricsConfig {
        engine: false,
        ..MetricsConfig::default()
    };
    let page = Metrics::with_config("m", 10, config).render();
    assert!(!page.contains("vllm:") && page.contains("http_request_duration_highr_seconds_count 0.0"));
}

#[test]
fn a_requests_choices_count_once() {
    let metrics = Metrics::new("m", 100);
    metrics.engine.observe_group(3, 7);
    let page = metrics.render();
    for line in [
        r#"vllm:request_params_n_sum{engine="0",model_name="m"} 3.0"#,
        r#"vllm:request_max_num_generation_tokens_sum{engine="0",model_name="m"} 7.0"#,
    ] {
        assert!(page.lines().any(|found| found == line), "{line}");
    }
}

#[test]
fn samples_are_laid_out_as_prometheus_client_does() {
    let metrics = Metrics::new("m", 10);
    metrics
        .http
        .observe("/v1/models", "GET", 404, Duration::from_millis(200), 3, 100);
    metrics.engine.iteration_tokens.observe(5.0);
    let page = metrics.render();
    for line in [
        r#"http_requests_total{handler="/v1/models",method="GET",status="4xx"} 1.0"#,
        r#"http_request_size_bytes_sum{handler="/v1/models"} 3.0"#,
        r#"http_request_duration_seconds_bucket{handler="/v1/models",le="0.1",method="GET"} 0.0"#,
        r#"http_request_duration_seconds_bucket{handler="/v1/models",le="+Inf",method="GET"} 1.0"#,
        r#"vllm:iteration_tokens_total_bucket{engine="0",le="8.0",model_name="m"} 1.0"#,
        r#"vllm:iteration_tokens_total_sum{engine="0",model_name="m"} 5.0"#,
        r#"vllm:request_prompt_tokens_bucket{engine="0",le="10.0",model_name="m"} 0.0"#,
        "# TYPE http_request_size_bytes summary",
    ] {
        assert!(page.lines().any(|found| found == line), "{line}");
    }
    assert!(!page.contains("http_request_size_bytes_bucket"));
    assert!(
        !page.contains(r#"request_prompt_tokens_bucket{engine="0",le="20.0""#),
        "buckets end at the context"
    );
}

#[test]
fn the_process_reports_itself() {
    let page = Metrics::new("m", 10).render();
    let value = |name: &str| -> f64 {
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is missing")).parse().unwrap()
    };
    assert!(value("process_resident_memory_bytes") > 1e6);
    assert!(value("process_open_fds") >= 3.0);
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((now_s - value("process_start_time_seconds")).abs() < 3600.0);
}
