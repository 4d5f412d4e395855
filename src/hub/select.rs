//! Which of a repository's files a server needs.

use std::path::Path;

use serde_json::Value;

/// What to download.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Weights too, not only configuration and tokenizer.
    pub weights: bool,
    /// `--ignore-patterns`: shell patterns of files to leave out.
    pub ignore_patterns: Vec<String>,
}

const INDEX: &str = "model.safetensors.index.json";
const POOLING_FILE: &str = "?_Pooling/config.json";

/// Small files by name; `*` stands for anything.
const SMALL_FILES: [&str; 13] = [
    "config.json",
    "modules.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "processor_config.json",
    "preprocessor_config.json",
];

impl Selection {
    /// The wanted ones of `names`, the largest kind last. Only the top directory counts, and the folders that
    /// sentence-transformers numbers.
    pub(super) fn choose(&self, names: &[String]) -> Vec<String> {
        let ignored = |name: &str| self.ignore_patterns.iter().any(|pattern| matches(pattern, name));
        let pooling = names
            .iter()
            .filter(|name| matches(POOLING_FILE, name) && !ignored(name));
        let top = names.iter().filter(|name| !name.contains('/') && !ignored(name));
        let (weights, others): (Vec<&String>, Vec<&String>) = top.partition(|name| name.ends_with(".safetensors"));
        let small = others
            .into_iter()
            .filter(|n| SMALL_FILES.iter().any(|p| matches(p, n)) || (self.weights && *n == INDEX));
        let mut files: Vec<String> = small.chain(pooling).cloned().collect();
        if self.weights {
            // Some repositories hold the same weights a second time under another name.
            let is_model = |name: &&&String| name.starts_with("model");
            let has_model = weights.iter().any(|name| is_model(&name));
            files.extend(
                weights
                    .iter()
                    .filter(|name| !has_model || is_model(name))
                    .map(|name| (*name).clone()),
            );
        }
        files
    }

    /// A file that `directory` should have and has not.
    pub(super) fn missing(&self, directory: &Path) -> Option<String> {
        if !directory.join("config.json").exists() {
            return Some("config.json".into());
        }
        if !self.weights {
            return None;
        }
        let index = std::fs::read(directory.join(INDEX))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if let Some(Value::Object(map)) = index.as_ref().and_then(|index: &Value| index.get("weight_map")) {
            let mut shards = map.values().filter_map(Value::as_str);
            return shards.find(|shard| !directory.join(shard).exists()).map(str::to_owned);
        }
        let mut entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        let has_weights =
            entries.any(|e| e.file_name().to_string_lossy().ends_with(".safetensors") && e.path().exists());
        (!has_weights).then(|| "model.safetensors".into())
    }
}

/// Python's fnmatch with `*` and `?`; a pattern ending in `/` covers the directory.
fn matches(pattern: &str, name: &str) -> bool {
    if let Some(directory) = pattern.strip_suffix('/') {
        return name.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'));
    }
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where to go back to when the text after the last star does not fit.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        if p < pattern.len() && pattern[p] == '*' {
            star = Some((p, n));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == '?' || pattern[p] == name[n]) {
            p += 1;
            n += 1;
        } else if let Some((star_p, star_n)) = star {
            star = Some((star_p, star_n + 1));
            p = star_p + 1;
            n = star_n + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_like_fnmatch() {
        for (pattern, name, expected) in [
            ("original/**/*", "original/a/b", true),
            ("original/**/*", "model.safetensors", false),
            ("*.bin", "a.bin", true),
            ("*.bin", "a.bin.x", false),
            ("a*b*c", "aXbYbZc", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("dir/", "dir/x", true),
            ("", "", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn only_what_a_server_reads_is_chosen() {
        let names = [
            "README.md",
            "config.json",
            "model-1.safetensors",
            "model.safetensors.index.json",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
            "onnx/model.onnx",
            "onnx/config.json",
            "1_Pooling/config.json",
            "chat_template.jinja",
        ];
        let names: Vec<String> = names.map(str::to_owned).to_vec();
        let mut selection = Selection {
            weights: true,
            ignore_patterns: vec!["tok*".into()],
        };
        let expected = [
            "config.json",
            "model.safetensors.index.json",
            "chat_template.jinja",
            "1_Pooling/config.json",
            "model-1.safetensors",
        ];
        assert_eq!(selection.choose(&names), expected);
        selection.weights = false;
        let small = ["config.json", "chat_template.jinja", "1_Pooling/config.json"];
        assert_eq!(selection.choose(&names), small);
    }
}
