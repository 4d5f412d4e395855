//! The shapes of messages, checked with their place in the body, and tools as the chat template sees them.
//!
//! What messages mean (parts, null content, arguments) is the chat layer's.

use serde_json::{Map, Value, json};

use crate::server::error::ApiError;

/// # Errors
/// 400 with the place of the first value of a wrong type.
pub fn check_messages(messages: &[Value]) -> Result<(), ApiError> {
    messages.iter().enumerate().try_for_each(|(index, message)| {
        let place = Place::new("messages", index);
        let Value::Object(message) = message else {
            return Err(place.not_an_object(&[]));
        };
        match message.get("role") {
            Some(Value::String(_)) => {}
            None => return Err(place.missing(&["role"])),
            Some(_) => return Err(place.not_a_string(&["role"])),
        }
        check_content(message.get("content"), &place)?;
        check_tool_calls(message.get("tool_calls"), &place)?;
        ["reasoning", "reasoning_content", "name", "tool_call_id"]
            .into_iter()
            .try_for_each(|key| match message.get(key) {
                None | Some(Value::Null | Value::String(_)) => Ok(()),
                Some(_) => Err(place.not_a_string(&[key])),
            })
    })
}

fn check_content(content: Option<&Value>, place: &Place) -> Result<(), ApiError> {
    let parts = match content {
        None | Some(Value::Null | Value::String(_)) => return Ok(()),
        Some(Value::Array(parts)) => parts,
        Some(_) => return Err(place.not_a_string(&["content"])),
    };
    match parts.iter().position(|part| !(part.is_string() || part.is_object())) {
        None => Ok(()),
        Some(index) => Err(place.not_an_object(&["content", &index.to_string()])),
    }
}

fn check_tool_calls(calls: Option<&Value>, place: &Place) -> Result<(), ApiError> {
    let calls = match calls {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(calls)) => calls,
        Some(_) => {
            return Err(place.error(&["tool_calls"], "list_type", "Input should be a valid list"));
        }
    };
    calls.iter().enumerate().try_for_each(|(index, call)| {
        let index = index.to_string();
        let at = |rest: &[&'static str]| -> Vec<&str> {
            ["tool_calls", index.as_str()]
                .into_iter()
                .chain(rest.iter().copied())
                .collect()
        };
        if !call.is_object() {
            return Err(place.not_an_object(&at(&[])));
        }
        let Some(function) = call.get("function").and_then(Value::as_object) else {
            return Err(place.missing(&at(&["function"])));
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(place.not_a_string(&at(&["function", "name"])));
        }
        match function.get("arguments") {
            None | Some(Value::Null | Value::String(_) | Value::Object(_)) => Ok(()),
            Some(_) => Err(place.not_a_string(&at(&["function", "arguments"]))),
        }
    })
}

/// Sets what an assistant's message was thought before: LFM2 templates read it as `thinking`, others as `reasoning`.
pub fn set_reasoning(message: &mut Value, reasoning: String) {
    message["thinking"] = reasoning.clone().into();
    message["reasoning"] = reasoning.into();
}

/// The text of a message's content, for `echo`.
pub fn content_text(message: &Value) -> String {
    match &message["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts: Vec<&str> = parts
                .iter()
                .filter_map(|part| part.as_str().or_else(|| part["text"].as_str()))
                .collect();
            texts.join("\n")
        }
        _ => String::new(),
    }
}

/// An element of a list in the body.
struct Place {
    list: &'static str,
    index: String,
}

impl Place {
    fn new(list: &'static str, index: usize) -> Self {
        Self {
            list,
            index: index.to_string(),
        }
    }

    fn error(&self, rest: &[&str], code: &str, message: &str) -> ApiError {
        let path: Vec<String> = [self.list, &self.index]
            .into_iter()
            .chain(rest.iter().copied())
            .map(str::to_owned)
            .collect();
        ApiError::validation(code, &path, message)
    }

    fn missing(&self, rest: &[&str]) -> ApiError {
        self.error(rest, "missing", "Field required")
    }

