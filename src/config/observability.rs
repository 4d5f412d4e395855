//! What operators see: the log of requests, metrics, traces.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};

use super::args::{RequestLogArgs, ServeArgs};
use super::environment::Environment;
use super::resolve::{ConfigError, not_negative};

#[derive(Clone, Debug, Default)]
pub struct ObservabilityConfig {
    pub requests: RequestLogConfig,
    /// How often the throughput is logged; none = never.
    pub log_stats_interval: Option<Duration>,
    pub metrics: MetricsConfig,
    /// None = no traces.
    pub traces: Option<TracesConfig>,
}

/// `--enable-log-requests` and what goes with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestLogConfig {
    /// Each request as it arrives; its prompt only at the level DEBUG.
    pub requests: bool,
    /// What was generated.
    pub outputs: bool,
    /// With `outputs`: each delta of a stream too.
    pub deltas: bool,
    /// Characters, and token ids, after which a prompt or output is cut.
    pub max_len: Option<usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct MetricsConfig {
    /// The `vllm:` series are shown.
    pub engine: bool,
    /// Each counter, histogram and summary has its `_created` gauge.
    pub created: bool,
    pub buckets: HistogramBuckets,
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self {
            engine: true,
            created: true,
            buckets: HistogramBuckets::default(),
        }
    }
}

/// Bounds of `--custom-histogram-buckets`, by family.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HistogramBuckets(BTreeMap<String, Vec<f64>>);

impl HistogramBuckets {
    /// vLLM's names of histograms that share their bounds.
    pub const FAMILIES: [&'static str; 7] = [
        "request_latency",
        "time_to_first_token",
        "inter_token_latency",
        "iteration_tokens",
        "request_params_n",
        "request_num_preemptions",
        "request_tokens",
    ];

    /// Gives a family its own bounds, which rise.
    pub fn set(&mut self, family: &str, bounds: Vec<f64>) {
        self.0.insert(family.to_owned(), bounds);
    }

    /// The family's own bounds, else `default`.
    pub fn of(&self, family: &str, default: &[f64]) -> Vec<f64> {
        self.0.get(family).map_or_else(|| default.to_vec(), Clone::clone)
    }
}

/// Where spans go. Names and defaults are those of OpenTelemetry's environment variables.
#[derive(Clone, Debug, PartialEq)]
pub struct TracesConfig {
    /// `scheme://host:port`, and a path for HTTP.
    pub endpoint: String,
    pub protocol: OtlpProtocol,
    /// No TLS, whatever the scheme leaves open.
    pub insecure: bool,
    /// PEM: whom the collector's certificate must come from; none = the public roots.
    pub ca_file: Option<PathBuf>,
    /// Sent with every export; names in lower case.
    pub headers: Vec<(String, String)>,
    pub timeout: Duration,
    /// The process's attributes, `service.name` among them.
    pub resource: Vec<(String, String)>,
    pub sampler: Sampler,
    /// Spans that wait; more are dropped.
    pub max_queue_size: usize,
    pub max_export_batch_size: usize,
    /// How long a span may wait for company.
    pub schedule_delay: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtlpProtocol {
    Grpc,
    HttpProtobuf,
}

/// `OTEL_TRACES_SAMPLER`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// A caller's decision, where it sent one, is taken over.
    pub parent_based: bool,
    /// Share of traces that are kept, 0..=1.
    pub ratio: f64,
}

/// # Errors
/// A flag or an environment variable that cannot be honoured, by name.
pub fn resolve(args: &ServeArgs, env: &Environment) -> Result<ObservabilityConfig, ConfigError> {
    let log_stats = !args.general.disable_log_stats;
    let interval_s = env
        .parsed::<f64>("VLLM_LOG_STATS_INTERVAL")?
        .filter(|s| s.is_finite() && *s > 0.0)
        .unwrap_or(10.0);
    let flags = &args.observability;
    let endpoint = flags
        .otlp_traces_endpoint
        .as_deref()
        .filter(|endpoint| !endpoint.is_empty());
    if endpoint.is_none() && flags.collect_detailed_traces.as_ref().is_some_and(|of| !of.is_empty()) {
        return Err(ConfigError::new(
            "--collect-detailed-traces",
            "needs --otlp-traces-endpoint",
        ));
    }
    Ok(ObservabilityConfig {
        requests: request_log(&args.request_log)?,
        log_stats_interval: log_stats
            .then(|| Duration::try_from_secs_f64(interval_s).ok())
            .flatten(),
        metrics: MetricsConfig {
            engine: log_stats,
            created: !env.is_on("PROMETHEUS_DISABLE_CREATED_SERIES"),
            buckets: buckets(flags.custom_histogram_buckets.as_ref())?,
        },
        traces: endpoint.map(|endpoint| traces(endpoint, env)).transpose()?,
    })
}

