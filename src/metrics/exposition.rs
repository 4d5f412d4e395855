//! The text of `/metrics`, laid out as Python's prometheus_client does it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use prometheus::proto::{Metric, MetricFamily, MetricType};

/// Families that are shown as a summary without quantiles: only their sum and count are read.
const SUMMARIES: &[&str] = &["http_request_size_bytes", "http_response_size_bytes"];

/// One family, and its `_created` companion where that is wanted.
pub fn render_family(out: &mut String, family: &MetricFamily, created_s: Option<f64>) {
    let (name, help) = (family.name(), family.help());
    let kind = match family.get_field_type() {
        MetricType::COUNTER => "counter",
        MetricType::HISTOGRAM if SUMMARIES.contains(&name) => "summary",
        MetricType::HISTOGRAM => "histogram",
        _ => "gauge",
    };
    write_head(out, name, help, kind);
    for metric in family.get_metric() {
        let labels = labels(metric);
        match kind {
            "counter" => write_sample(out, name, &labels, metric.get_counter().get_value()),
            "gauge" => write_sample(out, name, &labels, metric.get_gauge().get_value()),
            _ => {
                let histogram = metric.get_histogram();
                let count = histogram.get_sample_count() as f64;
                if kind == "histogram" {
                    let bounds = histogram
                        .get_bucket()
                        .iter()
                        .map(|b| (b.upper_bound(), b.cumulative_count() as f64));
                    for (bound, count) in bounds.chain([(f64::INFINITY, count)]) {
                        let mut labels = labels.clone();
                        labels.insert("le", number(bound));
                        write_sample(out, &format!("{name}_bucket"), &labels, count);
                    }
                }
                write_sample(out, &format!("{name}_count"), &labels, count);
                write_sample(out, &format!("{name}_sum"), &labels, histogram.get_sample_sum());
            }
        }
    }
    if let Some(created_s) = created_s.filter(|_| kind != "gauge") {
        let created = format!(
            "{}_created",
            if kind == "counter" {
                name.trim_end_matches("_total")
            } else {
                name
            }
        );
        write_head(out, &created, help, "gauge");
        for metric in family.get_metric() {
            write_sample(out, &created, &labels(metric), created_s);
        }
    }
}

fn labels(metric: &Metric) -> BTreeMap<&str, String> {
    metric
        .get_label()
        .iter()
        .map(|label| (label.name(), label.value().to_owned()))
        .collect()
}

fn write_head(out: &mut String, name: &str, help: &str, kind: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn write_sample(out: &mut String, name: &str, labels: &BTreeMap<&str, String>, value: f64) {
    out.push_str(name);
    for (i, (label, value)) in labels.iter().enumerate() {
        let value = value.replace('\\', r"\\").replace('\n', r"\n").replace('"', "\\\"");
        let _ = write!(out, "{}{label}=\"{value}\"", if i == 0 { '{' } else { ',' });
    }
    if !labels.is_empty() {
        out.push('}');
    }
    let _ = writeln!(out, " {}", number(value));
}

/// A number as prometheus_client writes it: Python's `repr`, with an exponent from a million on.
pub fn number(value: f64) -> String {
    if value == f64::INFINITY {
        return "+Inf".into();
    }
    let text = format!("{value:?}");
    match text.split_once('.') {
        Some((whole, fraction)) if value > 0.0 && whole.len() > 6 => {
            let digits = format!("{}.{}{fraction}", &whole[..1], &whole[1..]);
            format!("{}e+{:02}", digits.trim_end_matches(['0', '.']), whole.len() - 1)
        }
        _ => text,
    }
}

/// The process's own series, as far as `/proc` tells.
pub fn render_process(out: &mut String) {
    let Some(process) = ProcessStats::read() else { return };
    for (name, help, kind, value) in [
        (
            "process_virtual_memory_bytes",
            "Virtual memory in bytes.",
            "gauge",
            process.virtual_memory_bytes,
        ),
        (
            "process_resident_memory_bytes",
            "Resident memory in bytes.",
            "gauge",
            process.resident_memory_bytes,
        ),
        (
            "process_start_time_seconds",
            "Unix time at which the process started.",
            "gauge",
            process.start_time_s,
        ),
        (
            "process_cpu_seconds_total",
            "CPU time in user and system mode.",
            "counter",
            process.cpu_s,
        ),
        ("process_open_fds", "Open file descriptors.", "gauge", process.open_fds),
        (
            "process_max_fds",
            "Most file descriptors that may be open.",
            "gauge",
            process.max_fds,
        ),
    ] {
        write_head(out, name, help, kind);
        write_sample(out, name, &BTreeMap::new(), value);
    }
}

struct ProcessStats {
    virtual_memory_bytes: f64,
    resident_memory_bytes: f64,
    start_time_s: f64,
    cpu_s: f64,
    open_fds: f64,
    max_fds: f64,
}

impl ProcessStats {
    /// None where there is no `/proc`.
    fn read() -> Option<Self> {
        let read = |path: &str| std::fs::read_to_string(path).ok();
        // SAFETY: sysconf has no preconditions.
        let (ticks, page) = unsafe {
            (
                libc::sysconf(libc::_SC_CLK_TCK) as f64,
                libc::sysconf(libc::_SC_PAGESIZE) as f64,
            )
        };
        let stat = read("/proc/self/stat")?;
        // The command's name, in brackets, may hold spaces; field 3 is the first after it.
        let fields: Vec<f64> = stat
            .rsplit_once(')')?
            .1
            .split_whitespace()
            .map(|field| field.parse().unwrap_or(0.0))
            .collect();
        let field = |number: usize| fields.get(number - 3).copied();
        let boot_s: f64 = read("/proc/stat")?
            .lines()
            .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())?;
        let max_fds = read("/proc/self/limits")?.lines().find_map(|line| {
            let soft = line.strip_prefix("Max open files")?.split_whitespace().next()?;
            Some(soft.parse().unwrap_or(f64::INFINITY))
        })?;
        Some(Self {
            virtual_memory_bytes: field(23)?,
            resident_memory_bytes: field(24)? * page,
            start_time_s: boot_s + field(22)? / ticks,
            cpu_s: (field(14)? + field(15)?) / ticks,
            open_fds: std::fs::read_dir("/proc/self/fd").ok()?.count() as f64,
            max_fds,
        })
    }
}