    fn not_a_string(&self, rest: &[&str]) -> ApiError {
        self.error(rest, "string_type", "Input should be a valid string")
    }

    fn not_an_object(&self, rest: &[&str]) -> ApiError {
        self.error(rest, "dict_type", "Input should be a valid dictionary")
    }
}

/// Tools with the keys of vLLM's model, in its order; absent descriptions and parameters are null.
///
/// # Errors
/// 400 with the place of the first malformed tool.
pub fn convert_tools(tools: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    tools
        .into_iter()
        .enumerate()
        .map(|(index, tool)| convert_tool(index, tool))
        .collect()
}

fn convert_tool(index: usize, tool: Value) -> Result<Value, ApiError> {
    let place = Place::new("tools", index);
    let Value::Object(mut tool) = tool else {
        return Err(place.not_an_object(&[]));
    };
    if tool.get("type").is_some_and(|kind| kind != "function") {
        return Err(place.error(&["type"], "literal_error", "Input should be 'function'"));
    }
    let mut function = match tool.shift_remove("function") {
        Some(Value::Object(function)) => function,
        None => return Err(place.missing(&["function"])),
        Some(_) => return Err(place.not_an_object(&["function"])),
    };
    let mut out = Map::new();
    match function.shift_remove("name") {
        Some(Value::String(name)) => out.insert("name".to_owned(), Value::String(name)),
        None => return Err(place.missing(&["function", "name"])),
        Some(_) => return Err(place.not_a_string(&["function", "name"])),
    };
    let description = function.shift_remove("description").unwrap_or(Value::Null);
    if !(description.is_string() || description.is_null()) {
        return Err(place.not_a_string(&["function", "description"]));
    }
    out.insert("description".to_owned(), description);
    let parameters = function.shift_remove("parameters").unwrap_or(Value::Null);
    if !(parameters.is_object() || parameters.is_null()) {
        return Err(place.not_an_object(&["function", "parameters"]));
    }
    out.insert("parameters".to_owned(), parameters);
    out.extend(function.into_iter().filter(|(_, value)| !value.is_null()));
    Ok(json!({"type": "function", "function": out}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_messages_name_their_place() {
        for (message, place) in [
            (json!("x"), "body.messages.0"),
            (json!({"content": "x"}), "body.messages.0.role"),
            (json!({"role": 1}), "body.messages.0.role"),
            (json!({"role": "user", "content": 1}), "body.messages.0.content"),
            (
                json!({"role": "user", "content": ["a", 7]}),
                "body.messages.0.content.1",
            ),
            (
                json!({"role": "assistant", "tool_calls": [{}]}),
                "body.messages.0.tool_calls.0.function",
            ),
            (
                json!({"role": "assistant", "tool_calls": {}}),
                "body.messages.0.tool_calls",
            ),
            (
                json!({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}),
                "body.messages.0.tool_calls.0.function.arguments",
            ),
            (
                json!({"role": "assistant", "reasoning": 1}),
                "body.messages.0.reasoning",
            ),
        ] {
            assert_eq!(check_messages(&[message]).unwrap_err().param.as_deref(), Some(place));
        }
        let fine = json!({"role": "any", "content": null, "tool_calls": null, "other": [1]});
        assert!(check_messages(&[fine]).is_ok());
    }

    #[test]
    fn the_text_of_parts_is_joined() {
        let message = json!({"content": [{"type": "text", "text": "a"}, "b", {"type": "image_url"}]});
        assert_eq!(content_text(&message), "a\nb");
    }

    #[test]
    fn tools_have_vllms_keys() {
        let tools = convert_tools(vec![
            json!({"function": {"parameters": {}, "name": "f", "strict": true}}),
        ])
        .unwrap();
        assert_eq!(
            serde_json::to_string(&tools).unwrap(),
            r#"[{"type":"function","function":{"name":"f","description":null,"parameters":{},"strict":true}}]"#
        );
        let error = convert_tools(vec![json!({"function": {"name": "f", "parameters": []}})]).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("body.tools.0.function.parameters"));
    }
}
