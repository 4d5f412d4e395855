//! `<think>…</think>`, then content. The turn starts inside reasoning, with or without the opening marker.
//!
//! # Source
//! vLLM 0.33's `qwen3`, as recorded in `compat-tests/goldens/parser-cases.json`. Differs from vLLM: a later `</think>` in
//! content is dropped in streams too, as vLLM does in whole answers.

use super::{Prompt, ReasoningParser, Segment};
use crate::parsers::TokenLookup;
use crate::parsers::marker::{self, Hit};

const START: &str = "<think>";
const END: &str = "</think>";
/// Qwen's tool call: ends reasoning and stays in content.
const TOOL_CALL: &str = "<tool_call>";
const TURN_MARKERS: [&str; 2] = ["<|im_start|>", "<|im_end|>"];

struct Qwen3 {
    state: State,
    /// In the order of [`MARKERS`].
    markers: [Marker; 3],
    /// Text that may be the beginning of a marker.
    held: String,
    counting: bool,
    reasoning_tokens: usize,
}

const MARKERS: [&str; 3] = [START, END, TOOL_CALL];

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Reasoning,
    Content,
    /// Thinking is off: everything is content, markers included.
    Off,
}

/// A marker that is one token counts only when that token was sampled: the same text spelled by others is text.
#[derive(Clone, Copy, Default)]
struct Marker {
    id: Option<u32>,
    /// Sampled, but not yet seen in the text.
    outstanding: usize,
}

pub(super) fn new(prompt: &Prompt<'_>, token: TokenLookup<'_>) -> Box<dyn ReasoningParser> {
    let state = match prompt.enable_thinking {
        false => State::Off,
        true if closes_reasoning(prompt, token) => State::Content,
        true => State::Reasoning,
    };
    Box::new(Qwen3 {
        state,
        markers: MARKERS.map(|text| Marker {
            id: token(text),
            outstanding: 0,
        }),
        held: String::new(),
        counting: state == State::Reasoning,
        reasoning_tokens: 0,
    })
}

pub(super) fn detect(chat_template: &str, token: TokenLookup<'_>) -> bool {
    let in_vocabulary = token(START).is_some() && token(END).is_some();
    in_vocabulary
        && ["<think", "</think", "enable_thinking"]
            .iter()
            .any(|sign| chat_template.contains(sign))
}

/// Walks back from the prompt's end to the first marker: an end of reasoning means that the turn starts in content, an
/// opening or the border of a turn that it does not.
fn closes_reasoning(prompt: &Prompt<'_>, token: TokenLookup<'_>) -> bool {
    if let (Some(start), Some(end)) = (token(START), token(END)) {
        let tool_call = token(TOOL_CALL);
        let borders = TURN_MARKERS.map(token);
        for &id in prompt.token_ids.iter().rev() {
            if id == end || Some(id) == tool_call {
                return true;
            }
            if id == start || borders.contains(&Some(id)) {
                return false;
            }
        }
        return false;
    }
    let last = |markers: &[&str]| markers.iter().filter_map(|marker| prompt.text.rfind(marker)).max();
    let [first_border, second_border] = TURN_MARKERS;
    last(&[END, TOOL_CALL]) > last(&[START, first_border, second_border])
}

impl Qwen3 {
    fn scan(&mut self, text: &str, out: &mut Vec<Segment>) {
        let text = std::mem::take(&mut self.held) + text;
        let mut rest = text.as_str();
        loop {
            let active: Vec<usize> = (0..MARKERS.len()).filter(|&which| self.is_active(which)).collect();
            let names: Vec<&str> = active.iter().map(|&which| MARKERS[which]).collect();
            match marker::find(rest, &names) {
                Hit::Marker { which, at } => {
                    let which = active[which];
                    self.send(&rest[..at], out);
                    self.markers[which].outstanding = self.markers[which].outstanding.saturating_sub(1);
                    if MARKERS[which] != START {
                        self.state = State::Content;
                    }
                    if MARKERS[which] == TOOL_CALL {
                        self.send(TOOL_CALL, out);
                    }
                    rest = &rest[at + MARKERS[which].len()..];
                }
                Hit::Partial { at } => {
                    self.send(&rest[..at], out);
                    self.held = rest[at..].to_owned();
                    return;
                }
                Hit::Nothing => return self.send(rest, out),
            }
        }
    }

    fn is_active(&self, which: usize) -> bool {
        let by_state = match self.state {
            State::Reasoning => true,
            State::Content => MARKERS[which] == END,
            State::Off => false,
        };
        by_state && (self.markers[which].id.is_none() || self.markers[which].outstanding > 0)
    }

    fn send(&self, text: &str, out: &mut Vec<Segment>) {
        if !text.is_empty() {
            out.push(match self.state {
                State::Reasoning => Segment::Reasoning(text.to_owned()),
                State::Content | State::Off => Segment::Content(text.to_owned()),
            });
        }
    }
}

impl ReasoningParser for Qwen3 {
    fn push(&mut self, text: &str, token_ids: &[u32], out: &mut Vec<Segment>) {
        for &id in token_ids {
            let which = self.markers.iter().position(|marker| marker.id == Some(id));
            match which {
                Some(which) => {
                    self.markers[which].outstanding += 1;
                    self.counting &= MARKERS[which] == START;
                }
                None => self.reasoning_tokens += usize::from(self.counting),
            }
        }
        self.scan(text, out);
        self.counting &= self.state == State::Reasoning;
    }

    fn finish(&mut self, out: &mut Vec<Segment>) {
        let held = std::mem::take(&mut self.held);
        self.send(&held, out);
    }

    fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }
}
