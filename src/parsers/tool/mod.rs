//! Parsers that find tool calls in content.

pub(super) mod json_calls;
mod lfm2;
mod python_literal;

use super::{AssistantDelta, ParserError, TokenLookup};

/// Every tool parser, by its `--tool-call-parser` name.
pub static REGISTRY: &[Entry] = &[Entry {
    name: "lfm2",
    aliases: &[],
    new: lfm2::new,
    markers: lfm2::MARKERS,
    detect: lfm2::detect,
}];

/// One line of [`REGISTRY`].
#[derive(Debug)]
pub struct Entry {
    pub name: &'static str,
    pub aliases: &'static [&'static str],
    pub(super) new: fn() -> Box<dyn ToolParser>,
    /// Begin and end a block of calls; the vocabulary must have them.
    pub markers: [&'static str; 2],
    /// Whether a checkpoint speaks the protocol, from its chat template and vocabulary.
    pub(super) detect: fn(&str, TokenLookup<'_>) -> bool,
}

/// A call that has been read to its end; its id is the server's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    pub name: String,
    /// A JSON object.
    pub arguments: String,
}

/// What a block of calls was, known at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolBlock {
    /// Its calls. They are what the stream has sent, except where a stream could not know better: of two equal
    /// parameters it sends the first, and the second counts here.
    Calls(Vec<ToolCall>),
    /// No calls; the text, markers included, is content. Calls that a stream has begun are void in a collected message.
    Invalid(String),
    /// Output ended inside the block, after calls were begun. Content in a collected message, where the calls are void;
    /// a stream has sent what there is.
    Cut(String),
}

impl ToolBlock {
    /// What a stream has to send as content, so that no text is lost.
    pub fn stream_content(&self) -> Option<&str> {
        match self {
            ToolBlock::Invalid(raw) => Some(raw),
            ToolBlock::Calls(_) | ToolBlock::Cut(_) => None,
        }
    }
}

/// Reads the content of one choice.
pub trait ToolParser: Send {
    fn push(&mut self, text: &str, out: &mut Vec<AssistantDelta>);

    /// The turn is over: what was held back.
    fn finish(&mut self, out: &mut Vec<AssistantDelta>);

    /// Begins a block; reasoning is searched for it too. Starts with `<`. None where the whole content is the block.
    fn start_marker(&self) -> Option<&'static str>;
}

pub(super) fn find(name: &str, token: TokenLookup<'_>) -> Result<&'static Entry, ParserError> {
    const FLAG: &str = "--tool-call-parser";
    let found = REGISTRY
        .iter()
        .find(|entry| entry.name == name || entry.aliases.contains(&name));
    let entry = found.ok_or_else(|| ParserError::Unknown {
        flag: FLAG,
        name: name.to_owned(),
        known: REGISTRY
            .iter()
            .map(|entry| entry.name)
            .chain(["none"])
            .collect::<Vec<_>>()
            .join(", "),
    })?;
    match entry.markers.iter().find(|text| token(text).is_none()) {
        Some(token) => Err(ParserError::MissingToken {
            flag: FLAG,
            name: entry.name,
            token,
        }),
        None => Ok(entry),
    }
}

pub(super) fn detect(chat_template: &str, token: TokenLookup<'_>) -> Option<&'static Entry> {
    REGISTRY.iter().find(|entry| (entry.detect)(chat_template, token))
}
