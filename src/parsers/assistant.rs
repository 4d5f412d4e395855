//! One choice's text into reasoning, content and tool calls.

use super::AssistantDelta;
use super::marker::{self, Hit};
use super::reasoning::{Prompt, ReasoningParser, Segment};
use super::tool::{ToolBlock, ToolParser};

/// What the parser of one choice must know about its request.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a> {
    pub prompt: Prompt<'a>,
    /// The request has tools and its tool_choice is not `none`.
    pub parse_tools: bool,
    /// The output is under a grammar that makes it calls.
    pub forced: Option<ForcedCalls<'a>>,
    /// False: calls after the first are dropped.
    pub parallel_tool_calls: bool,
}

/// Calls that a grammar makes sure of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForcedCalls<'a> {
    /// Of any functions: an array of `{"name", "parameters"}`.
    Any,
    /// Of one function: its arguments.
    Named(&'a str),
}

/// Text that keeps its special tokens goes in, pieces of the turn come out. How the text is cut changes nothing in what
/// the pieces add up to.
///
/// A block of calls inside reasoning that is closed later belongs to the reasoning. Inside reasoning that is never
/// closed it is held until the end and then read: Differs from vLLM, which never finds that call.
pub struct AssistantParser {
    reasoning: Option<Box<dyn ReasoningParser>>,
    tools: Option<Box<dyn ToolParser>>,
    parallel_tool_calls: bool,
    /// Reasoning from a (possible) start of a block on.
    held: Held,
}

#[derive(Default)]
struct Held {
    text: String,
    /// The text begins with the whole start marker.
    in_block: bool,
}

impl AssistantParser {
    pub fn new(
        reasoning: Option<Box<dyn ReasoningParser>>,
        tools: Option<Box<dyn ToolParser>>,
        parallel_tool_calls: bool,
    ) -> Self {
        AssistantParser {
            reasoning,
            tools,
            parallel_tool_calls,
            held: Held::default(),
        }
    }

    /// True when a parser reads the text; false: all of it is content as it is.
    pub fn is_active(&self) -> bool {
        self.reasoning.is_some() || self.tools.is_some()
    }

    /// True when content is searched for tool calls.
    pub fn parses_tools(&self) -> bool {
        self.tools.is_some()
    }

    /// `token_ids`: sampled since the last call, the stopping token excluded. They may be ahead of the text, not behind.
    pub fn push(&mut self, text: &str, token_ids: &[u32]) -> Vec<AssistantDelta> {
        let mut segments = Vec::new();
        match &mut self.reasoning {
            Some(reasoning) => reasoning.push(text, token_ids, &mut segments),
            None if text.is_empty() => {}
            None => segments.push(Segment::Content(text.to_owned())),
        }
        let mut out = Vec::new();
        self.read(segments, &mut out);
        self.limit_calls(out)
    }

    /// The turn is over: what was held back.
    pub fn finish(&mut self) -> Vec<AssistantDelta> {
        let mut segments = Vec::new();
        if let Some(reasoning) = &mut self.reasoning {
            reasoning.finish(&mut segments);
        }
        let mut out = Vec::new();
        self.read(segments, &mut out);
        let held = std::mem::take(&mut self.held);
        if !held.text.is_empty() {
            self.read_unclosed(held.text, &mut out);
        } else if let Some(tools) = &mut self.tools {
            tools.finish(&mut out);
        }
        self.limit_calls(out)
    }

    /// Tokens in reasoning so far, markers excluded; 0 without a reasoning parser.
    pub fn reasoning_tokens(&self) -> usize {
        self.reasoning
            .as_ref()
            .map_or(0, |reasoning| reasoning.reasoning_tokens())
    }

    fn read(&mut self, segments: Vec<Segment>, out: &mut Vec<AssistantDelta>) {
        for segment in segments {
            match (segment, &mut self.tools) {
                (Segment::Reasoning(text), tools) => match tools.as_ref().and_then(|tools| tools.start_marker()) {
                    Some(marker) => self.hold(&text, marker, out),
                    None => out.push(AssistantDelta::Reasoning(text)),
                },
                (Segment::Content(text), tools) => {
                    let held = std::mem::take(&mut self.held);
                    if !held.text.is_empty() {
                        out.push(AssistantDelta::Reasoning(held.text));
                    }
                    match tools {
                        Some(tools) => tools.push(&text, out),
                        None => out.push(AssistantDelta::Content(text)),
                    }
                }
            }
        }
    }

    /// Passes reasoning on, up to where a block may begin.
    fn hold(&mut self, text: &str, start_marker: &str, out: &mut Vec<AssistantDelta>) {
        self.held.text.push_str(text);
        if self.held.in_block {
            return;
        }
        let at = match marker::find(&self.held.text, &[start_marker]) {
            Hit::Marker { at, .. } => {
                self.held.in_block = true;
                at
            }
            Hit::Partial { at } => at,
            Hit::Nothing => self.held.text.len(),
        };
        let rest = self.held.text.split_off(at);
        let certain = std::mem::replace(&mut self.held.text, rest);
        if !certain.is_empty() {
            out.push(AssistantDelta::Reasoning(certain));
        }
    }

    /// Reasoning ended without its end marker: calls in `held` count, the text around them stays reasoning.
    fn read_unclosed(&mut self, held: String, out: &mut Vec<AssistantDelta>) {
        let mut parts = Vec::new();
        if let Some(tools) = &mut self.tools {
            tools.push(&held, &mut parts);
            tools.finish(&mut parts);
        }
        if !parts
            .iter()
            .any(|part| matches!(part, AssistantDelta::ToolBlock(ToolBlock::Calls(_))))
        {
            out.push(AssistantDelta::Reasoning(held));
            return;
        }
        out.extend(parts.into_iter().map(|part| match part {
            AssistantDelta::Content(text) => AssistantDelta::Reasoning(text),
            part => part,
        }));
    }

    fn limit_calls(&self, mut parts: Vec<AssistantDelta>) -> Vec<AssistantDelta> {
        if !self.parallel_tool_calls {
            parts.retain_mut(|part| match part {
                AssistantDelta::ToolCallStart { index, .. } | AssistantDelta::ToolCallArguments { index, .. } => {
                    *index == 0
                }
                AssistantDelta::ToolBlock(ToolBlock::Calls(calls)) => {
                    calls.truncate(1);
                    true
                }
                _ => true,
            });
        }
        parts
    }
}

#[cfg(test)]
mod tests;
