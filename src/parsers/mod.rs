//! Protocols of model output: what is reasoning, what is a tool call, what is content. Pure text and token ids.
//!
//! A parser is a new file and one line in [`reasoning::REGISTRY`] or [`tool::REGISTRY`].

/// A piece of an assistant's turn. Concatenating the pieces of one kind gives the whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AssistantDelta {
    Content(String),
    Reasoning(String),
    /// A call begins; `index` counts from 0 in the turn.
    ToolCallStart {
        index: usize,
        name: String,
    },
    /// More of the call's arguments, as JSON text.
    ToolCallArguments {
        index: usize,
        arguments: String,
    },
}
