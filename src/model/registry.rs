//! Which architectures this program runs: one line each.

use serde_json::Value;

use super::LoadError;
use super::lfm2::config::Lfm2Config;

/// Reads a `config.json`.
type ConfigReader = fn(&Value) -> Result<Lfm2Config, LoadError>;

/// Name in `architectures` of config.json, and how its configuration is read. The decoders differ in data, not in code.
const ARCHITECTURES: &[(&str, ConfigReader)] = &[
    ("Lfm2ForCausalLM", Lfm2Config::dense),
    ("Lfm2MoeForCausalLM", Lfm2Config::moe),
];

/// Architectures of the family that are known and not supported yet.
const NOT_YET: &[&str] = &["Lfm2VlForConditionalGeneration"];

/// Names of the architectures that [`read_config`] accepts.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|(name, _)| *name)
}

/// The typed configuration of a checkpoint's config.json.
///
/// # Errors
/// An architecture that is not listed (the message lists the known ones), or a field that is missing or absurd.
pub fn read_config(hf_config: &Value) -> Result<Lfm2Config, LoadError> {
    let names: Vec<&str> = match hf_config.get("architectures") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    for name in &names {
        if let Some((_, read)) = ARCHITECTURES.iter().find(|(known, _)| known == name) {
            return read(hf_config);
        }
    }
    let known = architectures().collect::<Vec<_>>().join(", ");
    Err(LoadError::Architecture(match names.first() {
        None => format!("config.json: architectures: names no architecture; supported are {known}"),
        Some(name) if NOT_YET.contains(name) => {
            format!("config.json: architectures: {name} is not supported yet; supported are {known}")
        }
        Some(name) => format!("config.json: architectures: {name:?} is unknown; supported are {known}"),
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn message(config: Value) -> String {
        read_config(&config).expect_err("must be refused").to_string()
    }

    #[test]
    fn unknown_architectures_list_the_known_ones() {
        let unknown = message(json!({"architectures": ["LlamaForCausalLM"]}));
        assert!(unknown.contains("\"LlamaForCausalLM\" is unknown"), "{unknown}");
        assert!(unknown.contains("Lfm2ForCausalLM, Lfm2MoeForCausalLM"), "{unknown}");
        let later = message(json!({"architectures": ["Lfm2VlForConditionalGeneration"]}));
        assert!(later.contains("not supported yet"), "{later}");
        for odd in [
            json!({}),
            json!({"architectures": "Lfm2ForCausalLM"}),
            json!({"architectures": [1]}),
            json!(3),
        ] {
            assert!(message(odd).contains("names no architecture"));
        }
    }
}
