//! `rvllm collect-env`: what a bug report needs, without secrets.

use std::fmt::Write;
use std::process::ExitCode;

use crate::config::VLLM_VERSION;
use crate::config::environment::Environment;
use crate::serve;

use super::print;

/// Variables that say something about a run.
const PREFIXES: [&str; 12] = [
    "VLLM",
    "HF_",
    "HUGGING",
    "TRANSFORMERS",
    "CUDA",
    "NVIDIA",
    "NCCL",
    "OMP",
    "OTEL",
    "RUST_",
    "LD_",
    "SM_VLLM",
];
/// Parts of names whose values nobody may see, as vLLM has them.
const SECRETS: [&str; 5] = ["secret", "token", "api", "access", "password"];

/// # Errors
/// None: what cannot be found out is left out.
pub fn run() -> anyhow::Result<ExitCode> {
    print(&report(&Environment::of_process()));
    Ok(ExitCode::SUCCESS)
}

fn report(env: &Environment) -> String {
    let mut out = String::new();
    section(&mut out, "System Info", &system());
    section(&mut out, "rvllm Info", &program());
    section(&mut out, "CPU Info", &cpu());
    section(&mut out, "CUDA / GPU Info", &gpu());
    let variables: Vec<(String, String)> = environment(env).collect();
    section(&mut out, "Environment Variables", &variables);
    out
}

fn section(out: &mut String, title: &str, lines: &[(String, String)]) {
    let _ = writeln!(
        out,
        "==============================\n{title:^30}\n=============================="
    );
    for (name, value) in lines {
        let _ = writeln!(out, "{name:<28} : {value}");
    }
    out.push('\n');
}

fn line(name: &str, value: impl Into<String>) -> (String, String) {
    (name.to_owned(), value.into())
}

/// A small file of the system; none when there is no such file.
fn read(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The value of `key` in a file of `key<separator>value` lines.
fn field(file: Option<&str>, key: &str, separator: char) -> Option<String> {
    let value = file?.lines().find_map(|line| {
        let (name, value) = line.split_once(separator)?;
        (name.trim() == key).then(|| value.trim().trim_matches('"').to_owned())
    })?;
    Some(value)
}

fn system() -> Vec<(String, String)> {
    let release = read("/etc/os-release");
    let unknown = || "unknown".to_owned();
    vec![
        line(
            "OS",
            field(release.as_deref(), "PRETTY_NAME", '=').unwrap_or_else(unknown),
        ),
        line("Kernel", read("/proc/sys/kernel/osrelease").unwrap_or_else(unknown)),
        line("Architecture", std::env::consts::ARCH),
        line("Libc version", libc_version()),
        line(
            "In a container",
            (read("/.dockerenv").is_some() || read("/run/.containerenv").is_some()).to_string(),
        ),
        line(
            "Memory limit of the group",
            read("/sys/fs/cgroup/memory.max").unwrap_or_else(unknown),
        ),
        line(
            "CPU limit of the group",
            read("/sys/fs/cgroup/cpu.max").unwrap_or_else(unknown),
        ),
    ]
}

fn libc_version() -> String {
    // SAFETY: the function takes nothing and returns a string with the lifetime of the program.
    let version = unsafe { std::ffi::CStr::from_ptr(libc::gnu_get_libc_version()) };
    format!("glibc-{}", version.to_string_lossy())
}

fn program() -> Vec<(String, String)> {
    vec![
        line("rvllm version", env!("CARGO_PKG_VERSION")),
        line("API of vLLM", VLLM_VERSION),
        line(
            "CUDA backend",
            if cfg!(feature = "cuda") {
                "built in"
            } else {
                "not built in"
            },
        ),
        line("Build", if cfg!(debug_assertions) { "debug" } else { "release" }),
    ]
}

fn cpu() -> Vec<(String, String)> {
    let info = read("/proc/cpuinfo");
    let memory = read("/proc/meminfo");
    let flags = field(info.as_deref(), "flags", ':').unwrap_or_default();
    let mattering: Vec<&str> = flags
        .split(' ')
        .filter(|flag| flag.starts_with("avx") || flag.starts_with("amx") || matches!(*flag, "fma" | "f16c"))
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    vec![
        line(
            "Model name",
            field(info.as_deref(), "model name", ':').unwrap_or_else(|| "unknown".into()),
        ),
        line("Threads that may run", threads.to_string()),
        line("Instruction sets", mattering.join(" ")),
        line("Memory", field(memory.as_deref(), "MemTotal", ':').unwrap_or_default()),
        line(
            "Memory available",
            field(memory.as_deref(), "MemAvailable", ':').unwrap_or_default(),
        ),
        line(
            "Huge pages",
            read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default(),
        ),
    ]
}

fn gpu() -> Vec<(String, String)> {
    let driver = read("/proc/driver/nvidia/version").and_then(|text| text.lines().next().map(str::to_owned));
    let mut lines = vec![line("Nvidia driver", driver.unwrap_or_else(|| "none".into()))];
    let gpus = serve::gpus();
    if gpus.is_empty() {
        lines.push(line("GPUs that this build uses", "none"));
    }
    for (ordinal, gpu) in gpus.iter().enumerate() {
        let gib = gpu.memory_bytes as f64 / (1u64 << 30) as f64;
        lines.push(line(&format!("GPU {ordinal}"), format!("{}, {gib:.1} GiB", gpu.name)));
    }
    lines
}

fn environment(env: &Environment) -> impl Iterator<Item = (String, String)> + '_ {
    let matters = |name: &str| PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    env.iter().filter(move |(name, _)| matters(name)).map(|(name, value)| {
        let lower = name.to_ascii_lowercase();
        match SECRETS.iter().any(|part| lower.contains(part)) {
            true => line(name, "***"),
            false => line(name, value),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_masked_and_the_rest_is_there() {
        let variables = [
            ("HF_TOKEN", "hf_abc"),
            ("VLLM_API_KEY", "key"),
            ("HF_HOME", "/models"),
            ("PATH", "/bin"),
        ];
        let env: Environment = variables
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into_iter()
            .collect();
        let text = report(&env);
        assert!(
            !text.contains("hf_abc") && !text.contains(": key") && !text.contains("/bin\n"),
            "{text}"
        );
        for part in [
            "HF_HOME",
            "/models",
            "HF_TOKEN",
            "***",
            "rvllm version",
            "glibc-",
            "Threads that may run",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let file = "NAME=x\nPRETTY_NAME=\"Some OS 1\"\n";
        assert_eq!(field(Some(file), "PRETTY_NAME", '='), Some("Some OS 1".into()));
        assert_eq!(field(Some(file), "PRETTY", '='), None);
        assert_eq!(field(None, "NAME", '='), None);
    }
}
