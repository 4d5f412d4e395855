//! From the configuration to a [`ChatEngine`].

use super::ChatEngine;
use super::template::{ChatTemplate, TemplateError};
use crate::config::{ChatConfig, ParserChoice};
use crate::parsers::{ParserError, Parsers};
use crate::text::TextEngine;

/// The operator's fault: the server cannot start.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ChatBuildError {
    #[error("the chat template cannot be used: {0}")]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Parser(#[from] ParserError),
}

impl ChatEngine {
    /// With the template of the flag or the checkpoint, and the parsers of the flags or those that fit both.
    ///
    /// # Errors
    /// A template that does not parse, a parser that is unknown or that the vocabulary does not fit.
    pub fn from_config(config: &ChatConfig, text: TextEngine) -> Result<Self, ChatBuildError> {
        let tokenizer = text.tokenizer().clone();
        let source = config.template.as_deref().or(tokenizer.chat_template());
        let template = source
            .map(|source| ChatTemplate::new(source, tokenizer.special_names().clone()))
            .transpose()?;
        if template.is_none() {
            tracing::warn!("the model has no chat template: chats must bring one, completions work");
        }
        let parsers = Parsers::resolve(
            flag(&config.reasoning_parser),
            flag(&config.tool_parser),
            source.unwrap_or_default(),
            &|token| tokenizer.token_to_id(token),
        )?;
        Ok(Self::new(
            text,
            template,
            config.content_format,
            parsers,
            &config.structured_outputs,
        ))
    }
}

/// As [`Parsers::resolve`] takes it.
fn flag(choice: &ParserChoice) -> Option<&str> {
    match choice {
        ParserChoice::Detect => None,
        ParserChoice::Off => Some("none"),
        ParserChoice::Named(name) => Some(name),
    }
}
