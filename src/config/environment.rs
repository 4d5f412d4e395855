//! Environment variables: vLLM's names, and what becomes of those that have no meaning here.

use std::collections::{BTreeMap, HashSet};
use std::sync::LazyLock;

use serde::Deserialize;

use super::args::Notice;
use super::resolve::ConfigError;

/// Every `VLLM_*` name of vLLM 0.33.
static KNOWN: LazyLock<HashSet<&str>> = LazyLock::new(|| include_str!("vllm_variables.txt").lines().collect());

/// Variables that are honoured or refused, and those without effect that deserve a reason.
static VARIABLES: LazyLock<Vec<Variable>> =
    LazyLock::new(|| serde_json::from_str(include_str!("variables.json")).expect("variables.json is checked by tests"));

/// An environment variable and what becomes of it.
#[derive(Debug, Deserialize)]
pub struct Variable {
    pub name: String,
    pub here: VariableUse,
    /// Honoured: what it does. Accepted: why it has no effect. Refused: what to do instead.
    pub text: String,
}

/// What this server does with a variable.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum VariableUse {
    Honoured,
    Accepted,
    Refused,
}

/// The variables that have a row of their own in docs/compatibility.md.
pub fn variables() -> &'static [Variable] {
    &VARIABLES
}

/// The `VLLM_*` names without effect and without a row, in vLLM's order.
pub fn without_effect() -> impl Iterator<Item = &'static str> {
    let listed = |name: &&str| VARIABLES.iter().any(|variable| variable.name == *name);
    include_str!("vllm_variables.txt")
        .lines()
        .filter(move |name| !listed(name))
}

fn is_honoured(name: &str) -> bool {
    VARIABLES
        .iter()
        .any(|variable| variable.name == name && variable.here == VariableUse::Honoured)
}

/// A copy of the environment, so that its meaning can be tested.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    variables: BTreeMap<String, String>,
}

impl Environment {
    /// This process's. Variables that are no UTF-8 are left out.
    pub fn of_process() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        std::env::vars_os().filter_map(text).collect()
    }

    /// The variable's value; an empty one counts as unset.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    /// Names and values, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// True for 1, true, yes and on.
    pub fn is_on(&self, name: &str) -> bool {
        let value = self.get(name).unwrap_or_default().to_ascii_lowercase();
        matches!(value.as_str(), "1" | "true" | "yes" | "on")
    }

    /// # Errors
    /// The variable is set and is no `T`; the message names it.
    pub fn parsed<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, ConfigError> {
        let parse = |text: &str| {
            text.trim()
                .parse()
                .map_err(|_| ConfigError::new(name, format!("'{text}' is not a valid value")))
        };
        self.get(name).map(parse).transpose()
    }

    /// What to log about the `VLLM_*` variables.
    ///
    /// # Errors
    /// A variable asks for what cannot be done; or `fail_on_unknown` and a name is unknown.
    pub fn check(&self, fail_on_unknown: bool) -> Result<Vec<Notice>, ConfigError> {
        if self.is_on("VLLM_USE_MODELSCOPE") {
            let message = "models come from the Hugging Face hub or a directory; unset it";
            return Err(ConfigError::new("VLLM_USE_MODELSCOPE", message));
        }
        if self.get("VLLM_PLUGINS").is_some() {
            return Err(ConfigError::new(
                "VLLM_PLUGINS",
                "Python plugins cannot be loaded; unset it",
            ));
        }
        let set = || {
            self.variables
                .keys()
                .map(String::as_str)
                .filter(|name| name.starts_with("VLLM_"))
        };
        let mut notices = Vec::new();
        let ineffective: Vec<&str> = set()
            .filter(|name| KNOWN.contains(name) && !is_honoured(name))
            .collect();
        if !ineffective.is_empty() {
            notices.push(Notice::Info(format!(
                "environment variables without effect: {}",
                ineffective.join(", ")
            )));
        }
        let unknown: Vec<&str> = set().filter(|name| !KNOWN.contains(name)).collect();
        if let [first, ..] = unknown[..] {
            if fail_on_unknown {
                return Err(ConfigError::new(
                    first,
                    "unknown environment variable (--fail-on-environ-validation)",
                ));
            }
            notices.push(Notice::Warning(format!(
                "unknown vLLM environment variables: {}",
                unknown.join(", ")
            )));
        }
        Ok(notices)
    }
}

