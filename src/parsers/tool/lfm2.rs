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
pub(super) const MARKERS: [&str; 2] = [START, END];

#[derive(Default)]
struct Lfm2 {
    state: State,
    /// The possible beginning of a marker.
    pending: String,
}

#[derive(Default)]
enum State {
    #[default]
    Before,
    Block(Box<Block>),
    /// Directly behind a block or an echo, with the white space there.
    Behind(String),
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
    MARKERS.iter().all(|text| token(text).is_some())
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
        for (index, read) in calls.iter().enumerate() {
            send_call(&mut self.sent, index, &read.call.name, &read.streamed, out);
        }
        let calls = calls.into_iter().map(|read| read.call).collect();
        out.push(AssistantDelta::ToolBlock(ToolBlock::Calls(calls)));
        State::Behind(String::new())
    }
}

/// Sends the part of `arguments` that is new.
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
    /// Takes a part of `text`; true when what is left of it can be understood without more text.
    fn step<'a>(&mut self, text: &'a str, out: &mut Vec<AssistantDelta>) -> (&'a str, bool) {
        let markers: &[&str] = match self.state {
            State::Before => &[START],
            State::Block(_) | State::Echo(_) => &[END],
            State::After => &[START, END],
            State::Behind(_) | State::Plain => &[],
        };
        let (certain, marker, behind) = match marker::find(text, markers) {
            Hit::Marker { which, at } => (&text[..at], Some(markers[which]), &text[at + markers[which].len()..]),
            Hit::Partial { at } => (&text[..at], None, &text[at..]),
            Hit::Nothing => (text, None, ""),
        };
        let (mut rest, mut go_on) = (behind, marker.is_some());
        self.state = match std::mem::take(&mut self.state) {
            State::Before => {
                send_content(certain, out);
                if marker.is_some() {
                    State::Block(Box::default())
                } else {
                    State::Before
                }
            }
            State::Block(mut block) => {
                block.push(certain);
                block.progress(out);
                if marker.is_some() {
                    block.end(true, out)
                } else {
                    State::Block(block)
                }
            }
            State::Behind(mut blank) => {
                rest = text.trim_start();
                blank.push_str(&text[..text.len() - rest.len()]);
                let is_beginning = |marker: &str| rest.len() < marker.len() && marker.starts_with(rest);
                go_on = !is_beginning(START) && !is_beginning(END);
                if !go_on {
                    State::Behind(blank)
                } else if rest.starts_with('[') || rest.starts_with(START) {
                    State::Echo(blank)
                } else {
                    send_content(blank, out);
                    State::After
                }
            }
            State::After => {
                send_content(certain, out);
                match marker {
                    Some(START) => State::Echo(START.to_owned()),
                    Some(_) => State::Behind(String::new()),
                    None => State::After,
                }
            }
            State::Echo(mut held) => match marker {
                Some(_) => State::Behind(String::new()),
                None => {
                    held.push_str(certain);
                    State::Echo(held)
                }
            },
            State::Plain => {
                send_content(text, out);
                State::Plain
            }
        };
        (rest, go_on && !rest.is_empty())
    }
}

impl ToolParser for Lfm2 {
    fn push(&mut self, text: &str, out: &mut Vec<AssistantDelta>) {
        let text = std::mem::take(&mut self.pending) + text;
        let (mut rest, mut go_on) = (text.as_str(), !text.is_empty());
        while go_on {
            (rest, go_on) = self.step(rest, out);
        }
        self.pending = rest.to_owned();
    }

    fn finish(&mut self, out: &mut Vec<AssistantDelta>) {
        let rest = std::mem::take(&mut self.pending);
        match std::mem::take(&mut self.state) {
            State::Block(mut block) => {
                block.push(&rest);
                block.progress(out);
                self.state = block.end(false, out);
            }
            State::Echo(held) | State::Behind(held) => send_content(held + &rest, out),
            _ => send_content(rest, out),
        }
    }

    fn start_marker(&self) -> Option<&'static str> {
        Some(START)
    }
}
