//! OpenAI's endpoints, with vLLM's extensions.

pub mod chat_completions;
pub mod completions;
pub mod models;
pub mod types;