impl FromIterator<(String, String)> for Environment {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(variables: I) -> Self {
        Self {
            variables: variables.into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        variables
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()))
            .collect()
    }

    #[test]
    fn kubernetes_service_variables_only_warn() {
        let env = environment(&[
            ("VLLM_PORT", "tcp://10.0.0.1:80"),
            ("VLLM_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ]);
        let notices = env.check(false).unwrap();
        assert_eq!(
            notices[0],
            Notice::Info("environment variables without effect: VLLM_PORT".into())
        );
        assert_eq!(
            notices[1],
            Notice::Warning("unknown vLLM environment variables: VLLM_PORT_80_TCP".into())
        );
        assert_eq!(env.check(true).unwrap_err().parameter, "VLLM_PORT_80_TCP");
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        assert_eq!(
            environment(&[("VLLM_USE_MODELSCOPE", "1")])
                .check(false)
                .unwrap_err()
                .parameter,
            "VLLM_USE_MODELSCOPE"
        );
        assert!(
            environment(&[("VLLM_USE_MODELSCOPE", "0"), ("VLLM_PLUGINS", "")])
                .check(true)
                .is_ok()
        );
        assert!(environment(&[("VLLM_PLUGINS", "mine")]).check(false).is_err());
    }

    #[test]
    fn values_are_read_or_named() {
        let env = environment(&[("A", "3"), ("B", "x"), ("C", "")]);
        assert_eq!(env.parsed::<u32>("A").unwrap(), Some(3));
        assert_eq!(env.parsed::<u32>("C").unwrap(), None);
        assert_eq!(
            env.parsed::<u32>("B").unwrap_err().to_string(),
            "B: 'x' is not a valid value"
        );
    }

    #[test]
    fn the_table_is_consistent() {
        let mut names: Vec<&str> = variables().iter().map(|variable| variable.name.as_str()).collect();
        for variable in variables() {
            let is_vllms = !variable.name.starts_with("VLLM_") || KNOWN.contains(variable.name.as_str());
            assert!(is_vllms && !variable.text.is_empty(), "{}", variable.name);
        }
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all, "a name occurs twice");
        assert_eq!(KNOWN.len(), include_str!("vllm_variables.txt").lines().count());
        let refused = variables()
            .iter()
            .filter(|variable| variable.here == VariableUse::Refused);
        for variable in refused {
            let message = environment(&[(&variable.name, "1")]).check(false).unwrap_err();
            assert_eq!(
                (message.parameter, message.message),
                (variable.name.clone(), variable.text.clone())
            );
        }
    }

    /// Beginnings of names that only environment variables have.
    const PREFIXES: [&str; 9] = [
        "VLLM_",
        "HF_",
        "HUGGINGFACE_",
        "HUGGING_FACE_",
        "TRANSFORMERS_",
        "OTEL_",
        "PROMETHEUS_",
        "OMP_",
        "XDG_",
    ];

    /// A name in quotes in code that reads the configuration has a row that calls it honoured or refused.
    #[test]
    fn every_variable_that_is_read_is_in_the_table() {
        let is_name = |text: &&str| {
            let rest = PREFIXES.iter().find_map(|prefix| text.strip_prefix(prefix));
            rest.is_some_and(|rest| !rest.is_empty())
                && text
                    .chars()
                    .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
        };
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/config");
        let mut read = Vec::new();
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let source = std::fs::read_to_string(&path).unwrap();
            let code = source.split("#[cfg(test)]").next().unwrap_or_default();
            read.extend(code.split('"').filter(is_name).map(str::to_owned));
        }
        assert!(read.len() > 20, "{read:?}");
        for name in read {
            let found = variables().iter().find(|variable| variable.name == name);
            assert!(
                found.is_some_and(|v| v.here != VariableUse::Accepted),
                "{name} is read and has no row"
            );
        }
    }
}
