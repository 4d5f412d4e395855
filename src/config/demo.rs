//! The demo model, embedded: `rvllm serve demo` needs no download. compat-tests/demo-model says what it is.

/// Users write this in place of a hub id. A directory of the same name is `./demo`.
pub const NAME: &str = "demo";

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/compat-tests/demo-model/", $name)))),*]
    };
}

/// File names and contents, as [`ModelFiles::Embedded`](super::ModelFiles) takes them.
pub static FILES: &[(&str, &[u8])] = files![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_binary_grows_by_six_megabytes_at_most() {
        let bytes: usize = FILES.iter().map(|(_, data)| data.len()).sum();
        assert!(bytes <= 6 << 20, "{bytes} bytes");
    }
}
