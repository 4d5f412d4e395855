//! The assistant's parsers: any text, cut anywhere, adds up to the same turn as the text in one piece.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rvllm::parsers::reasoning::Prompt;
use rvllm::parsers::{AssistantDelta, ForcedCalls, Parsers, ToolBlock, Turn};

/// A vocabulary with the tools' markers as tokens, and the reasoning's as text.
fn token(text: &str) -> Option<u32> {
    ["<|tool_call_start|>", "<|tool_call_end|>"]
        .iter()
        .position(|marker| *marker == text)
        .map(|at| at as u32)
}

/// What a stream shows, kind by kind.
#[derive(Default)]
struct Seen {
    content: String,
    reasoning: String,
    /// Both, as they come.
    text: String,
    calls: Vec<(String, String)>,
    block: Option<ToolBlock>,
}

impl Seen {
    fn add(&mut self, deltas: Vec<AssistantDelta>) {
        for delta in deltas {
            match delta {
                AssistantDelta::Content(text) => {
                    self.content += &text;
                    self.text += &text;
                }
                AssistantDelta::Reasoning(text) => {
                    self.reasoning += &text;
                    self.text += &text;
                }
                AssistantDelta::ToolCallStart { index, name } => {
                    assert_eq!(index, self.calls.len(), "calls are numbered in order");
                    self.calls.push((name, String::new()));
                }
                AssistantDelta::ToolCallArguments { index, arguments } => self.calls[index].1 += &arguments,
                AssistantDelta::ToolBlock(block) => {
                    assert!(self.block.is_none(), "only the first block counts");
                    self.block = Some(block);
                }
            }
        }
    }
}

/// The text that no parser may lose: what is left without blanks and without the reasoning's markers.
fn essence(text: &str) -> String {
    let mut left = String::new();
    for c in text.chars().filter(|c| !c.is_whitespace()) {
        left.push(c);
        for marker in ["<think>", "</think>"] {
            if left.ends_with(marker) {
                left.truncate(left.len() - marker.len());
            }
        }
    }
    left
}

/// Where to cut: pieces of one length, or of lengths that a generator started from `cuts` gives.
fn lengths(cuts: u8) -> impl FnMut() -> usize {
    let mut state = u32::from(cuts) | 1;
    move || match cuts {
        0..128 => usize::from(cuts) % 9 + 1,
        _ => {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as usize % 32 + 1
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let [options, cuts, text @ ..] = data else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let on = |bit: u8| options & 1 << bit != 0;
    let reasoning = match (on(0), on(7)) {
        (false, _) => "none",
        (true, false) => "qwen3",
        (true, true) => "lfm2",
    };
    let parsers = Parsers::resolve(Some(reasoning), Some("lfm2"), "", &token).expect("known parsers");
    let turn = Turn {
        prompt: Prompt { enable_thinking: !on(1), text: if on(2) { "<think>" } else { "" }, ..Prompt::default() },
        parse_tools: !on(3),
        forced: match (on(4), on(5)) {
            (true, true) => Some(ForcedCalls::Any),
            (true, false) => Some(ForcedCalls::Named("f")),
            _ => None,
        },
        parallel_tool_calls: !on(6),
    };
    let parser = || parsers.assistant(&turn, &token);

    let mut whole = Seen::default();
    let mut one = parser();
    whole.add(one.push(text, &[]));
    whole.add(one.finish());

    let mut pieces = Seen::default();
    let mut many = parser();
    let mut length = lengths(*cuts);
    let mut rest = text;
    while !rest.is_empty() {
        let mut at = length().min(rest.len());
        while !rest.is_char_boundary(at) {
            at += 1;
        }
        pieces.add(many.push(&rest[..at], &[]));
        rest = &rest[at..];
    }
    pieces.add(many.finish());
    for seen in [&mut whole, &mut pieces] {
        match seen.block.take() {
            Some(ToolBlock::Calls(calls)) => {
                // Forced calls are JSON by their grammar, which this text has not passed.
                for (_, arguments) in seen.calls.iter().filter(|_| turn.forced.is_none()) {
                    // Its grammar alone: a number may be too large for Rust's.
                    serde_json::from_str::<serde::de::IgnoredAny>(arguments).expect("a call's arguments are JSON");
                    assert!(arguments.starts_with('{'));
                }
                assert_eq!(calls.len(), seen.calls.len());
                seen.block = Some(ToolBlock::Calls(calls));
            }
            // How far a stream got into a call that is none depends on the cut, and so whether it calls it cut; the text does not.
            Some(ToolBlock::Invalid(raw) | ToolBlock::Cut(raw)) => {
                seen.calls.clear();
                seen.block = Some(ToolBlock::Invalid(raw));
            }
            None => {}
        }
    }
    assert_eq!((&whole.content, &whole.reasoning, &whole.calls, &whole.block), (&pieces.content, &pieces.reasoning, &pieces.calls, &pieces.block));
    // Without a block of calls every character is somewhere, in order.
    if turn.forced.is_none() && whole.block.is_none() {
        for seen in [&whole, &pieces] {
            assert_eq!(essence(&seen.text), essence(text));
        }
    }
});
