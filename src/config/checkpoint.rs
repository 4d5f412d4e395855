//! What a checkpoint's small files say: config.json, generation_config.json, tokenizer and chat template.

use std::io;
use std::path::Path;

use serde_json::{Map, Value};

use super::resolve::ConfigError;
use super::{GenerationDefaults, ModelFiles};

/// Larger than any real configuration file; guards against reading a wrong file into memory.
const MAX_CONFIG_BYTES: u64 = 64 << 20;

impl ModelFiles {
    /// A file of the checkpoint; none when it has no such file.
    ///
    /// # Errors
    /// The file exists and cannot be read, or is larger than 64 MiB.
    pub fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match self {
            ModelFiles::Embedded(files) => Ok(files.iter().find(|(n, _)| *n == name).map(|(_, bytes)| bytes.to_vec())),
            ModelFiles::Directory(directory) => {
                let path = directory.join(name);
                let size = match std::fs::metadata(&path) {
                    Ok(metadata) => metadata.len(),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(error),
                };
                if size > MAX_CONFIG_BYTES {
                    return Err(io::Error::other(format!(
                        "{size} bytes are too many for a configuration file"
                    )));
                }
                std::fs::read(path).map(Some)
            }
        }
    }

    /// A JSON object of the checkpoint.
    ///
    /// # Errors
    /// The file cannot be read or is no JSON object; the message names it.
    pub fn read_object(&self, name: &str) -> Result<Option<Map<String, Value>>, ConfigError> {
        let Some(bytes) = self
            .read(name)
            .map_err(|e| ConfigError::new(self.describe(name), e.to_string()))?
        else {
            return Ok(None);
        };
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(object)) => Ok(Some(object)),
            Ok(_) => Err(ConfigError::new(self.describe(name), "is no JSON object")),
            Err(error) => Err(ConfigError::new(self.describe(name), error.to_string())),
        }
    }

    /// The file's name for messages.
    pub fn describe(&self, name: &str) -> String {
        match self {
            ModelFiles::Directory(directory) => directory.join(name).display().to_string(),
            ModelFiles::Embedded(_) => format!("demo:{name}"),
        }
    }
}

/// Puts `over` on top of `base`, object by object.
pub fn merge(base: &mut Map<String, Value>, over: &Map<String, Value>) {
    for (key, value) in over {
        match (base.get_mut(key), value) {
            (Some(Value::Object(inner)), Value::Object(value)) => merge(inner, value),
            _ => {
                base.insert(key.clone(), value.clone());
            }
        }
    }
}

/// A field of the config, or of its `text_config` in vision models.
pub fn text_field<'a>(config: &'a Value, key: &str) -> Option<&'a Value> {
    let own = config.get(key).filter(|v| !v.is_null());
    own.or_else(|| config.get("text_config")?.get(key).filter(|v| !v.is_null()))
}

/// A count in config.json between 1 and `most`.
///
/// # Errors
/// It is absent, no integer, or out of range.
pub fn count(config: &Value, key: &str, most: usize) -> Result<usize, ConfigError> {
    let value = text_field(config, key).ok_or_else(|| ConfigError::new("config.json", format!("{key} is missing")))?;
    let number = value
        .as_u64()
        .and_then(|n| usize::try_from(n).ok())
        .filter(|n| (1..=most).contains(n));
    number.ok_or_else(|| ConfigError::new("config.json", format!("{key} is {value}, expected 1 to {most}")))
}

/// Token ids of an `eos_token_id` field: a number or a list of them.
///
/// # Errors
/// It is neither, or an id is outside the vocabulary.
pub fn token_ids(file: &str, value: Option<&Value>, vocab_size: usize) -> Result<Vec<u32>, ConfigError> {
    let items = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(items)) => items.as_slice(),
        Some(single) => std::slice::from_ref(single),
    };
    let id = |item: &Value| {
        let id = item
            .as_u64()
            .filter(|id| *id < vocab_size as u64)
            .and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| {
            ConfigError::new(
                file,
                format!("eos_token_id {item} is no id of the vocabulary ({vocab_size})"),
            )
        })
    };
    items.iter().map(id).collect()
}

