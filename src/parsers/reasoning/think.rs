//! `<think>…</think>`, then content: `qwen3` and `lfm2`.
//!
//! `qwen3`: the turn starts inside reasoning, with or without the opening marker, so an answer without any thinking is all
//! reasoning. `lfm2`: the turn is reasoning only where the prompt or the model opens it, so a plain answer is content; it
//! is what a checkpoint gets without a flag.
//!
//! # Source
//! vLLM 0.33's `qwen3`, as recorded in `compat-tests/goldens/parser-cases.json`. Differs from vLLM: a later `</think>` in
//! content is dropped in streams too, as vLLM does in whole answers. vLLM has no `lfm2` here.

use super::{Beginning, Prompt, ReasoningParser, Segment};
use crate::parsers::TokenLookup;
use crate::parsers::marker::{self, Hit};

const START: &str = "<think>";
const END: &str = "</think>";
/// Qwen's tool call: ends reasoning and stays in content.
const TOOL_CALL: &str = "<tool_call>";
pub(super) const REASONING_MARKERS: [&str; 2] = [START, END];
const TURN_MARKERS: [&str; 2] = ["<|im_start|>", "<|im_end|>"];

struct Think {
    state: State,
    /// The first is the one that opens.
    markers: Vec<Marker>,
    /// Text that may be the beginning of a marker.
    held: String,
    /// White space before anything else, while undecided.
    blank: String,
    counting: bool,
    reasoning_tokens: usize,
}

const START_AT: usize = 0;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space so far; a `<think>` opens reasoning, anything else is content.
    Undecided,
    Reasoning,
    Content,
    /// Thinking is off: everything is content, markers included.
    Off,
}

/// A marker that is one token counts only when that token was sampled: the same text spelled by others is text.
struct Marker {
    text: String,
    role: Role,
    id: Option<u32>,
    /// Sampled, but not yet seen in the text.
    outstanding: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Open,
    Close,
    /// Closes and stays in content.
    ToolCall,
    /// Closes; where there was no reasoning, it comes before content.
    Grammar,
}

pub(super) fn new_qwen3(prompt: &Prompt<'_>, token: TokenLookup<'_>) -> Box<dyn ReasoningParser> {
    Box::new(Think::new(prompt, token, State::Reasoning))
}

pub(super) fn new_lfm2(prompt: &Prompt<'_>, token: TokenLookup<'_>) -> Box<dyn ReasoningParser> {
    Box::new(Think::new(prompt, token, State::Undecided))
}

pub(super) fn detect(chat_template: &str, token: TokenLookup<'_>) -> bool {
    let in_vocabulary = token(START).is_some() && token(END).is_some();
    in_vocabulary
        && ["<think", "</think", "enable_thinking"]
            .iter()
            .any(|sign| chat_template.contains(sign))
}

/// Walks back from the prompt's end to the first marker: an end of reasoning means that the turn starts in content, an
/// opening that it starts in reasoning, the border of a turn nothing.
fn state_after(prompt: &Prompt<'_>, token: TokenLookup<'_>) -> Option<State> {
    if let (Some(start), Some(end)) = (token(START), token(END)) {
        let tool_call = token(TOOL_CALL);
        let borders = TURN_MARKERS.map(token);
        return prompt.token_ids.iter().rev().find_map(|&id| match id {
            id if id == end || Some(id) == tool_call => Some(Some(State::Content)),
            id if id == start => Some(Some(State::Reasoning)),
            id => borders.contains(&Some(id)).then_some(None),
        })?;
    }
    let [first_border, second_border] = TURN_MARKERS;
    let last = |markers: &[&str]| markers.iter().filter_map(|marker| prompt.text.rfind(marker)).max();
    let ends = [
        (last(&[first_border, second_border]), None),
        (last(&[START]), Some(State::Reasoning)),
        (last(&[END, TOOL_CALL]), Some(State::Content)),
    ];
    let (at, state) = ends.into_iter().max_by_key(|(at, _)| *at)?;
    at.and(state)
}

