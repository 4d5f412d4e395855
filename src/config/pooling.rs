//! `--runner pooling`: the model's hidden states are the answer, not tokens.

use serde_json::{Map, Value};

use super::args::ModelArgs;
use super::resolve::ConfigError;

/// What a pooled prompt is of the final hidden states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The last token's.
    Last,
    /// The mean over all tokens.
    Mean,
}

/// How prompts become vectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolingConfig {
    pub pooling: Pooling,
    /// Vectors have the length 1 unless a request says otherwise.
    pub normalize: bool,
    pub dimensions: Dimensions,
}

/// Which shorter vectors the model bears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dimensions {
    /// It was not trained for any.
    Full,
    Any,
    Listed(Vec<usize>),
}

/// None: the model generates.
///
/// # Errors
/// The flags contradict one another, or ask of `--pooler-config` what there is not.
pub(super) fn resolve(flags: &ModelArgs, hf_config: &Value) -> Result<Option<PoolingConfig>, ConfigError> {
    let pools = match (flags.runner.as_str(), flags.convert.as_str()) {
        ("pooling", "none") => {
            let message = "none: an LFM2 checkpoint generates; --runner pooling needs embed";
            return Err(ConfigError::new("--convert", message));
        }
        ("generate", "embed") => {
            return Err(ConfigError::new("--convert", "embed needs --runner pooling"));
        }
        (runner, convert) => runner == "pooling" || convert == "embed",
    };
    let config = flags.pooler_config.as_ref();
    if !pools {
        return match config {
            None => Ok(None),
            Some(_) => Err(ConfigError::new("--pooler-config", "needs --runner pooling")),
        };
    }
    let empty = Map::new();
    let (pooling, normalize) = pooler(config.unwrap_or(&empty))?;
    let listed = hf_config.get("matryoshka_dimensions").and_then(Value::as_array);
    let is_matryoshka = hf_config.get("is_matryoshka") == Some(&Value::Bool(true));
    Ok(Some(PoolingConfig {
        pooling,
        normalize,
        dimensions: match listed {
            Some(sizes) => Dimensions::Listed(sizes.iter().filter_map(|n| Some(n.as_u64()? as usize)).collect()),
            None if is_matryoshka => Dimensions::Any,
            None => Dimensions::Full,
        },
    }))
}

fn pooler(config: &Map<String, Value>) -> Result<(Pooling, bool), ConfigError> {
    let error = |message: String| ConfigError::new("--pooler-config", message);
    let (mut pooling, mut normalize) = (Pooling::Last, true);
    for (name, value) in config.iter().filter(|(_, value)| !value.is_null()) {
        match (name.as_str(), value) {
            ("pooling_type" | "seq_pooling_type", Value::String(kind)) => {
                pooling = match kind.to_ascii_uppercase().as_str() {
                    "LAST" => Pooling::Last,
                    "MEAN" => Pooling::Mean,
                    _ => return Err(error(format!("{name} '{kind}' is not offered; LAST and MEAN are"))),
                }
            }
            ("use_activation" | "normalize", Value::Bool(on)) => normalize = *on,
            ("task", Value::String(task)) if task == "embed" => {}
            ("task", task) => return Err(error(format!("task {task} is not offered; embed is"))),
            (name, _) => {
                return Err(error(format!(
                    "{name} cannot be set; pooling_type and use_activation can"
                )));
            }
        }
    }
    Ok((pooling, normalize))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(config: Value) -> Result<(Pooling, bool), String> {
        pooler(config.as_object().unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_pooler_config_is_read_or_named() {
        assert_eq!(read(json!({})), Ok((Pooling::Last, true)));
        let mean = json!({"pooling_type": "mean", "use_activation": false, "task": "embed", "dimensions": null});
        assert_eq!(read(mean), Ok((Pooling::Mean, false)));
        for (config, word) in [
            (json!({"seq_pooling_type": "CLS"}), "CLS"),
            (json!({"task": "token_embed"}), "token_embed"),
            (json!({"step_tag_id": 3}), "step_tag_id"),
            (json!({"use_activation": "yes"}), "use_activation"),
        ] {
            assert!(read(config).unwrap_err().contains(word));
        }
    }
}
