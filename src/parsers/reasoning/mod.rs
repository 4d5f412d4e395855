//! Parsers that separate reasoning from content.

mod think;

use super::{ParserError, TokenLookup};

/// Every reasoning parser, by its `--reasoning-parser` name.
pub static REGISTRY: &[Entry] = &[
    Entry {
        name: "lfm2",
        aliases: &[],
        markers: think::REASONING_MARKERS,
        new: think::new_lfm2,
        detect: think::detect,
    },
    Entry {
        name: "qwen3",
        aliases: &[],
        markers: think::REASONING_MARKERS,
        new: think::new_qwen3,
        detect: |_, _| false,
    },
];

/// One line of [`REGISTRY`].
#[derive(Debug)]
pub struct Entry {
    pub name: &'static str,
    pub aliases: &'static [&'static str],
    /// Begin and end reasoning.
    pub markers: [&'static str; 2],
    pub(super) new: fn(&Prompt<'_>, TokenLookup<'_>) -> Box<dyn ReasoningParser>,
    /// Whether a checkpoint speaks the protocol, from its chat template and vocabulary.
    pub(super) detect: fn(&str, TokenLookup<'_>) -> bool,
}

/// What a reasoning parser must know about the prompt: whether the turn begins inside reasoning.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prompt<'a> {
    /// As rendered, special tokens included.
    pub text: &'a str,
    pub token_ids: &'a [u32],
    /// False when the request's template arguments have `enable_thinking: false` (`reasoning_effort: none` sets it too).
    pub enable_thinking: bool,
    /// Special tokens that end reasoning too, or come in its place, because a grammar begins behind them. They are left out
    /// of the text.
    pub also_end: &'a [SpecialToken],
}

/// A token that text can hold; its text starts with `<`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    pub id: u32,
    pub text: String,
}

/// A stretch of text that is one or the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    Reasoning(String),
    Content(String),
}

/// Where the prompt leaves a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning {
    Content,
    Reasoning,
    /// In content, unless the model opens reasoning first.
    Undecided,
}

/// Reads one choice.
pub trait ReasoningParser: Send {
    /// Asked before anything is pushed.
    fn beginning(&self) -> Beginning;

    /// `token_ids`: the tokens sampled since the last call, the stopping one excluded. They may be ahead of the text.
    fn push(&mut self, text: &str, token_ids: &[u32], out: &mut Vec<Segment>);

    /// The turn is over: what was held back.
    fn finish(&mut self, out: &mut Vec<Segment>);

    /// Tokens in reasoning so far, markers excluded.
    fn reasoning_tokens(&self) -> usize;
}

pub(super) fn find(name: &str) -> Result<&'static Entry, ParserError> {
    let found = REGISTRY
        .iter()
        .find(|entry| entry.name == name || entry.aliases.contains(&name));
    found.ok_or_else(|| ParserError::Unknown {
        flag: "--reasoning-parser",
        name: name.to_owned(),
        known: REGISTRY
            .iter()
            .map(|entry| entry.name)
            .chain(["none"])
            .collect::<Vec<_>>()
            .join(", "),
    })
}

pub(super) fn detect(chat_template: &str, token: TokenLookup<'_>) -> Option<&'static Entry> {
    REGISTRY.iter().find(|entry| (entry.detect)(chat_template, token))
}
