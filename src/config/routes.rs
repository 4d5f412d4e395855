//! Which of vLLM's optional routes exist, and what they may tell.

use super::args::FrontendArgs;
use super::environment::Environment;

/// Parts of a variable's name whose value is a secret.
const SECRET_NAMES: [&str; 5] = ["KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL"];

/// Flags and variables that add routes or let them do more.
#[derive(Clone, Debug, Default)]
pub struct RoutesConfig {
    /// `VLLM_SERVER_DEV_MODE=1`.
    pub dev_mode: bool,
    /// `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`.
    pub lora_updates: bool,
    /// `--enable-server-load-tracking`.
    pub load_tracking: bool,
    /// `--enable-tokenizer-info-endpoint`.
    pub tokenizer_info: bool,
    pub scale_out: bool,
    pub tokens_only: bool,
    /// Not `--disable-fastapi-docs`.
    pub docs: bool,
    /// `VLLM_*` variables for `/server_info`, by name; none that looks like a secret.
    pub environment: Vec<(String, String)>,
}

impl RoutesConfig {
    pub(super) fn resolve(flags: &FrontendArgs, env: &Environment) -> Self {
        let is_public = |name: &str| name.starts_with("VLLM_") && !SECRET_NAMES.iter().any(|part| name.contains(part));
        Self {
            dev_mode: env.is_on("VLLM_SERVER_DEV_MODE"),
            lora_updates: env.is_on("VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
            load_tracking: flags.enable_server_load_tracking,
            tokenizer_info: flags.enable_tokenizer_info_endpoint,
            scale_out: flags.enable_scale_out,
            tokens_only: flags.tokens_only,
            docs: !flags.disable_fastapi_docs,
            environment: env
                .iter()
                .filter(|(name, _)| is_public(name))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        }
    }
}
