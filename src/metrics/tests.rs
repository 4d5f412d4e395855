use super::*;

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

/// What vLLM 0.33 shows on a text model, as recorded from a running server: name, type, labels.
const VLLM_FAMILIES: &[(&str, &str, &[&str])] = &[
    (
        "vllm:estimated_flops_per_gpu_total",
        "counter",
        &["engine", "model_name"],
    ),
    ("vllm:num_requests_running", "gauge", &["engine", "model_name"]),
    ("vllm:num_requests_waiting", "gauge", &["engine", "model_name"]),
    (
        "vllm:num_requests_waiting_by_reason",
        "gauge",
        &["engine", "model_name", "reason"],
    ),
    (
        "vllm:engine_sleep_state",
        "gauge",
        &["engine", "model_name", "sleep_state"],
    ),
    ("vllm:kv_cache_usage_perc", "gauge", &["engine", "model_name"]),
    ("vllm:prefix_cache_queries_total", "counter", &["engine", "model_name"]),
    ("vllm:prefix_cache_queries_created", "gauge", &["engine", "model_name"]),
    ("vllm:prefix_cache_hits_total", "counter", &["engine", "model_name"]),
    (
        "vllm:external_prefix_cache_hits_total",
        "counter",
        &["engine", "model_name"],
    ),
    ("vllm:mm_cache_hits_total", "counter", &["engine", "model_name"]),
    ("vllm:num_preemptions_total", "counter", &["engine", "model_name"]),
    ("vllm:prompt_tokens_total", "counter", &["engine", "model_name"]),
    (
        "vllm:prompt_tokens_by_source_total",
        "counter",
        &["engine", "model_name", "source"],
    ),
    ("vllm:prompt_tokens_cached_total", "counter", &["engine", "model_name"]),
    (
        "vllm:prompt_tokens_cached_by_source_total",
        "counter",
        &["engine", "model_name", "source"],
    ),
    ("vllm:generation_tokens_total", "counter", &["engine", "model_name"]),
    (
        "vllm:request_success_total",
        "counter",
        &["engine", "finished_reason", "model_name"],
    ),
    ("vllm:admission_rejections_total", "counter", &["model_name", "reason"]),
    ("vllm:request_prompt_tokens", "histogram", &["engine", "model_name"]),
    ("vllm:request_generation_tokens", "histogram", &["engine", "model_name"]),
    ("vllm:iteration_tokens_total", "histogram", &["engine", "model_name"]),
    (
        "vllm:iteration_tokens_total_created",
        "gauge",
        &["engine", "model_name"],
    ),
    (
        "vllm:request_max_num_generation_tokens",
        "histogram",
        &["engine", "model_name"],
    ),
    ("vllm:request_params_n", "histogram", &["engine", "model_name"]),
    ("vllm:request_params_max_tokens", "histogram", &["engine", "model_name"]),
    (
        "vllm:time_to_first_token_seconds",
        "histogram",
        &["engine", "model_name"],
    ),
    (
        "vllm:inter_token_latency_seconds",
        "histogram",
        &["engine", "model_name"],
    ),
    (
        "vllm:request_time_per_output_token_seconds",
        "histogram",
        &["engine", "model_name"],
    ),
    (
        "vllm:e2e_request_latency_seconds",
        "histogram",
        &["engine", "model_name"],
    ),
    (
        "vllm:request_queue_time_seconds",
        "histogram",
        &["engine", "model_name"],
    ),
    (
        "vllm:request_inference_time_seconds",
        "histogram",
        &["engine", "model_name"],
    ),
    (
        "vllm:request_prefill_time_seconds",
        "histogram",
        &["engine", "model_name"],
    ),
    (
        "vllm:request_decode_time_seconds",
        "histogram",
        &["engine", "model_name"],
    ),
    ("vllm:request_num_preemptions", "histogram", &["engine", "model_name"]),
    (
        "vllm:request_prefill_kv_computed_tokens",
        "histogram",
        &["engine", "model_name"],
    ),
    ("http_requests_total", "counter", &["handler", "method", "status"]),
    ("http_requests_created", "gauge", &["handler", "method", "status"]),
    ("http_request_size_bytes", "summary", &["handler"]),
    ("http_response_size_bytes", "summary", &["handler"]),
    ("http_request_duration_highr_seconds", "histogram", &[]),
    ("http_request_duration_seconds", "histogram", &["handler", "method"]),
];

#[test]
fn the_page_has_vllms_families_types_and_labels() {
    let metrics = Metrics::new("a \"name\"", 4096);
    metrics
        .http
        .observe("/v1/models", "GET", 200, Duration::from_millis(20), 0, 100);
    metrics.engine.set_cache_config(&[("block_size", "16".into())]);
    let page = metrics.render();
    let found = families(&page);
    for (name, kind, labels) in VLLM_FAMILIES {
        let (found_kind, found_labels) = found.get(*name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(
            (found_kind.as_str(), found_labels.as_slice()),
            (*kind, owned(labels).as_slice()),
            "{name}"
        );
    }
    assert_eq!(found["vllm:cache_config_info"].1.len(), CACHE_CONFIG_LABELS.len() + 2);
    assert!(page.contains(r#"cache_dtype="None""#) && page.contains(r#",block_size="16","#));
    assert!(page.contains(r#"model_name="a \"name\"""#));
}

fn owned(labels: &[&str]) -> Vec<String> {
    labels.iter().map(|&label| label.to_owned()).collect()
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
