//! `<|tool_call_start|>[f(a=1), g()]<|tool_call_end|>`, with content before and after.
//!
//! # Source
//! vLLM 0.33's `lfm2`, as recorded in `compat-tests/goldens/parser-cases.json`. Only the first block counts; what looks like
//! its echo (a `[` or a further block directly after it, up to an end marker) is dropped. Differs from vLLM, so that no
//! text is lost and a stream shows what a whole answer shows: an unreadable block is content in streams too; text after
//! the block that began like an echo but was none is sent at the end; text between two blocks stays.

use super::python_literal::CallList;
use super::{ToolBlock, ToolParser};
use crate::parsers::marker::{self, Hit};
use crate::parsers::{AssistantDelta, TokenLookup};

const START: &str = "<|tool_call_start|>";
const END: &str = "<|tool_call_end|>";
pub(super) const TOKENS: &[&str] = &[START, END];

#[derive(Default)]
struct Lfm2 {
    state: State,
    /// Text not looked at to its end: the possible beginning of a marker, or white space before a possible echo.
    pending: String,
}

#[derive(Default)]
enum State {
    #[default]
    Before,
    Block(Box<Block>),
    /// Directly behind a block or an echo.
    Behind,
    /// In the text after it.
    After,
    /// In what may be an echo, all of it.
    Echo(String),
    /// Behind an unreadable block: text is content.
    Plain,
}

#[derive(Default)]
struct Block {
    /// Between the markers.
    text: String,
    list: CallList,
    /// Bytes of each call's arguments that have been sent.
    sent: Vec<usize>,
}

pub(super) fn new() -> Box<dyn ToolParser> {
    Box::new(Lfm2::default())
}

pub(super) fn detect(_chat_template: &str, token: TokenLookup<'_>) -> bool {
    TOKENS.iter().all(|text| token(text).is_some())
}

impl Block {
    fn push(&mut self, text: &str) {
        self.text.push_str(text);
        text.chars().for_each(|c| self.list.push(c));
    }

    /// Sends what has become certain.
    fn progress(&mut self, out: &mut Vec<AssistantDelta>) {
        self.list.settle();
        let open = self.sent.len().saturating_sub(1);
        for (index, call) in self.list.calls().iter().enumerate().skip(open) {
            if !call.settled().is_empty() {
                send_call(&mut self.sent, index, &call.name, call.settled(), out);
            }
        }
    }

    fn end(mut self, closed: bool, out: &mut Vec<AssistantDelta>) -> State {
        let Some(calls) = self.list.finish(&self.text) else {
            let raw = format!("{START}{}{}", self.text, if closed { END } else { "" });
            let cut = !closed && !self.sent.is_empty();
            out.push(AssistantDelta::ToolBlock(if cut {
                ToolBlock::Cut(raw)
            } else {
                ToolBlock::Invalid(raw)
            }));
            return State::Plain;
        };
        // All sent, unless the block could be read only with its end known.
        if self.sent.len() < calls.len() || self.list.has_failed() {
            for (index, call) in calls.iter().enumerate() {
                send_call(&mut self.sent, index, &call.name, &call.arguments, out);
            }
        }
        out.push(AssistantDelta::ToolBlock(ToolBlock::Calls(calls)));
        State::Behind
    }
}

/// Sends the part of `arguments` that is new; nothing when they contradict what was sent.
fn send_call(sent: &mut Vec<usize>, index: usize, name: &str, arguments: &str, out: &mut Vec<AssistantDelta>) {
    if index == sent.len() {
        sent.push(0);
        out.push(AssistantDelta::ToolCallStart {
            index,
            name: name.to_owned(),
        });
    }
    if let Some(new) = arguments.get(sent[index]..).filter(|new| !new.is_empty()) {
        out.push(AssistantDelta::ToolCallArguments {
            index,
            arguments: new.to_owned(),
        });
        sent[index] = arguments.len();
    }
}

fn send_content(text: impl Into<String>, out: &mut Vec<AssistantDelta>) {
    let text = text.into();
    if !text.is_empty() {
        out.push(AssistantDelta::Content(text));
    }
}

impl Lfm2 {
    /// Advances over `pending` once; false when more text is needed.
    fn step(&mut self, out: &mut Vec<AssistantDelta>) -> bool {
        if self.pending.is_empty() {
            return false;
        }
        match std::mem::take(&mut self.state) {
            State::Before => match self.cut_at(&[START]) {
                Cut::Marker { before, .. } => {
                    send_content(before, out);
                    self.state = State::Block(Box::default());
                    true
                }
                Cut::None { certain } => {
                    send_content(certain, out);
                    false
                }
            },
            State::Block(mut block) => match self.cut_at(&[END]) {
                Cut::Marker { before, .. } => {
                    block.push(&before);
                    block.progress(out);
                    self.state = block.end(true, out);
                    true
                }
                Cut::None { certain } => {
                    block.push(&certain);
                    block.progress(out);
                    self.state = State::Block(block);
                    false
                }
            },
            State::Behind => {
                let text = self.pending.trim_start();
                let undecided = text.is_empty() || START.starts_with(text) || END.starts_with(text);
                let echo = text.starts_with('[') || text.starts_with(START);
                self.state = match (undecided && text != START, echo) {
                    (true, _) => State::Behind,
                    (false, true) => State::Echo(String::new()),
                    (false, false) => State::After,
                };
                !matches!(self.state, State::Behind)
            }
            State::After => match self.cut_at(&[START, END]) {
                Cut::Marker { before, which } => {
                    send_content(before, out);
                    self.state = if which == 0 {
                        State::Echo(START.to_owned())
                    } else {
                        State::Behind
                    };
                    true
                }
                Cut::None { certain } => {
                    send_content(certain, out);
                    self.state = State::After;
                    false
                }
            },
            State::Echo(mut held) => match self.cut_at(&[END]) {
                Cut::Marker { .. } => {
                    self.state = State::Behind;
                    true
                }
                Cut::None { certain } => {
                    held.push_str(&certain);
                    self.state = State::Echo(held);
                    false
                }
            },
            State::Plain => {
                self.state = State::Plain;
                send_content(std::mem::take(&mut self.pending), out);
                false
            }
        }
    }

    /// Takes the text up to the first marker and the marker, or what is certainly before one.
    fn cut_at(&mut self, markers: &[&str]) -> Cut {
        match marker::find(&self.pending, markers) {
            Hit::Marker { which, at } => {
                let rest = self.pending.split_off(at + markers[which].len());
                let mut before = std::mem::replace(&mut self.pending, rest);
                before.truncate(at);
                Cut::Marker { before, which }
            }
            Hit::Partial { at } => {
                let rest = self.pending.split_off(at);
                Cut::None {
                    certain: std::mem::replace(&mut self.pending, rest),
                }
            }
            Hit::Nothing => Cut::None {
                certain: std::mem::take(&mut self.pending),
            },
        }
    }
}

enum Cut {
    Marker { before: String, which: usize },
    None { certain: String },
}

impl ToolParser for Lfm2 {
    fn push(&mut self, text: &str, out: &mut Vec<AssistantDelta>) {
        self.pending.push_str(text);
        while self.step(out) {}
    }

    fn finish(&mut self, out: &mut Vec<AssistantDelta>) {
        let rest = std::mem::take(&mut self.pending);
        match std::mem::take(&mut self.state) {
            State::Block(mut block) => {
                block.push(&rest);
                block.progress(out);
                self.state = block.end(false, out);
            }
            State::Echo(held) => send_content(held + &rest, out),
            _ => send_content(rest, out),
        }
    }

    fn start_marker(&self) -> &'static str {
        START
    }
}