fn request_log(args: &RequestLogArgs) -> Result<RequestLogConfig, ConfigError> {
    if args.enable_log_outputs && !args.enable_log_requests {
        return Err(ConfigError::new(
            "--enable-log-outputs",
            "requires --enable-log-requests",
        ));
    }
    Ok(RequestLogConfig {
        requests: args.enable_log_requests,
        outputs: args.enable_log_outputs,
        deltas: args.enable_log_deltas,
        max_len: args
            .max_log_len
            .map(|len| not_negative("--max-log-len", len))
            .transpose()?,
    })
}

fn buckets(given: Option<&Map<String, Value>>) -> Result<HistogramBuckets, ConfigError> {
    let flag = "--custom-histogram-buckets";
    let mut families = HistogramBuckets::default();
    for (family, bounds) in given.into_iter().flatten() {
        if !HistogramBuckets::FAMILIES.contains(&family.as_str()) {
            let message = format!("'{family}' is none of {}", HistogramBuckets::FAMILIES.join(", "));
            return Err(ConfigError::new(flag, message));
        }
        let bounds: Option<Vec<f64>> = bounds
            .as_array()
            .filter(|bounds| !bounds.is_empty())
            .and_then(|bounds| bounds.iter().map(Value::as_f64).collect());
        let rising = bounds.filter(|bounds| bounds.windows(2).all(|pair| pair[0] < pair[1]));
        let Some(bounds) = rising else {
            let message = format!("the bounds of '{family}' are no rising list of numbers");
            return Err(ConfigError::new(flag, message));
        };
        families.set(family, bounds);
    }
    Ok(families)
}

fn traces(endpoint: &str, env: &Environment) -> Result<TracesConfig, ConfigError> {
    let protocol_name = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL";
    let protocol = match either(env, "PROTOCOL").unwrap_or("grpc") {
        "grpc" => OtlpProtocol::Grpc,
        "http/protobuf" => OtlpProtocol::HttpProtobuf,
        other => {
            let message = format!("'{other}' is neither grpc nor http/protobuf");
            return Err(ConfigError::new(protocol_name, message));
        }
    };
    let insecure = either(env, "INSECURE").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let timeout_s: f64 = match either(env, "TIMEOUT") {
        None => 10.0,
        Some(text) => text.trim().parse().map_err(|_| {
            ConfigError::new(
                "OTEL_EXPORTER_OTLP_TIMEOUT",
                format!("'{text}' is no number of seconds"),
            )
        })?,
    };
    let timeout = Duration::try_from_secs_f64(timeout_s)
        .map_err(|_| ConfigError::new("OTEL_EXPORTER_OTLP_TIMEOUT", format!("{timeout_s} is out of range")))?;
    let mut resource = pairs("OTEL_RESOURCE_ATTRIBUTES", env.get("OTEL_RESOURCE_ATTRIBUTES"))?;
    if let Some(name) = env.get("OTEL_SERVICE_NAME") {
        resource.retain(|(key, _)| key != "service.name");
        resource.push(("service.name".into(), name.into()));
    } else if !resource.iter().any(|(key, _)| key == "service.name") {
        resource.push(("service.name".into(), "unknown_service:rvllm".into()));
    }
    let mut headers = pairs("OTEL_EXPORTER_OTLP_HEADERS", either(env, "HEADERS"))?;
    for (name, _) in &mut headers {
        name.make_ascii_lowercase();
    }
    let at_least_one = |name: &str, default: usize| -> Result<usize, ConfigError> {
        let given: Option<usize> = env.parsed(name)?;
        Ok(given.unwrap_or(default).max(1))
    };
    Ok(TracesConfig {
        endpoint: endpoint.to_owned(),
        protocol,
        insecure,
        ca_file: either(env, "CERTIFICATE").map(PathBuf::from),
        headers,
        timeout,
        resource,
        sampler: sampler(env)?,
        max_queue_size: at_least_one("OTEL_BSP_MAX_QUEUE_SIZE", 2048)?,
        max_export_batch_size: at_least_one("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512)?,
        schedule_delay: Duration::from_millis(env.parsed("OTEL_BSP_SCHEDULE_DELAY")?.unwrap_or(5000)),
    })
}

/// `OTEL_EXPORTER_OTLP_TRACES_<name>`, else `OTEL_EXPORTER_OTLP_<name>`.
fn either<'a>(env: &'a Environment, name: &str) -> Option<&'a str> {
    env.get(&format!("OTEL_EXPORTER_OTLP_TRACES_{name}"))
        .or_else(|| env.get(&format!("OTEL_EXPORTER_OTLP_{name}")))
}