/// The id of the tokenizer's `eos_token`, for checkpoints whose config.json has none.
///
/// # Errors
/// A file is unreadable.
pub fn tokenizer_eos(files: &ModelFiles) -> Result<Option<u32>, ConfigError> {
    let Some(config) = files.read_object("tokenizer_config.json")? else {
        return Ok(None);
    };
    let token = config
        .get("eos_token")
        .and_then(|t| t.as_str().or_else(|| t.get("content")?.as_str()));
    let (Some(token), Some(tokenizer)) = (token, files.read_object("tokenizer.json")?) else {
        return Ok(None);
    };
    let added = tokenizer
        .get("added_tokens")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let mut ids = added
        .filter(|t| t.get("content").and_then(Value::as_str) == Some(token))
        .map(|t| t.get("id"));
    let id = ids
        .next()
        .flatten()
        .or_else(|| tokenizer.get("model")?.get("vocab")?.get(token));
    Ok(id.and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok()))
}

/// The checkpoint's chat template: `chat_template.jinja`, else `chat_template` of tokenizer_config.json (of several the
/// one named `default`), else chat_template.json.
///
/// # Errors
/// A file is unreadable or a template is no text.
pub fn chat_template(files: &ModelFiles) -> Result<Option<String>, ConfigError> {
    let name = "chat_template.jinja";
    if let Some(bytes) = files
        .read(name)
        .map_err(|e| ConfigError::new(files.describe(name), e.to_string()))?
    {
        let text = String::from_utf8(bytes).map_err(|e| ConfigError::new(files.describe(name), e.to_string()))?;
        return Ok(Some(text));
    }
    for name in ["tokenizer_config.json", "chat_template.json"] {
        let Some(object) = files.read_object(name)? else {
            continue;
        };
        match object.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => return Ok(Some(text.clone())),
            Some(Value::Array(templates)) => {
                let named = |t: &&Value| t.get("name").and_then(Value::as_str) == Some("default");
                let chosen = templates.iter().find(named).or(templates.first());
                let text = chosen.and_then(|t| t.get("template")).and_then(Value::as_str);
                let missing = || ConfigError::new(files.describe(name), "chat_template has no template named default");
                return text.map(|t| Some(t.to_owned())).ok_or_else(missing);
            }
            Some(_) => {
                return Err(ConfigError::new(
                    files.describe(name),
                    "chat_template is neither text nor a list",
                ));
            }
        }
    }
    Ok(None)
}

/// `--chat-template`: a file, or the template itself.
///
/// # Errors
/// It looks like a path and cannot be read.
pub fn given_template(text: &str) -> Result<String, ConfigError> {
    match std::fs::read_to_string(Path::new(text)) {
        Ok(template) => Ok(template),
        Err(_) if text.contains(['{', '}', '\n']) => Ok(text.to_owned()),
        Err(error) => Err(ConfigError::new("--chat-template", format!("{text}: {error}"))),
    }
}

/// Sampling defaults out of a generation config; `source` names it in messages.
///
/// # Errors
/// A field has the wrong type or a value that no request could have.
pub fn generation_defaults(source: &str, config: &Map<String, Value>) -> Result<GenerationDefaults, ConfigError> {
    let get = |key: &str| config.get(key).filter(|v| !v.is_null());
    let fail = |key: &str, value: &Value| ConfigError::new(source, format!("{key} {value} is out of range"));
    let float = |key: &str, low: f64, high: f64| -> Result<Option<f32>, ConfigError> {
        let read = |v: &Value| {
            v.as_f64()
                .filter(|x| (low..=high).contains(x))
                .ok_or_else(|| fail(key, v))
        };
        Ok(get(key).map(read).transpose()?.map(|x| x as f32))
    };
    let int = |key: &str, low: i64| -> Result<Option<i64>, ConfigError> {
        get(key)
            .map(|v| v.as_i64().filter(|x| *x >= low).ok_or_else(|| fail(key, v)))
            .transpose()
    };
    let max_new_tokens = int("max_new_tokens", 1)?;
    Ok(GenerationDefaults {
        temperature: float("temperature", 0.0, f64::from(f32::MAX))?,
        top_p: float("top_p", f64::from(f32::MIN_POSITIVE), 1.0)?,
        top_k: int("top_k", -1)?,
        min_p: float("min_p", 0.0, 1.0)?,
        repetition_penalty: float("repetition_penalty", f64::from(f32::MIN_POSITIVE), f64::from(f32::MAX))?,
        presence_penalty: float("presence_penalty", -2.0, 2.0)?,
        frequency_penalty: float("frequency_penalty", -2.0, 2.0)?,
        max_new_tokens: max_new_tokens.map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
        max_new_tokens_is_cap: false,
        skip_special_tokens: match get("skip_special_tokens") {
            None => None,
            Some(value) => Some(value.as_bool().ok_or_else(|| fail("skip_special_tokens", value))?),
        },
    })
}
