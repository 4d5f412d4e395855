//! Chat templates, rendered as Hugging Face's `apply_chat_template` renders them.

use std::fmt::Write;
use std::sync::Arc;

use chrono::{Local, NaiveDateTime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as JinjaValue, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::{Map, Value};

use super::jinja_source::{LOOP_CHECK, as_minijinja, iterates_content};
use super::python::{JsonStyle, to_json, to_str};
pub use crate::config::ContentFormat;

/// Work a rendering may do: one per instruction and per 64 bytes made. A turn of an LFM2 template costs about a hundred.
const FUEL: u64 = 5_000_000;
/// The same for a template of a request.
const UNTRUSTED_FUEL: u64 = 1_000_000;
/// Address space for a stack, hardly ever touched. 100,000 lists in each other need less than 8 MB to be dropped, and the
/// fuel nests at most 1,250,000.
const STACK_BYTES: usize = 256 << 20;
/// Nested macros count ten, loops one.
const RECURSION_LIMIT: usize = 500;
const MAX_SOURCE_BYTES: usize = 1 << 20;
const MAX_OUTPUT_BYTES: usize = 32 << 20;
/// What transformers appends to a final message that is to be continued, to find its end in the rendering.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// Template arguments that would change who asks for what; as vLLM, and the arguments that the renderer fills itself.
const REFUSED_KWARGS: [&str; 7] = [
    "chat_template",
    "tokenize",
    "messages",
    "conversation",
    "tools",
    "return_dict",
    "return_tensors",
];
/// Template arguments that the request's own fields overrule.
const OVERRULED_KWARGS: [&str; 5] = [
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "raise_exception",
    "strftime_now",
];

/// Local time, or a fixed one in tests.
pub type Clock = Arc<dyn Fn() -> NaiveDateTime + Send + Sync>;

/// The template cannot be compiled, or does not render this conversation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TemplateError(pub String);

/// What is rendered. Messages are as the template wants them, see [`messages`](super::messages).
#[derive(Clone, Debug, Default)]
pub struct TemplateInput {
    pub messages: Vec<Value>,
    /// Empty reaches the template as none.
    pub tools: Vec<Value>,
    /// Empty reaches the template as none.
    pub documents: Vec<Value>,
    pub add_generation_prompt: bool,
    /// The rendering ends where the last message's text ends.
    pub continue_final_message: bool,
    /// Further variables. Names the template does not use have no effect.
    pub kwargs: Map<String, Value>,
}

/// A compiled template.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    content_format: ContentFormat,
    /// `bos_token`, …: variables unless an argument has the name.
    special_tokens: Arc<Map<String, Value>>,
}

impl ChatTemplate {
    /// `special_tokens`: `bos_token`, `eos_token`, … with their texts.
    ///
    /// # Errors
    /// The source is no Jinja template.
    pub fn new(source: &str, special_tokens: Map<String, Value>) -> Result<Self, TemplateError> {
        Self::with_clock(source, special_tokens, Arc::new(|| Local::now().naive_local()))
    }

