//! From a model's name to its files: `demo`, a directory, or a snapshot of the hub.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::args::ServeArgs;
use super::environment::Environment;
use super::resolve::ConfigError;
use super::{ModelFiles, demo};
use crate::hub::{Hub, HubSettings, Selection};

/// The branch that is meant when no `--revision` is given.
const MAIN: &str = "main";

/// Finds files by the names users write. Knows the hub's settings.
pub struct Locator {
    hub: Hub,
    home: Option<PathBuf>,
    ignore_patterns: Vec<String>,
}

impl Locator {
    /// # Errors
    /// `--hf-token` without a value, and no token is stored.
    pub fn new(args: &ServeArgs, env: &Environment) -> Result<Self, ConfigError> {
        let hub = Hub::new(hub_settings(args, env)?);
        let home = env.get("HOME").map(PathBuf::from);
        Ok(Self {
            hub,
            home,
            ignore_patterns: args.load.ignore_patterns.clone(),
        })
    }

    /// The files of `name`, downloaded if it is a hub id that is not cached; with `weights` those too.
    ///
    /// # Errors
    /// There is no such directory and no such repository, or it cannot be had. The message names `flag`.
    pub fn locate(
        &self,
        flag: &str,
        name: &str,
        revision: Option<&str>,
        weights: bool,
    ) -> Result<ModelFiles, ConfigError> {
        if name == demo::NAME {
            return Ok(ModelFiles::Embedded(demo::FILES));
        }
        let path = self.expand(name);
        if path.is_dir() {
            return Ok(ModelFiles::Directory(path));
        }
        if path.exists() {
            return Err(ConfigError::new(
                flag,
                format!("{name} is a file; give the directory it is in"),
            ));
        }
        if name.starts_with(['/', '.', '~']) || name.matches('/').count() > 1 {
            return Err(ConfigError::new(flag, format!("the directory {name} does not exist")));
        }
        let selection = Selection {
            weights,
            ignore_patterns: self.ignore_patterns.clone(),
        };
        let directory = self.hub.snapshot(name, revision.unwrap_or(MAIN), &selection);
        directory
            .map(ModelFiles::Directory)
            .map_err(|error| ConfigError::new(flag, error.to_string()))
    }

    /// `~/x` under HOME, as Python's `expanduser`.
    fn expand(&self, path: &str) -> PathBuf {
        match (path.strip_prefix("~/"), &self.home) {
            (Some(rest), Some(home)) => home.join(rest),
            _ => Path::new(path).to_path_buf(),
        }
    }
}

/// The variables of `huggingface_hub`, with `--download-dir` and `--hf-token` above them.
fn hub_settings(args: &ServeArgs, env: &Environment) -> Result<HubSettings, ConfigError> {
    let home = || env.get("HOME").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
    let cache_home = || {
        env.get("XDG_CACHE_HOME")
            .map_or_else(|| home().join(".cache"), PathBuf::from)
    };
    let hf_home = env
        .get("HF_HOME")
        .map_or_else(|| cache_home().join("huggingface"), PathBuf::from);
    let named = args
        .load
        .download_dir
        .as_deref()
        .filter(|directory| !directory.is_empty());
    let named = named
        .or_else(|| env.get("HF_HUB_CACHE"))
        .or_else(|| env.get("HUGGINGFACE_HUB_CACHE"));
    let token_path = env
        .get("HF_TOKEN_PATH")
        .map_or_else(|| hf_home.join("token"), PathBuf::from);
    let stored = || {
        let variable = env
            .get("HF_TOKEN")
            .or_else(|| env.get("HUGGING_FACE_HUB_TOKEN"))
            .map(str::to_owned);
        let token = variable.or_else(|| std::fs::read_to_string(&token_path).ok());
        token
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty())
    };
    let token = match &args.model_args.hf_token {
        Some(Value::String(token)) if !token.is_empty() => Some(token.clone()),
        Some(Value::Bool(true)) => {
            let message = format!("no token is stored in HF_TOKEN or {}", token_path.display());
            Some(stored().ok_or_else(|| ConfigError::new("--hf-token", message))?)
        }
        _ => stored(),
    };
    if token
        .as_ref()
        .is_some_and(|token| !token.chars().all(|c| c.is_ascii_graphic()))
    {
        return Err(ConfigError::new(
            "--hf-token",
            "the token (also HF_TOKEN) has characters that no token has",
        ));
    }
    let timeout_s = env.parsed::<u64>("HF_HUB_DOWNLOAD_TIMEOUT")?.unwrap_or(10).max(1);
    Ok(HubSettings {
        endpoint: env
            .get("HF_ENDPOINT")
            .unwrap_or("https://huggingface.co")
            .trim_end_matches('/')
            .to_owned(),
        token,
        cache_dir: named.map_or_else(|| hf_home.join("hub"), PathBuf::from),
        offline: env.is_on("HF_HUB_OFFLINE") || env.is_on("TRANSFORMERS_OFFLINE"),
        retry_pause: Duration::from_secs(1),
        timeout: Duration::from_secs(timeout_s),
    })
}
