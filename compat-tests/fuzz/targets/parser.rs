//! The assistant's parsers: any text, cut anywhere, adds up to the same turn as the text in one piece.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rvllm::parsers::reasoning::Prompt;
use rvllm::parsers::{AssistantDelta, AssistantParser, Parsers, ToolBlock, Turn};

/// A vocabulary with the tools' markers as tokens, and the reasoning's as text.
fn token(text: &str) -> Option<u32> {
    ["<|tool_call_start|>", "<|tool_call_end|>"]
        .iter()
        .position(|marker| *marker == text)
        .map(|at| at as u32)
}

/// What a stream shows, kind by kind.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    content: String,
    reasoning: String,
    calls: Vec<(String, String)>,
    block: Option<ToolBlock>,
}

impl Seen {
    fn add(&mut self, deltas: Vec<AssistantDelta>) {
        for delta in deltas {
            match delta {
                AssistantDelta::Content(text) => self.content += &text,
                AssistantDelta::Reasoning(text) => self.reasoning += &text,
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

fn parser(parsers: &Parsers, think: bool) -> AssistantParser {
    let turn = Turn {
        prompt: Prompt { enable_thinking: think, ..Prompt::default() },
        parse_tools: true,
        forced: None,
        parallel_tool_calls: true,
    };
    parsers.assistant(&turn, &token)
}

fuzz_target!(|data: &[u8]| {
    let [options, cuts, text @ ..] = data else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let reasoning = if options & 1 != 0 { "qwen3" } else { "none" };
    let parsers = Parsers::resolve(Some(reasoning), Some("lfm2"), "", &token).expect("known parsers");
    let think = options & 2 == 0;

    let mut whole = Seen::default();
    let mut one = parser(&parsers, think);
    whole.add(one.push(text, &[]));
    whole.add(one.finish());

    let mut pieces = Seen::default();
    let mut many = parser(&parsers, think);
    let step = usize::from(*cuts) % 9 + 1;
    let mut rest = text;
    while !rest.is_empty() {
        let mut at = step.min(rest.len());
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
                for (_, arguments) in &seen.calls {
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
    assert_eq!(whole, pieces);
});