impl Think {
    fn new(prompt: &Prompt<'_>, token: TokenLookup<'_>, default: State) -> Self {
        let state = match prompt.enable_thinking {
            false => State::Off,
            true => state_after(prompt, token).unwrap_or(default),
        };
        let marker = |text: &str, role, id| Marker {
            text: text.to_owned(),
            role,
            id,
            outstanding: 0,
        };
        let own = [(START, Role::Open), (END, Role::Close), (TOOL_CALL, Role::ToolCall)];
        let also_end = prompt.also_end.iter();
        Think {
            state,
            markers: own
                .map(|(text, role)| marker(text, role, token(text)))
                .into_iter()
                .chain(also_end.map(|end| marker(&end.text, Role::Grammar, Some(end.id))))
                .collect(),
            held: String::new(),
            blank: String::new(),
            counting: state == State::Reasoning,
            reasoning_tokens: 0,
        }
    }

    /// Decides on the first text that is not white space; `None` when more is needed. Returns what is left of the text.
    fn decide<'a>(&mut self, text: &'a str, out: &mut Vec<Segment>) -> Option<&'a str> {
        let rest = text.trim_start();
        self.blank.push_str(&text[..text.len() - rest.len()]);
        let may_open = self.is_active(START_AT) && START.starts_with(&rest[..rest.floor_char_boundary(START.len())]);
        if may_open && rest.len() < START.len() || rest.is_empty() {
            self.held = rest.to_owned();
            return None;
        }
        if may_open {
            self.state = State::Reasoning;
        } else {
            self.end_undecided(out);
        }
        Some(rest)
    }

    fn end_undecided(&mut self, out: &mut Vec<Segment>) {
        self.state = State::Content;
        let blank = std::mem::take(&mut self.blank);
        self.send(&blank, out);
    }

    fn scan(&mut self, text: &str, out: &mut Vec<Segment>) {
        let text = std::mem::take(&mut self.held) + text;
        let mut rest = text.as_str();
        if self.state == State::Undecided {
            match self.decide(rest, out) {
                Some(left) => rest = left,
                None => return,
            }
        }
        loop {
            let active: Vec<usize> = (0..self.markers.len()).filter(|&which| self.is_active(which)).collect();
            let names: Vec<&str> = active.iter().map(|&which| self.markers[which].text.as_str()).collect();
            match marker::find(rest, &names) {
                Hit::Marker { which, at } => {
                    let which = active[which];
                    self.send(&rest[..at], out);
                    let marker = &mut self.markers[which];
                    marker.outstanding = marker.outstanding.saturating_sub(1);
                    rest = &rest[at + marker.text.len()..];
                    match marker.role {
                        Role::Open => {}
                        Role::Close | Role::Grammar => self.state = State::Content,
                        Role::ToolCall => {
                            self.state = State::Content;
                            self.send(TOOL_CALL, out);
                        }
                    }
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
        let Marker {
            role, id, outstanding, ..
        } = &self.markers[which];
        let by_state = match self.state {
            State::Undecided => *role == Role::Open,
            State::Reasoning => true,
            State::Content => matches!(role, Role::Close | Role::Grammar),
            State::Off => false,
        };
        by_state && (id.is_none() || *outstanding > 0)
    }

    fn send(&self, text: &str, out: &mut Vec<Segment>) {
        if !text.is_empty() {
            out.push(match self.state {
                State::Reasoning => Segment::Reasoning(text.to_owned()),
                State::Undecided | State::Content | State::Off => Segment::Content(text.to_owned()),
            });
        }
    }
}

impl ReasoningParser for Think {
    fn beginning(&self) -> Beginning {
        match self.state {
            State::Undecided => Beginning::Undecided,
            State::Reasoning => Beginning::Reasoning,
            State::Content | State::Off => Beginning::Content,
        }
    }

    fn push(&mut self, text: &str, token_ids: &[u32], out: &mut Vec<Segment>) {
        for &id in token_ids {
            let which = self.markers.iter().position(|marker| marker.id == Some(id));
            match which {
                Some(which) => {
                    self.markers[which].outstanding += 1;
                    self.counting = match self.markers[which].role {
                        Role::Open => self.counting || self.state == State::Undecided,
                        Role::Close | Role::ToolCall | Role::Grammar => false,
                    };
                }
                None => self.reasoning_tokens += usize::from(self.counting),
            }
        }
        self.scan(text, out);
        match self.state {
            State::Content | State::Off => self.counting = false,
            // Opened by text: there was no token to start counting at.
            State::Reasoning if self.markers[START_AT].id.is_none() => self.counting = true,
            State::Reasoning | State::Undecided => {}
        }
    }

    fn finish(&mut self, out: &mut Vec<Segment>) {
        if self.state == State::Undecided {
            self.end_undecided(out);
        }
        let held = std::mem::take(&mut self.held);
        self.send(&held, out);
    }

    fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }
}
