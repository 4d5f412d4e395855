//! A Messages request becomes a chat request: the same conversation in OpenAI's words.

use serde_json::{Map, Value, json};

use super::types::{ContentBlock, Message, MessagesRequest, OutputConfig, PromptFields, Thinking, Tool, ToolChoice};
use crate::server::field::{Choice, StringOrList, TextOrList};
use crate::server::openai::chat_completions::messages::set_reasoning;
use crate::server::openai::chat_completions::types::ChatCompletionRequest;
use crate::server::openai::types::SamplingFields;

/// What Claude Code puts before its system prompt; it differs from request to request, so it would spoil the prefix
/// cache. Dropped, as in vLLM.
const BILLING_HEADER: &str = "x-anthropic-billing-header";

/// The request has passed `validate`. `disabled_effort` is what turning thinking off means to the served model.
pub fn convert(request: MessagesRequest, disabled_effort: &str) -> ChatCompletionRequest {
    let chat = convert_prompt(request.prompt, disabled_effort);
    ChatCompletionRequest {
        sampling: SamplingFields {
            max_tokens: request.max_tokens,
            stop: request.stop_sequences.map(StringOrList),
            temperature: request.temperature,
            top_k: request.top_k,
            top_p: request.top_p,
            cache_salt: request.cache_salt,
            watermarking: request.watermarking,
            stream: request.stream,
            ..chat.sampling
        },
        ..chat
    }
}

/// As [`convert`], without what happens after the prompt.
pub fn convert_prompt(prompt: PromptFields, disabled_effort: &str) -> ChatCompletionRequest {
    let tools: Vec<Value> = prompt.tools.unwrap_or_default().into_iter().map(tool).collect();
    let has_tools = !tools.is_empty();
    let choice = prompt.tool_choice.filter(|_| has_tools);
    let output = prompt.output_config.unwrap_or_default();
    ChatCompletionRequest {
        model: prompt.model,
        messages: Some(messages(prompt.system, prompt.messages.unwrap_or_default())),
        tools: has_tools.then_some(tools),
        parallel_tool_calls: choice
            .as_ref()
            .and_then(|choice| choice.disable_parallel_tool_use)
            .map(|disabled| !disabled),
        tool_choice: choice.and_then(tool_choice),
        reasoning_effort: effort(&output, prompt.thinking.as_ref(), disabled_effort).and_then(Choice::known),
        chat_template_kwargs: prompt.chat_template_kwargs,
        sampling: SamplingFields {
            response_format: response_format(output),
            ..SamplingFields::default()
        },
        ..ChatCompletionRequest::default()
    }
}

/// Switching thinking off beats the effort that is asked for beside it.
fn effort<'a>(output: &'a OutputConfig, thinking: Option<&Thinking>, disabled_effort: &'a str) -> Option<&'a str> {
    let kind = thinking.and_then(|thinking| thinking.r#type.as_ref());
    match kind {
        Some(kind) if kind.0 == "disabled" => Some(disabled_effort),
        _ => output.effort.as_ref().map(|effort| effort.0.as_str()),
    }
}

fn response_format(output: OutputConfig) -> Option<Map<String, Value>> {
    let schema = output.format?.schema?;
    let format = json!({"type": "json_schema", "json_schema": {"name": "output", "schema": schema}});
    match format {
        Value::Object(format) => Some(format),
        _ => None,
    }
}

fn tool(tool: Tool) -> Value {
    let mut parameters = tool.input_schema.unwrap_or_default();
    if !parameters.contains_key("type") {
        parameters.insert("type".to_owned(), "object".into());
    }
    let mut function = json!({"name": tool.name, "description": tool.description, "parameters": parameters});
    if let Some(strict) = tool.strict {
        function["strict"] = strict.into();
    }
    json!({"type": "function", "function": function})
}

fn tool_choice(choice: ToolChoice) -> Option<Value> {
    Some(match choice.r#type?.0.as_str() {
        "any" => "required".into(),
        "tool" => json!({"type": "function", "function": {"name": choice.name}}),
        other => other.into(),
    })
}

