//! Rules of `/v1/messages`; what they leave open is checked as for a chat.

use super::types::{ContentBlock, Message, MessagesRequest, PromptFields, Thinking, Tool, ToolChoice};
use crate::server::error::ApiError;
use crate::server::field::TextOrList;

const MAX_STOP_SEQUENCES: usize = 4;
const MIN_BUDGET_TOKENS: i64 = 1024;

/// # Errors
/// 400 that names the field.
pub fn check(request: &MessagesRequest) -> Result<(), ApiError> {
    check_prompt(&request.prompt)?;
    let Some(max_tokens) = request.max_tokens else {
        return Err(ApiError::missing("max_tokens"));
    };
    if max_tokens < 1 {
        return Err(at(
            "value_error",
            &["max_tokens"],
            "Value error, max_tokens must be positive",
        ));
    }
    if request
        .stop_sequences
        .as_ref()
        .is_some_and(|stop| stop.len() > MAX_STOP_SEQUENCES)
    {
        let message = format!("List should have at most {MAX_STOP_SEQUENCES} items after validation");
        return Err(at("too_long", &["stop_sequences"], &message));
    }
    let budget = request
        .prompt
        .thinking
        .as_ref()
        .and_then(|thinking| thinking.budget_tokens);
    if budget.is_some_and(|budget| budget >= max_tokens) {
        let message = "Value error, thinking.budget_tokens must be less than max_tokens";
        return Err(at("value_error", &["thinking", "budget_tokens"], message));
    }
    Ok(())
}

/// # Errors
/// 400 that names the field.
pub fn check_prompt(prompt: &PromptFields) -> Result<(), ApiError> {
    match prompt.model.as_deref() {
        None => return Err(ApiError::missing("model")),
        Some("") => return Err(at("value_error", &["model"], "Value error, Model is required")),
        Some(_) => {}
    }
    let Some(messages) = &prompt.messages else {
        return Err(ApiError::missing("messages"));
    };
    for (index, message) in messages.iter().enumerate() {
        check_message(message, &["messages", &index.to_string()])?;
    }
    if let Some(TextOrList::List(blocks)) = &prompt.system {
        check_system(blocks, &["system"])?;
    }
    for (index, tool) in prompt.tools.iter().flatten().enumerate() {
        check_tool(tool, &["tools", &index.to_string()])?;
    }
    if let Some(choice) = &prompt.tool_choice {
        check_tool_choice(choice, prompt.tools.as_ref().is_some_and(|tools| !tools.is_empty()))?;
    }
    if let Some(thinking) = &prompt.thinking {
        check_thinking(thinking)?;
    }
    let format = prompt.output_config.as_ref().and_then(|config| config.format.as_ref());
    match format {
        Some(format) if format.schema.is_none() => Err(missing(&["output_config", "format"], "schema")),
        _ => Ok(()),
    }
}

fn check_message(message: &Message, place: &[&str]) -> Result<(), ApiError> {
    let Some(role) = &message.role else {
        return Err(missing(place, "role"));
    };
    let blocks = match &message.content {
        None => return Err(missing(place, "content")),
        Some(TextOrList::Text(_)) => return Ok(()),
        Some(TextOrList::List(blocks)) => blocks,
    };
    let place = [place, &["content"]].concat();
    if role.0 == "system" {
        return check_system(blocks, &place);
    }
    blocks
        .iter()
        .enumerate()
        .try_for_each(|(index, block)| check_block(block, &[&place[..], &[&index.to_string()]].concat()))
}

/// A system prompt is made of text.
fn check_system(blocks: &[ContentBlock], place: &[&str]) -> Result<(), ApiError> {
    blocks.iter().enumerate().try_for_each(|(index, block)| {
        let index = index.to_string();
        let place = [place, &[&index]].concat();
        check_block(block, &place)?;
        match block.r#type.as_ref().map(|kind| kind.0.as_str()) {
            Some("text") => Ok(()),
            _ => Err(ApiError::invalid(
                &[&place[..], &["type"]].concat().join("."),
                "a system prompt is made of text blocks",
            )),
        }
    })
}