    /// As [`new`](Self::new), with the time that `strftime_now` tells.
    ///
    /// # Errors
    /// The source is no Jinja template.
    pub fn with_clock(source: &str, special_tokens: Map<String, Value>, clock: Clock) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(TemplateError(format!(
                "the chat template is larger than {MAX_SOURCE_BYTES} bytes"
            )));
        }
        let environment = on_large_stack(|| {
            let mut environment = environment(clock)?;
            environment
                .add_template_owned("chat", as_minijinja(source))
                .map_err(|error| describe(&error))?;
            Ok(environment)
        })?;
        let content_format = if iterates_content(source) {
            ContentFormat::Parts
        } else {
            ContentFormat::String
        };
        Ok(Self {
            environment: Arc::new(environment),
            content_format,
            special_tokens: Arc::new(special_tokens),
        })
    }

    /// As [`new`](Self::new), for a template that came with a request: less work is allowed.
    ///
    /// # Errors
    /// The source is no Jinja template.
    pub fn untrusted(source: &str, special_tokens: Map<String, Value>) -> Result<Self, TemplateError> {
        let mut template = Self::new(source, special_tokens)?;
        // Not shared yet, so this is no copy.
        Arc::make_mut(&mut template.environment).set_fuel(Some(UNTRUSTED_FUEL));
        Ok(template)
    }

    pub fn content_format(&self) -> ContentFormat {
        self.content_format
    }

    /// The prompt's text. May take long: bounded by fuel, not by time.
    ///
    /// # Errors
    /// The template refuses the conversation or fails on it, an argument has a reserved name, the rendering is too large
    /// or too much work, or there is no final text to continue.
    pub fn render(&self, input: TemplateInput) -> Result<String, TemplateError> {
        on_large_stack(|| self.render_here(input))
    }

    fn render_here(&self, mut input: TemplateInput) -> Result<String, TemplateError> {
        if let Some(name) = REFUSED_KWARGS.iter().find(|name| input.kwargs.contains_key(**name)) {
            return Err(TemplateError(format!("chat_template_kwargs may not contain {name}")));
        }
        let mut final_text = None;
        if input.continue_final_message {
            if input.add_generation_prompt {
                return Err(TemplateError(
                    "continue_final_message and add_generation_prompt cannot both be true".into(),
                ));
            }
            final_text = Some(mark_final_text(&mut input.messages)?);
        }
        let mut variables = Map::clone(&self.special_tokens);
        variables.extend(
            input
                .kwargs
                .into_iter()
                .filter(|(name, _)| !OVERRULED_KWARGS.contains(&name.as_str())),
        );
        variables.insert("messages".into(), input.messages.into());
        for (name, list) in [("tools", input.tools), ("documents", input.documents)] {
            variables.insert(name.into(), if list.is_empty() { Value::Null } else { list.into() });
        }
        variables.insert("add_generation_prompt".into(), input.add_generation_prompt.into());

        let template = self
            .environment
            .get_template("chat")
            .map_err(|error| describe(&error))?;
        let mut out = Limited(Vec::new());
        template
            .render_captured_to(JinjaValue::from(Serde(variables)), &mut out)
            .map_err(|error| describe(&error))?;
        let rendered =
            String::from_utf8(out.0).map_err(|_| TemplateError("the template wrote invalid UTF-8".into()))?;
        match final_text {
            None => Ok(rendered),
            Some(text) => cut_after(rendered, &text),
        }
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("content_format", &self.content_format)
            .finish_non_exhaustive()
    }
}

/// The parser recurses a few hundred times over large frames, and dropping nested values recurses as deep as they nest:
/// more than the stack of a blocking thread bears.
fn on_large_stack<T: Send>(work: impl FnOnce() -> Result<T, TemplateError> + Send) -> Result<T, TemplateError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("template".into())
            .stack_size(STACK_BYTES);
        let working = thread
            .spawn_scoped(scope, work)
            .map_err(|error| TemplateError(format!("there is no thread for the chat template: {error}")))?;
        working
            .join()
            .unwrap_or_else(|_| Err(TemplateError("the chat template could not be processed".into())))
    })
}

/// Jinja2 as transformers sets it up.
fn environment(clock: Clock) -> Result<Environment<'static>, TemplateError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| describe(&error))?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_LIMIT);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            let text = to_str(value)?;
            state.consume_fuel(serialised_cost(&text))?;
            out.write_str(&text).map_err(Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    });
    // As Jinja2 answers them; minijinja's own say yes to none and no to strings.
    environment.add_test("iterable", |value: &JinjaValue| {
        matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Iterable | ValueKind::Undefined
        )
    });
    environment.add_test("sequence", |value: &JinjaValue| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
    });
    // Jinja2 refuses to loop over none; minijinja takes it for an empty list.
    environment.add_filter(LOOP_CHECK, |value: JinjaValue| -> Result<JinjaValue, Error> {
        if value.is_none() {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "'NoneType' object is not iterable",
            ));
        }
        Ok(value)
    });
    environment.add_filter("tojson", tojson);
    environment.add_filter(
        "string",
        |state: &State, value: &JinjaValue| -> Result<JinjaValue, Error> {
            if value.kind() == ValueKind::String {
                return Ok(value.clone());
            }
            let text = to_str(value)?;
            state.consume_fuel(serialised_cost(&text))?;
            Ok(text.into())
        },
    );
    environment.add_function("raise_exception", |message: String| -> Result<JinjaValue, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: &str| -> Result<String, Error> {
        // Python's local time has no zone to tell.
        let format = format.replace("%Z", "").replace("%z", "");
        let mut text = String::new();
        write!(text, "{}", clock().format(&format)).map_err(|_| {
            Error::new(
                ErrorKind::InvalidOperation,
                "strftime_now: a directive of the format is unknown",
            )
        })?;
        Ok(text)
    });
    Ok(environment)
}

