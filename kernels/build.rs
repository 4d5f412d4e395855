//! Compiles every `kernels/*.cu` into a fatbin that `src/backend/cuda` embeds. Without the feature `cuda` it does nothing.
//!
//! `CUDA_HOME` names the toolkit (default: nvcc on the PATH). `RVLLM_CUDA_ARCHS` lists targets, default
//! `80 86 89 90a 100 120`, with PTX of the last for what comes later; `90a` alone builds six times faster.
//! A register spill on sm_90a that the kernel file does not allow by a line `// Spills: <kernel>` fails the build; elsewhere, where
//! kernels are correct but not tuned, it does not.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

fn main() {
    println!("cargo::rerun-if-changed=kernels/build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    println!("cargo::rerun-if-env-changed=RVLLM_CUDA_ARCHS");
    let nvcc = match env::var_os("CUDA_HOME") {
        Some(home) => Path::new(&home).join("bin/nvcc"),
        None => PathBuf::from("nvcc"),
    };
    let archs = env::var("RVLLM_CUDA_ARCHS").unwrap_or_else(|_| "80 86 89 90a 100 120".into());
    let archs: Vec<String> = archs
        .split([' ', ','])
        .filter(|a| !a.is_empty())
        .map(String::from)
        .collect();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));

    let mut sources: Vec<PathBuf> = fs::read_dir("kernels")
        .expect("kernels/ is there")
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    let jobs: usize = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    let queue = Mutex::new(sources.clone());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let Some(source) = queue.lock().expect("no thread panicked").pop() else {
                        break;
                    };
                    compile(&nvcc, &archs, &source, &out);
                }
            });
        }
    });

    let mut list = String::from("pub const MODULES: &[(&str, &[u8])] = &[\n");
    for source in &sources {
        let name = stem(source);
        list += &format!(
            "    ({name:?}, include_bytes!({:?})),\n",
            out.join(format!("{name}.fatbin"))
        );
    }
    list += "];\n";
    fs::write(out.join("modules.rs"), list).expect("OUT_DIR is writable");
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .expect("a source has a name")
        .to_string_lossy()
        .into_owned()
}

fn compile(nvcc: &Path, archs: &[String], source: &Path, out: &Path) {
    let mut command = Command::new(nvcc);
    command.args([
        "-std=c++17",
        "-O3",
        "-Ikernels/include",
        "-fatbin",
        "-Xptxas=-v",
        "-Werror=all-warnings",
    ]);
    for arch in archs {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    if let Some(last) = archs.last().filter(|a| !a.ends_with('a')) {
        command.arg(format!("-gencode=arch=compute_{last},code=compute_{last}"));
    }
    command
        .arg("-o")
        .arg(out.join(format!("{}.fatbin", stem(source))))
        .arg(source);
    let result = command.output().unwrap_or_else(|e| {
        panic!(
            "{}: {e}; set CUDA_HOME to a CUDA 13 toolkit (docs/developing.md says how to get one)",
            nvcc.display()
        )
    });
    let log = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success(), "{}:\n{log}", source.display());

    let text = fs::read_to_string(source).expect("a source is readable");
    let allowed: Vec<&str> = text
        .lines()
        .filter_map(|l| l.strip_prefix("// Spills: "))
        .map(str::trim)
        .collect();
    let (mut kernel, mut is_tuned) = ("", false);
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("entry function '") {
            kernel = rest.split('\'').next().unwrap_or("");
            is_tuned = line.contains("'sm_90a'");
        }
        let spills = line.contains("bytes spill stores") && !line.contains(" 0 bytes spill stores");
        if is_tuned && spills && !allowed.contains(&kernel) {
            panic!("{}: {kernel} spills registers: {}", source.display(), line.trim());
        }
    }
}
