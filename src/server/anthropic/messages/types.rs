//! The wire types of `/v1/messages`: vLLM's fields, its order of keys.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::server::field::{Choice, TextOrList, Words, request_body};
use crate::server::openai::types::{ExtraArgs, MediaPayloads};

request_body! {
    pub struct MessagesRequest {
        pub max_tokens: i64,
        /// A user's id and the like; nothing here reads it.
        pub metadata: Map<String, Value>,
        pub stop_sequences: Vec<String>,
        pub stream: bool,
        pub temperature: f64,
        pub top_k: i64,
        pub top_p: f64,
        pub watermarking: bool,
        pub cache_salt: String,

        // Without effect: for connectors, plugins and render servers.
        pub kv_transfer_params: Map<String, Value>,
        pub ec_transfer_params: Map<String, Value>,
        pub vllm_xargs: ExtraArgs,
        pub mm_payload: Choice<MediaPayloads>,
        pub return_mm_kwargs: bool,
        also prompt: PromptFields,
    }
}

request_body! {
    /// What makes the prompt; `/v1/messages/count_tokens` has nothing else.
    pub struct PromptFields {
        pub model: String,
        pub messages: Vec<Message>,
        pub output_config: OutputConfig,
        pub system: TextOrList<ContentBlock>,
        pub thinking: Thinking,
        pub tool_choice: ToolChoice,
        pub tools: Vec<Tool>,
        pub chat_template_kwargs: Map<String, Value>,
    }
}

request_body! {
    pub struct Message {
        pub role: Choice<Roles>,
        pub content: TextOrList<ContentBlock>,
    }
}

request_body! {
    /// Which fields have a meaning is `type`'s to say.
    pub struct ContentBlock {
        pub r#type: Choice<BlockTypes>,
        pub text: String,
        pub id: String,
        pub tool_use_id: String,
        pub name: String,
        pub input: Map<String, Value>,
        pub content: TextOrList<Map<String, Value>>,
        pub is_error: bool,
        pub thinking: String,
        pub signature: String,
        pub data: String,
    }
}

request_body! {
    pub struct Tool {
        /// `custom`, or one of Anthropic's own tools.
        pub r#type: String,
        pub name: String,
        pub description: String,
        pub input_schema: Map<String, Value>,
        pub strict: bool,
        pub defer_loading: bool,
    }
}

request_body! {
    pub struct ToolChoice {
        pub r#type: Choice<ToolChoiceTypes>,
        pub name: String,
        pub disable_parallel_tool_use: bool,
    }
}

request_body! {
    pub struct Thinking {
        pub r#type: Choice<ThinkingTypes>,
        pub budget_tokens: i64,
        /// How a client wants to see it; thinking is always sent, as in vLLM, so that it can come back.
        pub display: Choice<Displays>,
    }
}

request_body! {
    pub struct OutputConfig {
        pub effort: Choice<Efforts>,
        pub format: OutputFormat,
    }
}

request_body! {
    pub struct OutputFormat {
        pub r#type: Choice<OutputFormatTypes>,
        pub schema: Map<String, Value>,
    }
}

macro_rules! words {
    ($($name:ident: $($word:literal)*;)*) => {
        $(
            #[derive(Clone, Debug, PartialEq, Eq)]
            pub struct $name;
            impl Words for $name {
                const WORDS: &'static [&'static str] = &[$($word),*];
            }
        )*
    };
}

words! {
    Roles: "user" "assistant" "system";
    BlockTypes: "text" "image" "tool_use" "tool_result" "tool_reference" "thinking" "redacted_thinking" "tool_addition"
        "tool_removal";
    ToolChoiceTypes: "auto" "any" "tool" "none";
    ThinkingTypes: "enabled" "disabled" "adaptive";
    Displays: "summarized" "omitted" "updates";
    Efforts: "low" "medium" "high" "xhigh" "max";
    OutputFormatTypes: "json_schema";
}

/// The answer; in `message_start` without content and reason.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MessageResponse {
    pub id: String,
    pub r#type: &'static str,
    pub role: &'static str,
    pub content: Vec<Block>,
    pub model: String,
    pub stop_reason: Option<&'static str>,
    /// Null where none matched: Anthropic's clients expect the key, which vLLM leaves out of a whole answer.
    pub stop_sequence: Option<String>,
    pub usage: Usage,
}

/// A block of the answer. `content_block_start` carries it empty.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Block {
    Text { text: String },
    ToolUse { id: String, name: String, input: Value },
    Thinking { thinking: String, signature: String },
}

/// Cache counts only with `--enable-prompt-tokens-details`; then they are not part of `input_tokens`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub input_tokens: usize,
    pub output_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_creation_input_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_read_input_tokens: Option<usize>,
}

/// An event of a stream; its `type` is also the frame's name.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StreamEvent {
    MessageStart { message: MessageResponse },
    ContentBlockStart { content_block: Block, index: usize },
    ContentBlockDelta { delta: BlockDelta, index: usize },
    ContentBlockStop { index: usize },
    MessageDelta { delta: MessageDelta, usage: Usage },
    MessageStop,
}

impl StreamEvent {
    pub fn name(&self) -> &'static str {
        match self {
            StreamEvent::MessageStart { .. } => "message_start",
            StreamEvent::ContentBlockStart { .. } => "content_block_start",
            StreamEvent::ContentBlockDelta { .. } => "content_block_delta",
            StreamEvent::ContentBlockStop { .. } => "content_block_stop",
            StreamEvent::MessageDelta { .. } => "message_delta",
            StreamEvent::MessageStop => "message_stop",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum BlockDelta {
    TextDelta { text: String },
    ThinkingDelta { thinking: String },
    InputJsonDelta { partial_json: String },
    SignatureDelta { signature: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MessageDelta {
    pub stop_reason: Option<&'static str>,
    pub stop_sequence: Option<String>,
}
