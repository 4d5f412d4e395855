//! `--runner pooling`: the model's hidden states are the answer, not tokens.

use serde_json::{Map, Value};

use super::ModelFiles;
use super::args::ModelArgs;
use super::resolve::ConfigError;

/// What sentence-transformers makes of a checkpoint, in order.
const MODULES: &str = "modules.json";

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
/// The flags contradict one another, or ask of `--pooler-config` what there is not; or so do the checkpoint's files.
pub(super) fn resolve(
    flags: &ModelArgs,
    files: &ModelFiles,
    hf_config: &Value,
) -> Result<Option<PoolingConfig>, ConfigError> {
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
    let config = config.unwrap_or(&empty);
    let names_kind = ["pooling_type", "seq_pooling_type"]
        .iter()
        .any(|key| config.contains_key(*key));
    let (pooling, normalize) = pooler(config, checkpoints(files, names_kind)?)?;
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

/// What the checkpoint's sentence-transformers modules say, else the last token's state with length 1. `overruled`: a flag
/// names the kind of pooling.
///
/// # Errors
/// A file is damaged, or asks for a kind of pooling that is not offered.
fn checkpoints(files: &ModelFiles, overruled: bool) -> Result<(Pooling, bool), ConfigError> {
    const DEFAULT: (Pooling, bool) = (Pooling::Last, true);
    let modules = files
        .read(MODULES)
        .map_err(|error| ConfigError::new(files.describe(MODULES), error.to_string()))?;
    let Some(modules) = modules else { return Ok(DEFAULT) };
    let modules: Vec<Value> = serde_json::from_slice(&modules)
        .map_err(|error| ConfigError::new(files.describe(MODULES), error.to_string()))?;
    let module = |kind: &str| {
        let ends = |module: &&Value| {
            module["type"]
                .as_str()
                .is_some_and(|name| name.rsplit('.').next() == Some(kind))
        };
        modules.iter().find(ends)
    };
    let Some(path) = module("Pooling").and_then(|module| module["path"].as_str()) else {
        return Ok(DEFAULT);
    };
    let normalize = module("Normalize").is_some();
    // The folder is beside the others; a path that leads elsewhere is not followed.
    if path.is_empty() || path.contains(['/', '\\']) || path.starts_with('.') {
        return Err(ConfigError::new(
            files.describe(MODULES),
            format!("the path {path:?} is no folder of the checkpoint"),
        ));
    }
    let name = format!("{path}/config.json");
    let config = files.read_object(&name)?.unwrap_or_default();
    let is_on = |key: &str| config.get(key) == Some(&Value::Bool(true));
    let pooling = match (is_on("pooling_mode_mean_tokens"), is_on("pooling_mode_lasttoken")) {
        (true, false) => Pooling::Mean,
        (false, true) => Pooling::Last,
        _ if overruled => Pooling::Last,
        _ => {
            let message =
                "asks for a pooling that is not offered; --pooler-config with pooling_type LAST or MEAN overrules it";
            return Err(ConfigError::new(files.describe(&name), message));
        }
    };
    Ok((pooling, normalize))
}

/// `--pooler-config` over what the checkpoint says.
fn pooler(config: &Map<String, Value>, checkpoint: (Pooling, bool)) -> Result<(Pooling, bool), ConfigError> {
    let error = |message: String| ConfigError::new("--pooler-config", message);
    let (mut pooling, mut normalize) = checkpoint;
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
        pooler(config.as_object().unwrap(), (Pooling::Last, true)).map_err(|error| error.to_string())
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

    #[test]
    fn sentence_transformers_files_say_how_a_checkpoint_pools() {
        let read = |modules: Value, pooling: Value, overruled| {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join("modules.json"), modules.to_string()).unwrap();
            std::fs::create_dir(directory.path().join("1_Pooling")).unwrap();
            std::fs::write(directory.path().join("1_Pooling/config.json"), pooling.to_string()).unwrap();
            let files = ModelFiles::Directory(directory.path().to_path_buf());
            checkpoints(&files, overruled).map_err(|error| error.to_string())
        };
        let module =
            |kind: &str, path: &str| json!({"type": format!("sentence_transformers.models.{kind}"), "path": path});
        let transformer = module("Transformer", "");
        let pooling = module("Pooling", "1_Pooling");
        let both = json!([transformer, pooling, module("Normalize", "2_Normalize")]);
        let mean = json!({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": true});
        assert_eq!(read(both.clone(), mean.clone(), false), Ok((Pooling::Mean, true)));
        let unscaled = json!([transformer, pooling]);
        let last = json!({"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": false});
        assert_eq!(read(unscaled.clone(), last, false), Ok((Pooling::Last, false)));
        assert_eq!(
            read(json!([transformer]), mean.clone(), false),
            Ok((Pooling::Last, true))
        );
        let cls = json!({"pooling_mode_cls_token": true});
        assert!(
            read(both.clone(), cls.clone(), false)
                .unwrap_err()
                .contains("1_Pooling")
        );
        assert_eq!(read(both, cls, true), Ok((Pooling::Last, true)));
        let outside = json!([module("Pooling", "../1_Pooling")]);
        assert!(read(outside, mean, false).unwrap_err().contains("modules.json"));
    }
}
