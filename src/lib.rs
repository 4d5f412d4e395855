//! rvllm: a drop-in replacement for `vllm serve` over its own paged-attention engine.
//!
//! > The **cli** is resolved into a **config**; the **server** speaks HTTP for the **chat**, which turns messages
//! > into **text**, which turns text into tokens for the **engine**, which plans **steps** for the **runner**, which
//! > runs the **model** on a **backend** made of **kernels**.
//!
//! The modules below stand in that order; imports point to the right, never back. A test (`tests` at the end of this
//! file) reads every `crate::` path and fails on one that points upwards.
//!
//! | layer | modules | may import |
//! |---|---|---|
//! | 8 | main, serve, bench, commands | everything (wiring only) |
//! | 7 | cli | config |
//! | 6 | server | chat, text, engine (handle and errors) |
//! | 5 | chat | text, parsers, grammar, media |
//! | 4 | text | engine |
//! | 3 | engine | step, grammar |
//! | 2 | runner | step, model, backend |
//! | 1 | model | backend |
//! | 0 | backend | step (its data) |
//! | 0 | step, parsers, grammar, media, hub, client | none of ours |
//! | beside | config (data; each part receives its own part), metrics (names), otlp (traces) | config: layer 0; else each other |
//!
//! The data types of `step` may be named on every layer above it.

pub mod serve;

pub mod bench;
pub mod cli;
pub mod commands;
pub mod config;
pub mod server;

pub mod chat;
pub mod text;

pub mod engine;
pub mod runner;

pub mod model;

pub mod backend;
pub mod client;
pub mod grammar;
pub mod hub;
pub mod metrics;
pub mod otlp;
pub mod parsers;
pub mod step;

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    /// The table in the crate's documentation: a module may import what stands on a lower layer.
    const LAYERS: &[&[&str]] = &[
        &["step", "parsers", "grammar", "media", "hub", "client"],
        &["backend"],
        &["model"],
        &["runner"],
        &["engine"],
        &["text"],
        &["chat"],
        &["server"],
        &["cli"],
        &["main", "serve", "bench", "commands"],
    ];
    /// Data that every module may import, and the last layer from which it may itself import.
    const BESIDE: &[(&str, Option<usize>)] = &[("config", Some(1)), ("metrics", None), ("otlp", None)];

    fn layer(module: &str) -> Option<usize> {
        LAYERS.iter().position(|modules| modules.contains(&module))
    }

    fn may_import(module: &str, imported: &str) -> bool {
        if module == imported || BESIDE.iter().any(|&(beside, _)| beside == imported) {
            return true;
        }
        let Some(imported) = layer(imported) else { return false };
        match BESIDE.iter().find(|&&(beside, _)| beside == module) {
            Some(&(_, lowest)) => lowest.is_some_and(|lowest| imported <= lowest),
            None => layer(module).is_some_and(|own| own > imported || own + 1 == LAYERS.len()),
        }
    }

    /// The modules that a file names as `crate::module` or in `crate::{...}`; comments do not count.
    fn imports(source: &str) -> Vec<String> {
        let code: String = source
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect();
        let mut modules = Vec::new();
        for path in code.split("crate::").skip(1) {
            match path.strip_prefix('{') {
                None => modules.push(identifier(path)),
                Some(group) => {
                    let mut depth = 0;
                    let mut item = String::new();
                    for c in group.chars() {
                        match c {
                            '{' => depth += 1,
                            '}' if depth == 0 => break,
                            '}' => depth -= 1,
                            ',' if depth == 0 => modules.push(identifier(&std::mem::take(&mut item))),
                            _ => item.push(c),
                        }
                    }
                    modules.push(identifier(&item));
                }
            }
        }
        modules.retain(|module| module.starts_with(|c: char| c.is_lowercase()));
        modules
    }

    fn identifier(path: &str) -> String {
        path.trim_start()
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    }

    fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).expect("the source tree is readable") {
            let path = entry.expect("the source tree is readable").path();
            if path.is_dir() {
                rust_files(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }

    #[test]
    fn imports_never_point_upwards() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut files = Vec::new();
        rust_files(&src, &mut files);
        let mut wrong = Vec::new();
        for file in &files {
            let relative = file.strip_prefix(&src).expect("the file is below src");
            let first = relative
                .components()
                .next()
                .expect("the path is not empty")
                .as_os_str()
                .to_string_lossy();
            let module = first.trim_end_matches(".rs");
            if module == "lib" {
                continue;
            }
            let source = std::fs::read_to_string(file).expect("the source is readable");
            for imported in imports(&source) {
                if !may_import(module, &imported) {
                    wrong.push(format!("{}: crate::{imported}", relative.display()));
                }
            }
        }
        wrong.dedup();
        assert!(
            wrong.is_empty(),
            "imports against the layer table in src/lib.rs:\n{}",
            wrong.join("\n")
        );
        assert!(files.len() > 10, "the source tree was found");
    }

    #[test]
    fn the_layer_rule_sees_groups_and_directions() {
        let source = "use crate::step::{A, B};\n// crate::server\nuse crate::{engine::{X, Y}, text};\ncrate::hub::x()";
        assert_eq!(imports(source), ["step", "engine", "text", "hub"]);
        assert!(may_import("text", "engine") && !may_import("engine", "text"));
        assert!(may_import("server", "config") && may_import("config", "backend") && !may_import("config", "model"));
        assert!(!may_import("metrics", "step") && may_import("serve", "bench") && !may_import("step", "backend"));
    }
}
