//! `vllm:tool_call_parser_invocations_total`, counted beside the events as they pass.

use std::sync::Arc;

use futures_util::StreamExt;

use crate::chat::{ChatEvent, ChatStream, Parsing};
use crate::metrics::{Metrics, RequestType};
use crate::parsers::{AssistantDelta, ToolBlock};

/// The same events. As vLLM counts: a stream's deltas one by one, a whole answer's choices once.
pub fn counted(events: ChatStream, metrics: Arc<Metrics>, streaming: bool, request_type: RequestType) -> ChatStream {
    // By choice: a call was found.
    let mut found: Vec<bool> = Vec::new();
    let counted = events.inspect(move |event| {
        let Ok(event) = event else { return };
        if event.parsing != Parsing::Tools {
            return;
        }
        let index = event.index as usize;
        if found.len() <= index {
            found.resize(index + 1, false);
        }
        let has_call = has_call(event);
        found[index] |= has_call;
        if streaming {
            metrics.frontend.observe_tool_parser(true, has_call, request_type);
        } else if event.finish.is_some() {
            metrics.frontend.observe_tool_parser(false, found[index], request_type);
        }
    });
    counted.boxed()
}

fn has_call(event: &ChatEvent) -> bool {
    event.parts.iter().any(|part| match part {
        AssistantDelta::ToolCallStart { .. } | AssistantDelta::ToolCallArguments { .. } => true,
        AssistantDelta::ToolBlock(ToolBlock::Calls(calls)) => !calls.is_empty(),
        AssistantDelta::ToolBlock(_) | AssistantDelta::Content(_) | AssistantDelta::Reasoning(_) => false,
    })
}
