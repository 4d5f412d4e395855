//! Messages become a prompt; text deltas become assistant events.

mod build;
mod constrain;
mod engine;
mod event;
mod jinja_source;
pub mod messages;
mod python;
mod stream;
pub mod template;

use serde_json::{Map, Value};

pub use build::ChatBuildError;
pub use engine::{Chat, ChatEngine, ChatError, ChatStream, RenderRequest, RenderedChat};
pub use event::{ChatChoice, ChatDelta, ChatEvent, ChatFinish, FinishReason, Parsing, StopReason, ToolCallDelta};
pub use stream::{ChoiceParsers, collect, events};

use crate::grammar::GrammarSpec;
use crate::text::{GenerateRequest, Truncation};

/// A conversation, protocol-free. Built by the server's `convert.rs` of each chat-like endpoint.
#[derive(Clone, Debug)]
pub struct ChatRequest {
    /// As the client sent them; [`messages`] makes them what the template expects.
    pub messages: Vec<Value>,
    /// As the template sees them: OpenAI tool objects.
    pub tools: Vec<Value>,
    pub tool_choice: ToolChoice,
    pub parallel_tool_calls: bool,
    /// What the answer must look like; a forced call beats it.
    pub grammar: Option<GrammarSpec>,
    pub add_generation_prompt: bool,
    pub continue_final_message: bool,
    /// Beside those that the template writes; templates write BOS themselves.
    pub add_special_tokens: bool,
    pub documents: Vec<Value>,
    /// The request's, already merged over `--default-chat-template-kwargs`.
    pub template_kwargs: Map<String, Value>,
    /// Replaces the model's template; already checked to be trusted.
    pub chat_template: Option<String>,
    /// False only hides: reasoning is generated and counted, not sent.
    pub include_reasoning: bool,
    /// Cuts the rendered prompt.
    pub truncation: Option<Truncation>,
    /// `prompt` is filled in by the chat layer.
    pub generate: GenerateRequest,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// Tools are rendered, text is not parsed for calls.
    None,
    Auto,
    /// One call or more, of any functions, enforced.
    Required,
    /// One call of this function, enforced. It is among the tools.
    Named(String),
}
