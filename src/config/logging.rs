//! What is logged and where to; decided before anything else, so that the rest can log.

use serde_json::Value;

use super::args::LoggingArgs;
use super::environment::Environment;
use super::resolve::ConfigError;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggingConfig {
    /// Least severe level that is logged; none = nothing is.
    pub level: Option<tracing::Level>,
    pub to_stderr: bool,
    /// None = on a terminal.
    pub color: Option<bool>,
}

/// # Errors
/// A level or stream is unknown; an option of `--logging-config` cannot be honoured.
pub fn resolve(args: &LoggingArgs, env: &Environment) -> Result<LoggingConfig, ConfigError> {
    let mut level_text = args.log_level.as_deref().map(|level| ("--log-level", level));
    let mut configured = env.get("VLLM_CONFIGURE_LOGGING") != Some("0");
    for (key, value) in args.logging_config.iter().flatten() {
        let fail = |message: &str| ConfigError::new(format!("--logging-config.{key}"), format!("{value} {message}"));
        match (key.as_str(), value) {
            ("log_level", Value::String(level)) => {
                level_text = level_text.or(Some(("--logging-config.log_level", level)));
            }
            ("formatter", Value::String(formatter)) if formatter == "text" => {}
            ("formatter", _) => return Err(fail("is not supported; logs are text")),
            ("configure_logging", Value::Bool(on)) => configured = *on,
            ("pylogging_config_file", Value::Null) => {}
            ("pylogging_config_file", _) => return Err(fail("is not supported; use --log-level")),
            ("log_level" | "configure_logging", _) => return Err(fail("has the wrong type")),
            _ => return Err(fail("is no known option")),
        }
    }
    let (source, text) = level_text.unwrap_or(("VLLM_LOGGING_LEVEL", env.get("VLLM_LOGGING_LEVEL").unwrap_or("INFO")));
    let level = match text.to_ascii_uppercase().as_str() {
        "CRITICAL" | "ERROR" => tracing::Level::ERROR,
        "WARNING" | "WARN" => tracing::Level::WARN,
        "INFO" => tracing::Level::INFO,
        "DEBUG" => tracing::Level::DEBUG,
        "NOTSET" | "TRACE" => tracing::Level::TRACE,
        _ => return Err(ConfigError::new(source, format!("'{text}' is no level"))),
    };
    let to_stderr = match env.get("VLLM_LOGGING_STREAM").unwrap_or("ext://sys.stdout") {
        "ext://sys.stdout" => false,
        "ext://sys.stderr" => true,
        other => {
            return Err(ConfigError::new(
                "VLLM_LOGGING_STREAM",
                format!("'{other}' is no known stream"),
            ));
        }
    };
    let color = match (
        env.get("NO_COLOR"),
        env.get("FORCE_COLOR"),
        env.get("VLLM_LOGGING_COLOR"),
    ) {
        (Some(_), _, _) | (None, None, Some("0")) => Some(false),
        (None, Some(_), _) | (None, None, Some("1")) => Some(true),
        _ => None,
    };
    Ok(LoggingConfig {
        level: configured.then_some(level),
        to_stderr,
        color,
    })
}