/// Walking a value is slower than copying its bytes.
fn serialised_cost(text: &str) -> u64 {
    text.len() as u64 / 4
}

/// transformers' `tojson`: `json.dumps` with its keyword arguments.
fn tojson(state: &State, value: &JinjaValue, kwargs: Kwargs) -> Result<JinjaValue, Error> {
    let ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let indent = match kwargs.get::<Option<JinjaValue>>("indent")? {
        Some(indent) if indent.kind() == ValueKind::String => Some(indent.to_string()),
        Some(indent) if !indent.is_none() => Some(" ".repeat(usize::try_from(indent)?.min(64))),
        _ => None,
    };
    let separators = match kwargs
        .get::<Option<JinjaValue>>("separators")?
        .filter(|separators| !separators.is_none())
    {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some(pair) => (
            pair.get_item_by_index(0)?.to_string(),
            pair.get_item_by_index(1)?.to_string(),
        ),
    };
    kwargs.assert_all_used()?;
    let text = to_json(
        value,
        &JsonStyle {
            ensure_ascii,
            indent,
            separators,
            sort_keys,
        },
    )?;
    state.consume_fuel(serialised_cost(&text))?;
    Ok(text.into())
}

/// Collects output up to a limit.
struct Limited(Vec<u8>);

impl std::io::Write for &mut Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::Error::other(format!(
                "the prompt is larger than {MAX_OUTPUT_BYTES} bytes"
            )));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The innermost cause, as the template's author would know it.
fn describe(error: &Error) -> TemplateError {
    let mut cause = error;
    while let Some(inner) = std::error::Error::source(cause).and_then(|source| source.downcast_ref::<Error>()) {
        cause = inner;
    }
    if cause.kind() == ErrorKind::OutOfFuel {
        return TemplateError("the chat template does too much work for these messages".into());
    }
    let what = cause.detail().map_or_else(|| cause.kind().to_string(), str::to_owned);
    match cause.line().filter(|_| cause.kind() != ErrorKind::InvalidOperation) {
        Some(line) => TemplateError(format!("{}: {what} (line {line} of the chat template)", cause.kind())),
        None => TemplateError(what),
    }
}

/// Appends the tag to the last message's text; returns the text without it.
fn mark_final_text(messages: &mut [Value]) -> Result<String, TemplateError> {
    let nothing =
        || TemplateError("continue_final_message is set but the final message has no text to continue".into());
    let content = messages
        .last_mut()
        .and_then(|message| message.get_mut("content"))
        .ok_or_else(nothing)?;
    let text = match content {
        Value::Array(parts) => parts
            .iter_mut()
            .rev()
            .find_map(|part| part.get_mut("text"))
            .ok_or_else(nothing)?,
        content => content,
    };
    let Value::String(text) = text else {
        return Err(nothing());
    };
    let original = text.clone();
    text.push_str(CONTINUE_TAG);
    Ok(original)
}

/// Cuts the rendering where the final message's text ends.
fn cut_after(mut rendered: String, final_text: &str) -> Result<String, TemplateError> {
    let missing = || {
        TemplateError(
            "continue_final_message is set but the final message does not appear in the prompt: the chat template \
             drops or changes it"
                .into(),
        )
    };
    let at = rendered.rfind(CONTINUE_TAG.trim_end()).ok_or_else(missing)?;
    if !rendered.contains(final_text.trim()) {
        return Err(missing());
    }
    let kept_spacing = rendered[at..].starts_with(CONTINUE_TAG);
    rendered.truncate(at);
    if !kept_spacing {
        // The template trims what it prints, so the text's own trailing blanks are gone too.
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(rendered)
}

#[cfg(test)]
mod tests;
