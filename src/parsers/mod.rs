//! Protocols of model output: what is reasoning, what is a tool call, what is content. Pure text and token ids.
//!
//! A parser is a new file and one line in [`reasoning::REGISTRY`] or [`tool::REGISTRY`]. [`Parsers`] is what a server was
//! started with, [`AssistantParser`] reads one choice with it.

mod assistant;
mod marker;
pub mod reasoning;
pub mod tool;

#[cfg(test)]
pub(crate) mod cases;

pub use assistant::{AssistantParser, ForcedCalls, Turn};
pub use tool::{ToolBlock, ToolCall};

/// A piece of an assistant's turn. Concatenating the pieces of one kind gives the whole, as a stream shows it.
///
/// A stream can take nothing back, a collected message knows the end. Where the two differ, [`ToolBlock`] says so.
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
    /// The block that held the calls is over. A stream sends [`ToolBlock::stream_content`] as content, nothing else.
    ToolBlock(ToolBlock),
}

/// The vocabulary: a token's text to its id, `None` when the text is not exactly one token.
pub type TokenLookup<'a> = &'a dyn Fn(&str) -> Option<u32>;

/// The parsers of a server, resolved once against its checkpoint.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parsers {
    pub reasoning: Option<&'static reasoning::Entry>,
    pub tool: Option<&'static tool::Entry>,
}

/// A flag that cannot be honoured; the text names the flag.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParserError {
    #[error("{flag}: there is no parser \"{name}\"; known are {known}")]
    Unknown {
        flag: &'static str,
        name: String,
        known: String,
    },
    #[error("{flag} {name}: the tokenizer has no token {token}")]
    MissingToken {
        flag: &'static str,
        name: &'static str,
        token: &'static str,
    },
}

impl Parsers {
    /// Chooses by the flags `--reasoning-parser` and `--tool-call-parser`. Without a flag the checkpoint decides;
    /// `none` turns a parser off.
    ///
    /// # Errors
    /// An unknown name, or a parser whose markers the vocabulary lacks. The operator's fault.
    pub fn resolve(
        reasoning_flag: Option<&str>,
        tool_flag: Option<&str>,
        chat_template: &str,
        token: TokenLookup<'_>,
    ) -> Result<Self, ParserError> {
        Ok(Parsers {
            reasoning: match reasoning_flag {
                None => reasoning::detect(chat_template, token),
                Some("none") => None,
                Some(name) => Some(reasoning::find(name)?),
            },
            tool: match tool_flag {
                None => tool::detect(chat_template, token),
                Some("none") => None,
                Some(name) => Some(tool::find(name, token)?),
            },
        })
    }

    /// True when the text layer must keep special tokens in the text: the parsers read them there.
    ///
    /// `parse_tools`: the request has tools and its tool_choice is not `none`.
    pub fn needs_special_tokens(&self, parse_tools: bool) -> bool {
        self.reasoning.is_some() || (parse_tools && self.tool.is_some())
    }

    /// Where a turn begins. Without a reasoning parser everything is content.
    pub fn beginning(&self, prompt: &reasoning::Prompt<'_>, token: TokenLookup<'_>) -> reasoning::Beginning {
        self.reasoning.map_or(reasoning::Beginning::Content, |entry| {
            (entry.new)(prompt, token).beginning()
        })
    }

    /// A parser for one choice.
    pub fn assistant(&self, turn: &Turn<'_>, token: TokenLookup<'_>) -> AssistantParser {
        let reasoning = self.reasoning.map(|entry| (entry.new)(&turn.prompt, token));
        let tool: Option<Box<dyn tool::ToolParser>> = match turn.forced {
            Some(ForcedCalls::Any) => Some(Box::new(tool::json_calls::JsonCalls::default())),
            Some(ForcedCalls::Named(name)) => Some(Box::new(tool::json_calls::NamedCall::new(name))),
            None => self.tool.filter(|_| turn.parse_tools).map(|entry| (entry.new)()),
        };
        AssistantParser::new(reasoning, tool, turn.parallel_tool_calls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEMPLATE: &str = "{%- if '</think>' in content -%}";

    fn vocabulary<'a>(tokens: &'a [&'a str]) -> impl Fn(&str) -> Option<u32> + 'a {
        |text| {
            tokens
                .iter()
                .zip(0..)
                .find_map(|(token, id)| (*token == text).then_some(id))
        }
    }

    fn names(parsers: Parsers) -> (Option<&'static str>, Option<&'static str>) {
        (
            parsers.reasoning.map(|entry| entry.name),
            parsers.tool.map(|entry| entry.name),
        )
    }

    #[test]
    fn without_flags_the_checkpoint_decides() {
        let full = ["<think>", "</think>", "<|tool_call_start|>", "<|tool_call_end|>"];
        let resolve = |template: &str, tokens: &[&str]| {
            names(Parsers::resolve(None, None, template, &vocabulary(tokens)).unwrap())
        };
        assert_eq!(resolve(TEMPLATE, &full), (Some("lfm2"), Some("lfm2")));
        assert_eq!(resolve("{{ enable_thinking }}", &full[..2]), (Some("lfm2"), None));
        // The vocabulary reserves the markers, but this checkpoint's template knows nothing of them.
        assert_eq!(resolve("{{ messages }}", &full), (None, Some("lfm2")));
        assert_eq!(resolve(TEMPLATE, &full[2..]), (None, Some("lfm2")));
        assert_eq!(resolve(TEMPLATE, &full[..3]), (Some("lfm2"), None));
        assert_eq!(resolve(TEMPLATE, &[]), (None, None));
    }

    #[test]
    fn flags_override_the_checkpoint() {
        let tokens = ["<think>", "</think>", "<|tool_call_start|>", "<|tool_call_end|>"];
        let resolve = |reasoning, tool, tokens: &[&str]| {
            Parsers::resolve(reasoning, tool, TEMPLATE, &vocabulary(tokens)).map(names)
        };
        assert_eq!(resolve(Some("none"), Some("none"), &tokens), Ok((None, None)));
        assert_eq!(resolve(Some("qwen3"), Some("none"), &[]), Ok((Some("qwen3"), None)));
        assert_eq!(
            resolve(Some("glm"), None, &tokens).unwrap_err().to_string(),
            "--reasoning-parser: there is no parser \"glm\"; known are lfm2, qwen3, none"
        );
        assert_eq!(
            resolve(None, Some("hermes"), &tokens).unwrap_err().to_string(),
            "--tool-call-parser: there is no parser \"hermes\"; known are lfm2, none"
        );
        assert_eq!(
            resolve(None, Some("lfm2"), &tokens[..3]).unwrap_err().to_string(),
            "--tool-call-parser lfm2: the tokenizer has no token <|tool_call_end|>"
        );
    }

    #[test]
    fn special_tokens_are_needed_where_a_parser_reads_them() {
        let tokens = ["<think>", "</think>", "<|tool_call_start|>", "<|tool_call_end|>"];
        let resolve = |reasoning, tool| Parsers::resolve(reasoning, tool, TEMPLATE, &vocabulary(&tokens)).unwrap();
        assert!(resolve(Some("qwen3"), Some("none")).needs_special_tokens(false));
        assert!(resolve(Some("none"), Some("lfm2")).needs_special_tokens(true));
        assert!(!resolve(Some("none"), Some("lfm2")).needs_special_tokens(false));
        assert!(!resolve(Some("none"), Some("none")).needs_special_tokens(true));
    }
}
