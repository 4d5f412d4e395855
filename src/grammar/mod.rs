//! What output must look like → a grammar → the tokens that may come next.
//!
//! [`GrammarCompiler`] turns a [`GrammarSpec`] (`response_format`, `structured_outputs`, a tool choice) into a [`Grammar`],
//! under limits of size, time and memory, and keeps the last ones. A [`Constraint`] is a grammar and where it begins;
//! [`ConstraintState`] follows one sequence through it and gives the mask of each step.
//!
//! The automaton is llguidance's. What stands here is what a server needs around it: schemas are resolved and checked
//! before it sees them (`schema`), other notations are translated to its Lark dialect (`ebnf`, `structural_tag`), and JSON
//! that could go on for ever is cut short (`guard`).

mod cache;
mod compiler;
mod constraint;
mod ebnf;
mod guard;
mod lark;
mod schema;
mod structural_tag;
mod vocabulary;

use serde_json::Value;

pub use compiler::{Grammar, GrammarCompiler};
pub use constraint::{Constraint, ConstraintState, Reasoning, Start, Violation};
pub use vocabulary::Vocabulary;

/// What output must look like.
#[derive(Clone, Debug, PartialEq)]
pub struct GrammarSpec {
    pub kind: GrammarKind,
    pub options: GrammarOptions,
}

#[derive(Clone, Debug, PartialEq)]
pub enum GrammarKind {
    /// A JSON value that validates against the schema.
    JsonSchema(Value),
    /// Any JSON object.
    JsonObject,
    /// Text that matches the whole regular expression.
    Regex(String),
    /// One of the texts.
    Choice(Vec<String>),
    /// EBNF as llama.cpp and xgrammar write it (`root ::= …`), or Lark.
    Grammar(String),
    /// Free text with constrained parts: `{type, format}`, or the older `{type, structures, triggers}`.
    StructuralTag(Value),
}

/// How JSON is written; of no meaning to the other kinds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GrammarOptions {
    /// Compact JSON: no white space between tokens.
    pub disable_any_whitespace: bool,
    /// Objects have only the properties that their schema names.
    pub disable_additional_properties: bool,
    /// A regular expression of the white space allowed between tokens.
    pub whitespace_pattern: Option<String>,
}

impl GrammarSpec {
    /// With the default options.
    pub fn new(kind: GrammarKind) -> Self {
        Self {
            kind,
            options: GrammarOptions::default(),
        }
    }
}

/// There will be no grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The client's fault: malformed, contradictory, unsupported or too large. Names the place in a schema.
    #[error("{0}")]
    Invalid(String),
    /// Too many are being compiled.
    #[error("the server is compiling too many grammars")]
    Busy,
}

impl GrammarError {
    fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid(message.into())
    }
}

#[cfg(test)]
mod tests;