/// `a=1,b=2`.
fn pairs(variable: &str, text: Option<&str>) -> Result<Vec<(String, String)>, ConfigError> {
    let pair = |item: &str| match item.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.trim().to_owned())),
        _ => Err(ConfigError::new(variable, "is no list of key=value")),
    };
    let items = text
        .unwrap_or_default()
        .split(',')
        .filter(|item| !item.trim().is_empty());
    items.map(pair).collect()
}

fn sampler(env: &Environment) -> Result<Sampler, ConfigError> {
    let name = env.get("OTEL_TRACES_SAMPLER").unwrap_or("parentbased_always_on");
    let (parent_based, kind) = match name.strip_prefix("parentbased_") {
        Some(kind) => (true, kind),
        None => (false, name),
    };
    let ratio = match kind {
        "always_on" => 1.0,
        "always_off" => 0.0,
        "traceidratio" => {
            let ratio = env.parsed::<f64>("OTEL_TRACES_SAMPLER_ARG")?.unwrap_or(1.0);
            if !(0.0..=1.0).contains(&ratio) {
                let message = format!("{ratio} is not in [0, 1]");
                return Err(ConfigError::new("OTEL_TRACES_SAMPLER_ARG", message));
            }
            ratio
        }
        _ => {
            return Err(ConfigError::new(
                "OTEL_TRACES_SAMPLER",
                format!("'{name}' is no known sampler"),
            ));
        }
    };
    Ok(Sampler { parent_based, ratio })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        let pair = |(name, value): &(&str, &str)| (name.to_string(), value.to_string());
        variables.iter().map(pair).collect()
    }

    #[test]
    fn outputs_are_logged_only_with_requests() {
        let args = RequestLogArgs {
            enable_log_requests: false,
            enable_log_outputs: true,
            enable_log_deltas: true,
            max_log_len: None,
        };
        assert_eq!(request_log(&args).unwrap_err().parameter, "--enable-log-outputs");
        let cut = RequestLogArgs {
            enable_log_requests: true,
            max_log_len: Some(3),
            ..args
        };
        assert_eq!(request_log(&cut).unwrap().max_len, Some(3));
    }

    #[test]
    fn buckets_are_checked() {
        let read = |value: Value| buckets(value.as_object());
        let given = read(json!({"request_latency": [0.5, 1, 2.5]})).unwrap();
        assert_eq!(given.of("request_latency", &[9.0]), [0.5, 1.0, 2.5]);
        assert_eq!(given.of("iteration_tokens", &[9.0]), [9.0]);
        for wrong in [
            json!({"latency": [1]}),
            json!({"request_latency": []}),
            json!({"request_latency": [2, 1]}),
            json!({"request_latency": ["1"]}),
        ] {
            assert!(read(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn traces_follow_opentelemetrys_variables() {
        let plain = traces("http://c:4317", &environment(&[])).unwrap();
        assert_eq!(plain.protocol, OtlpProtocol::Grpc);
        assert_eq!(
            plain.sampler,
            Sampler {
                parent_based: true,
                ratio: 1.0
            }
        );
        assert_eq!(
            plain.resource,
            [("service.name".into(), "unknown_service:rvllm".into())]
        );
        let set = environment(&[
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "Api-Key=k, b=2"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "3"),
            ("OTEL_SERVICE_NAME", "vllm"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=x,env=prod"),
            ("OTEL_TRACES_SAMPLER", "traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ]);
        let traces_config = traces("http://c:4318/v1/traces", &set).unwrap();
        assert_eq!(traces_config.protocol, OtlpProtocol::HttpProtobuf);
        assert_eq!(
            traces_config.headers,
            [("api-key".into(), "k".into()), ("b".into(), "2".into())]
        );
        assert_eq!(traces_config.timeout, Duration::from_secs(3));
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(
            traces_config.resource,
            [pair("env", "prod"), pair("service.name", "vllm")]
        );
        assert_eq!(
            traces_config.sampler,
            Sampler {
                parent_based: false,
                ratio: 0.25
            }
        );
        for (name, value) in [
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
            ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "nothing"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ] {
            assert!(traces("http://c", &environment(&[(name, value)])).is_err(), "{name}");
        }
    }
}