/// The system prompt comes first; system messages at the start of the conversation join it, later ones keep their place.
fn messages(system: Option<TextOrList<ContentBlock>>, messages: Vec<Message>) -> Vec<Value> {
    let mut lead: Vec<String> = system.map(system_text).into_iter().flatten().collect();
    let mut out = Vec::new();
    for message in messages {
        let role = message.role.map(|role| role.0).unwrap_or_default();
        match message.content {
            None => {}
            Some(content) if role == "system" => {
                let Some(text) = system_text(content) else { continue };
                if out.is_empty() {
                    lead.push(text);
                } else {
                    out.push(json!({"role": "system", "content": text}));
                }
            }
            Some(TextOrList::Text(text)) => out.push(json!({"role": role, "content": text})),
            Some(TextOrList::List(blocks)) => push_blocks(&role, blocks, &mut out),
        }
    }
    if !lead.is_empty() {
        out.insert(0, json!({"role": "system", "content": lead.join("\n\n")}));
    }
    out
}

/// None: there is no text but the billing header.
fn system_text(content: TextOrList<ContentBlock>) -> Option<String> {
    let texts = match content {
        TextOrList::Text(text) => vec![text],
        TextOrList::List(blocks) => blocks.into_iter().filter_map(|block| block.text).collect(),
    };
    let text: String = texts
        .into_iter()
        .filter(|text| !text.starts_with(BILLING_HEADER))
        .collect();
    (!text.is_empty()).then_some(text)
}