fn check_block(block: &ContentBlock, place: &[&str]) -> Result<(), ApiError> {
    let Some(kind) = &block.r#type else {
        return Err(missing(place, "type"));
    };
    let required = match kind.0.as_str() {
        "text" => ("text", block.text.is_some()),
        "tool_use" => ("name", block.name.is_some()),
        "tool_result" => ("tool_use_id", block.tool_use_id.is_some()),
        "thinking" => ("thinking", block.thinking.is_some()),
        "redacted_thinking" => return Ok(()),
        "image" => {
            return Err(ApiError::invalid(
                &place.join("."),
                "the served model is not a multimodal model, so it cannot read a block of type image",
            ));
        }
        other => {
            return Err(ApiError::invalid(
                &place.join("."),
                format!("blocks of type {other} are not supported: all tools are named in `tools`"),
            ));
        }
    };
    match required {
        (_, true) => Ok(()),
        (field, false) => Err(missing(place, field)),
    }
}

fn check_tool(tool: &Tool, place: &[&str]) -> Result<(), ApiError> {
    if let Some(kind) = tool.r#type.as_deref().filter(|kind| *kind != "custom") {
        return Err(ApiError::invalid(
            &place.join("."),
            format!(
                "tools of type {} run at Anthropic; only tools of the client's own can be used here",
                crate::server::error::shortened(kind)
            ),
        ));
    }
    if tool.name.is_none() {
        return Err(missing(place, "name"));
    }
    if tool.input_schema.is_none() {
        return Err(missing(place, "input_schema"));
    }
    if tool.defer_loading == Some(true) {
        let param = format!("{}.defer_loading", place.join("."));
        return Err(ApiError::unsupported(&param));
    }
    Ok(())
}

fn check_tool_choice(choice: &ToolChoice, has_tools: bool) -> Result<(), ApiError> {
    let Some(kind) = &choice.r#type else {
        return Err(missing(&["tool_choice"], "type"));
    };
    match kind.0.as_str() {
        "tool" if choice.name.is_none() => Err(missing(&["tool_choice"], "name")),
        kind @ ("any" | "tool") if !has_tools => Err(ApiError::invalid(
            "tool_choice",
            format!("a `tool_choice` of type {kind} needs `tools`"),
        )),
        _ => Ok(()),
    }
}

fn check_thinking(thinking: &Thinking) -> Result<(), ApiError> {
    let Some(kind) = &thinking.r#type else {
        return Err(missing(&["thinking"], "type"));
    };
    if kind.0 != "enabled" {
        return Ok(());
    }
    match thinking.budget_tokens {
        None => Err(missing(&["thinking"], "budget_tokens")),
        Some(budget) if budget < MIN_BUDGET_TOKENS => Err(at(
            "greater_than_equal",
            &["thinking", "budget_tokens"],
            &format!("Input should be greater than or equal to {MIN_BUDGET_TOKENS}"),
        )),
        Some(_) => Ok(()),
    }
}

fn at(code: &str, place: &[&str], message: &str) -> ApiError {
    let place: Vec<String> = place.iter().map(|part| (*part).to_owned()).collect();
    ApiError::validation(code, &place, message)
}

