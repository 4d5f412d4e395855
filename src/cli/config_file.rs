//! `--config file.yaml`: flags in a file. The command line beats it, it beats the defaults.

use std::path::Path;

use serde_yaml_ng::Value as Yaml;

use super::CliError;
use super::normalize::{Known, Normalized, look_up};
use super::table::{Flag, FlagSet, Kind, Nargs};

/// Reads the flags of a YAML file.
///
/// # Errors
/// The file is no `.yaml`/`.yml`, cannot be read, is no mapping, or names an unknown flag; the message names file and key.
pub fn read(set: &FlagSet, path: &str) -> Result<Normalized, CliError> {
    let fail = |message: String| CliError::Usage(format!("argument --config: {path}: {message}"));
    let extension = Path::new(path).extension().and_then(|e| e.to_str()).unwrap_or_default();
    if !matches!(extension, "yaml" | "yml") {
        return Err(fail("only .yaml and .yml files are read".into()));
    }
    let text = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
    let yaml: Yaml = serde_yaml_ng::from_str(&text).map_err(|e| fail(e.to_string()))?;
    let mapping = match yaml {
        Yaml::Mapping(mapping) => mapping,
        Yaml::Null => return Ok(Normalized::default()),
        _ => return Err(fail("the file is no mapping of flags to values".into())),
    };
    let mut out = Normalized::default();
    for (key, value) in mapping {
        let Yaml::String(key) = key else {
            return Err(fail(format!("{key:?} is no flag")));
        };
        if key == "config" {
            return Err(fail("a configuration file cannot name another".into()));
        }
        let name = if key == "model_tag" {
            "--model".to_owned()
        } else {
            format!("--{}", key.trim_start_matches('-'))
        };
        match look_up(set, &name)? {
            Some(Known::Flag { flag, spelling }) => {
                if let Some(values) = texts(flag, spelling, value).map_err(|e| fail(format!("{key}: {e}")))? {
                    out.push(flag, values);
                }
            }
            Some(Known::Legacy(legacy)) => {
                let value = match value {
                    Yaml::Bool(false) | Yaml::Null => continue,
                    other => scalar(&other).map_err(|e| fail(format!("{key}: {e}")))?,
                };
                out.push_legacy(legacy, Some(&value))?;
            }
            None => return Err(fail(format!("{key} is no flag"))),
        }
    }
    Ok(out)
}

/// The values as they would stand on the command line; none = as if the key were absent.
fn texts(flag: &Flag, spelling: &str, value: Yaml) -> Result<Option<Vec<String>>, String> {
    if value.is_null() {
        return Ok(None);
    }
    if matches!(flag.kind, Kind::Bool | Kind::Switch) {
        let given = value.as_bool().ok_or("expected true or false")?;
        if flag.kind == Kind::Switch && !given {
            return Ok(None);
        }
        return Ok(Some(vec![(given == flag.bool_value(spelling)).to_string()]));
    }
    let is_json = matches!(flag.kind, Kind::Json | Kind::JsonOrStr);
    let values = match value {
        Yaml::Bool(true) if flag.nargs == Some(Nargs::Optional) => Vec::new(),
        Yaml::Bool(_) if !is_json => return Err("expected a value, not true or false".into()),
        Yaml::Sequence(items) if flag.is_list() => items.iter().map(scalar).collect::<Result<_, _>>()?,
        Yaml::Sequence(_) | Yaml::Mapping(_) if !is_json => return Err("expected one value".into()),
        other => vec![scalar(&other)?],
    };
    Ok(Some(values))
}

/// A value's text; JSON for lists and mappings.
fn scalar(value: &Yaml) -> Result<String, String> {
    match value {
        Yaml::String(s) => Ok(s.clone()),
        Yaml::Null => Ok("None".into()),
        other => serde_json::to_string(other).map_err(|e| e.to_string()),
    }
}