/// A message of blocks: results of tools are messages of their own, before the rest of the message they came in.
fn push_blocks(role: &str, blocks: Vec<ContentBlock>, out: &mut Vec<Value>) {
    let (mut parts, mut calls, mut reasoning) = (Vec::new(), Vec::new(), None::<String>);
    let text_part = |text: String| json!({"type": "text", "text": text});
    for block in blocks {
        let kind = block.r#type.map(|kind| kind.0).unwrap_or_default();
        match kind.as_str() {
            "text" => parts.extend(block.text.filter(|text| !text.is_empty()).map(text_part)),
            "thinking" => reasoning
                .get_or_insert_default()
                .push_str(block.thinking.as_deref().unwrap_or_default()),
            "tool_use" => calls.push(json!({
                "id": block.id.unwrap_or_default(),
                "type": "function",
                "function": {"name": block.name, "arguments": block.input.unwrap_or_default()},
            })),
            "tool_result" if role == "user" => out.push(json!({
                "role": "tool",
                "tool_call_id": block.tool_use_id,
                "content": result_content(block.content),
            })),
            "tool_result" => {
                let text = match result_content(block.content) {
                    Value::String(text) => text,
                    parts => parts.to_string(),
                };
                parts.push(text_part(format!("Tool result: {text}")));
            }
            // Redacted thinking is encrypted for Anthropic's own servers.
            _ => {}
        }
    }
    if parts.is_empty() && calls.is_empty() && reasoning.is_none() {
        return;
    }
    let mut message = json!({"role": role});
    if let Some(reasoning) = reasoning {
        set_reasoning(&mut message, reasoning);
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    if !parts.is_empty() {
        message["content"] = parts.into();
    }
    out.push(message);
}

fn result_content(content: Option<TextOrList<Map<String, Value>>>) -> Value {
    match content {
        None => "".into(),
        Some(TextOrList::Text(text)) => text.into(),
        Some(TextOrList::List(parts)) => parts.into_iter().map(Value::Object).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::body::parse;

    fn chat(extra: &str) -> ChatCompletionRequest {
        let body = format!(r#"{{"model":"m","max_tokens":9,"messages":[{{"role":"user","content":"q"}}]{extra}}}"#);
        convert(parse(body.as_bytes()).unwrap(), "low")
    }

    fn messages_of(extra: &str) -> Value {
        chat(extra).messages.unwrap().into()
    }

    #[test]
    fn system_prompts_are_joined_and_lose_the_billing_header() {
        let system = r#","system":[{"type":"text","text":"x-anthropic-billing-header: cc_version=1;"},{"type":"text","text":"Be"},{"type":"text","text":" brief."}]"#;
        assert_eq!(
            messages_of(system),
            json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}])
        );
        let inline = r#","system":"Top.","messages":[{"role":"system","content":"Lead."},{"role":"user","content":"q"},{"role":"system","content":[{"type":"text","text":"Late."}]}]"#;
        assert_eq!(
            messages_of(inline),
            json!([
                {"role": "system", "content": "Top.\n\nLead."},
                {"role": "user", "content": "q"},
                {"role": "system", "content": "Late."},
            ])
        );
    }

    #[test]
    fn blocks_become_parts_calls_reasoning_and_tool_messages() {
        let turns = r#","messages":[
            {"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":""},{"type":"text","text":"b"}]},
            {"role":"assistant","content":[{"type":"thinking","thinking":"I ","signature":"s"},{"type":"thinking","thinking":"see"},
                {"type":"redacted_thinking","data":"x"},{"type":"tool_use","id":"t1","name":"f","input":{"p":1}}]},
            {"role":"user","content":[{"type":"tool_result","tool_use_id":"t1","content":[{"type":"text","text":"ok"}]},
                {"type":"tool_result","tool_use_id":"t2"},{"type":"text","text":"next"}]},
            {"role":"user","content":[]}]"#;
        assert_eq!(
            messages_of(turns),
            json!([
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "thinking": "I see", "reasoning": "I see", "tool_calls": [
                    {"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"p": 1}}}]},
                {"role": "tool", "tool_call_id": "t1", "content": [{"type": "text", "text": "ok"}]},
                {"role": "tool", "tool_call_id": "t2", "content": ""},
                {"role": "user", "content": [{"type": "text", "text": "next"}]},
            ])
        );
    }

    #[test]
    fn tools_and_choices_are_openais() {
        let tools = r#","tools":[{"name":"f","input_schema":{"properties":{}}}]"#;
        let with = |choice: &str| chat(&format!(r#"{tools},"tool_choice":{choice}"#));
        assert_eq!(
            chat(tools).tools.unwrap(),
            [
                json!({"type": "function", "function": {"name": "f", "description": null,
                "parameters": {"properties": {}, "type": "object"}}})
            ]
        );
        for (choice, expected) in [
            (r#"{"type":"auto"}"#, json!("auto")),
            (r#"{"type":"none"}"#, json!("none")),
            (r#"{"type":"any"}"#, json!("required")),
            (
                r#"{"type":"tool","name":"f"}"#,
                json!({"type": "function", "function": {"name": "f"}}),
            ),
        ] {
            assert_eq!(with(choice).tool_choice, Some(expected));
        }
        let single = with(r#"{"type":"auto","disable_parallel_tool_use":true}"#);
        assert_eq!(single.parallel_tool_calls, Some(false));
        // Claude Code sends an empty list, and some clients a choice without tools.
        let none = chat(r#","tools":[],"tool_choice":{"type":"auto"}"#);
        assert_eq!((none.tools, none.tool_choice), (None, None));
    }

    #[test]
    fn an_output_format_is_a_response_format() {
        let format = r#","output_config":{"format":{"type":"json_schema","schema":{"type":"object"}}}"#;
        assert_eq!(
            Value::from(chat(format).sampling.response_format.unwrap()),
            json!({"type": "json_schema", "json_schema": {"name": "output", "schema": {"type": "object"}}})
        );
    }

    #[test]
    fn thinking_and_effort_are_one_effort() {
        let effort = |extra: &str| chat(extra).reasoning_effort.map(|effort| effort.0);
        assert_eq!(effort(""), None);
        assert_eq!(effort(r#","output_config":{"effort":"max"}"#).as_deref(), Some("max"));
        assert_eq!(
            effort(r#","output_config":{"effort":"max"},"thinking":{"type":"disabled"}"#).as_deref(),
            Some("low")
        );
        assert_eq!(
            effort(r#","output_config":{"effort":"high"},"thinking":{"type":"adaptive"}"#).as_deref(),
            Some("high")
        );
    }
}
