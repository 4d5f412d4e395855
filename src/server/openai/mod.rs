//! OpenAI's endpoints, with vLLM's extensions.

pub mod chat_completions;
pub mod completions;
pub mod convert;
mod load_report;
pub mod models;
pub mod reply;
pub mod responses;
pub mod structured;
pub mod tokenize;
pub mod tool_metrics;
pub mod truncate;
pub mod types;
pub mod validate;