fn missing(place: &[&str], field: &str) -> ApiError {
    at("missing", &[place, &[field]].concat(), "Field required")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::body::parse;

    fn failure(body: &str) -> Option<String> {
        let request = match parse::<MessagesRequest>(body.as_bytes()) {
            Ok(request) => check(&request).err()?,
            Err(error) => error,
        };
        assert_eq!(request.status, 400, "{body}");
        request.param
    }

    /// A request with `extra` fields; a later `messages` replaces the first.
    fn with(extra: &str) -> Option<String> {
        failure(&format!(
            r#"{{"model":"m","max_tokens":2000,"messages":[{{"role":"user","content":"q"}}]{extra}}}"#
        ))
    }

    fn with_block(block: &str) -> Option<String> {
        with(&format!(r#","messages":[{{"role":"user","content":["q",{block}]}}]"#).replace("\"q\",", ""))
    }

    #[test]
    fn broken_rules_name_the_field() {
        for (body, param) in [
            (r#"{"max_tokens":1,"messages":[]}"#, "body.model"),
            (r#"{"model":"","max_tokens":1,"messages":[]}"#, "body.model"),
            (r#"{"model":"m","max_tokens":1}"#, "body.messages"),
            (r#"{"model":"m","messages":[]}"#, "body.max_tokens"),
        ] {
            assert_eq!(failure(body).as_deref(), Some(param), "{body}");
        }
        for (extra, param) in [
            (r#","max_tokens":0"#, "body.max_tokens"),
            (r#","stop_sequences":["a","b","c","d","e"]"#, "body.stop_sequences"),
            (r#","stop_sequences":"a""#, "body.stop_sequences"),
            (r#","messages":[{"content":"q"}]"#, "body.messages.0.role"),
            (r#","messages":[{"role":"tool","content":"q"}]"#, "body.messages.0.role"),
            (r#","messages":[{"role":"user"}]"#, "body.messages.0.content"),
            (
                r#","messages":[{"role":"user","content":7}]"#,
                "body.messages.0.content",
            ),
            (
                r#","messages":[{"role":"user","content":[7]}]"#,
                "body.messages.0.content.0",
            ),
            (r#","messages":7"#, "body.messages"),
            (r#","system":[{"type":"thinking","thinking":"x"}]"#, "system.0.type"),
            (r#","system":[{"text":"x"}]"#, "body.system.0.type"),
            (r#","tools":[{"input_schema":{}}]"#, "body.tools.0.name"),
            (r#","tools":[{"name":"f"}]"#, "body.tools.0.input_schema"),
            (
                r#","tools":[{"name":"f","input_schema":[]}]"#,
                "body.tools.0.input_schema",
            ),
            (
                r#","tools":[{"name":"web_search","type":"web_search_20250305"}]"#,
                "tools.0",
            ),
            (
                r#","tools":[{"name":"f","input_schema":{},"defer_loading":true}]"#,
                "tools.0.defer_loading",
            ),
            (r#","tool_choice":{}"#, "body.tool_choice.type"),
            (r#","tool_choice":"auto""#, "body.tool_choice"),
            (r#","tool_choice":{"type":"any"}"#, "tool_choice"),
            (r#","tool_choice":{"type":"tool"}"#, "body.tool_choice.name"),
            (r#","thinking":{"budget_tokens":1024}"#, "body.thinking.type"),
            (r#","thinking":{"type":"enabled"}"#, "body.thinking.budget_tokens"),
            (
                r#","thinking":{"type":"enabled","budget_tokens":1023}"#,
                "body.thinking.budget_tokens",
            ),
            (
                r#","thinking":{"type":"enabled","budget_tokens":2000}"#,
                "body.thinking.budget_tokens",
            ),
            (
                r#","thinking":{"type":"adaptive","display":"full"}"#,
                "body.thinking.display",
            ),
            (r#","output_config":{"effort":"none"}"#, "body.output_config.effort"),
            (
                r#","output_config":{"format":{"type":"json_schema"}}"#,
                "body.output_config.format.schema",
            ),
        ] {
            assert_eq!(with(extra).as_deref(), Some(param), "{extra}");
        }
        for (block, param) in [
            (r#"{"text":"x"}"#, "body.messages.0.content.0.type"),
            (r#"{"type":"video"}"#, "body.messages.0.content.0.type"),
            (r#"{"type":"text"}"#, "body.messages.0.content.0.text"),
            (r#"{"type":"tool_use"}"#, "body.messages.0.content.0.name"),
            (
                r#"{"type":"tool_use","name":"f","input":[]}"#,
                "body.messages.0.content.0.input",
            ),
            (r#"{"type":"tool_result"}"#, "body.messages.0.content.0.tool_use_id"),
            (
                r#"{"type":"tool_result","tool_use_id":"1","content":7}"#,
                "body.messages.0.content.0.content",
            ),
            (r#"{"type":"thinking"}"#, "body.messages.0.content.0.thinking"),
            (r#"{"type":"image","source":{}}"#, "messages.0.content.0"),
            (r#"{"type":"tool_addition"}"#, "messages.0.content.0"),
        ] {
            assert_eq!(with_block(block).as_deref(), Some(param), "{block}");
        }
    }

    #[test]
    fn ordinary_requests_pass() {
        for extra in [
            "",
            r#","system":[{"type":"text","text":"x","cache_control":{"type":"ephemeral"}}],"metadata":{"user_id":"u"},"tools":[]"#,
            r#","thinking":{"type":"enabled","budget_tokens":1999,"display":"omitted"},"output_config":{"effort":"xhigh"}"#,
            r#","output_config":{"format":{"type":"json_schema","schema":{}}}"#,
            r#","tools":[{"type":"custom","name":"f","input_schema":{}}],"tool_choice":{"type":"none"},"wibble":[1]"#,
        ] {
            assert_eq!(with(extra), None, "{extra}");
        }
        assert_eq!(with_block(r#"{"type":"redacted_thinking","data":"x"}"#), None);
    }
}
