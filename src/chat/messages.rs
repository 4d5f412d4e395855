//! Messages as clients send them become messages as templates expect them, by vLLM's rules.

use serde_json::{Map, Value, json};

use super::template::ContentFormat;

/// The client sent a message that cannot be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct MessageError(pub String);

/// Makes each message what the template wants:
///
/// * `content`: text parts joined by newlines for string templates, a list of parts for the others; null is nothing;
///   a tool's text is always one string.
/// * `tool_calls[].function.arguments`: an object, `{}` where the JSON is invalid; no key for null or no calls.
/// * `reasoning` and its old name `reasoning_content`: both, when either is given.
///
/// Differs from vLLM: other keys (`thinking`, which LFM2 templates read) are kept.
///
/// # Errors
/// No messages, a message without role, an unknown part, or an image, audio or video part.
pub fn for_template(messages: Vec<Value>, format: ContentFormat) -> Result<Vec<Value>, MessageError> {
    if messages.is_empty() {
        return Err(MessageError("messages cannot be empty".into()));
    }
    messages
        .into_iter()
        .enumerate()
        .map(|(index, message)| {
            message_for_template(message, format).map_err(|reason| MessageError(format!("messages[{index}]: {reason}")))
        })
        .collect()
}

fn message_for_template(message: Value, format: ContentFormat) -> Result<Value, String> {
    let Value::Object(mut message) = message else {
        return Err("it is not an object".into());
    };
    let Some(role) = message.get("role").and_then(Value::as_str).map(str::to_owned) else {
        return Err("it has no role".into());
    };
    let texts = match message.shift_remove("content") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(parts)) => parts.into_iter().map(part_text).collect::<Result<_, _>>()?,
        Some(_) => return Err("its content is neither a string nor a list of parts".into()),
    };
    let content = match format {
        ContentFormat::Parts if role != "tool" => texts
            .into_iter()
            .map(|text| json!({"type": "text", "text": text}))
            .collect(),
        _ => Value::String(texts.join("\n")),
    };
    message.insert("content".into(), content);

    if role == "assistant" {
        prepare_tool_calls(&mut message)?;
        let reasoning = ["reasoning", "reasoning_content"]
            .iter()
            .find_map(|name| message.get(*name)?.as_str());
        if let Some(reasoning) = reasoning.map(str::to_owned) {
            message.insert("reasoning".into(), reasoning.clone().into());
            message.insert("reasoning_content".into(), reasoning.into());
        }
    }
    // Templates test keys with `is defined`: an explicit null would count.
    message.retain(|_, value| !value.is_null());
    Ok(Value::Object(message))
}

fn part_text(part: Value) -> Result<String, String> {
    let mut part = match part {
        Value::String(text) => return Ok(text),
        Value::Object(part) => part,
        _ => return Err("a content part is neither a string nor an object".into()),
    };
    let kind = match part.get("type") {
        Some(Value::String(kind)) => kind.clone(),
        _ => infer_kind(&part).ok_or("a content part has no type")?.to_owned(),
    };
    let field = match kind.as_str() {
        "text" | "input_text" | "output_text" => "text",
        "refusal" => "refusal",
        "thinking" => "thinking",
        "image" | "image_url" | "image_pil" | "image_embeds" | "input_image" | "audio_url" | "audio_embeds"
        | "input_audio" | "video_url" | "input_video" => {
            return Err(format!(
                "the served model is not a multimodal model, so it cannot read a part of type {kind}"
            ));
        }
        _ => return Err(format!("unknown part type: {kind}")),
    };
    match part.shift_remove(field) {
        Some(Value::String(text)) => Ok(text),
        _ => Err(format!("a part of type {kind} has no string {field}")),
    }
}

/// Parts without a type are told by their keys, as in vLLM.
fn infer_kind(part: &Map<String, Value>) -> Option<&'static str> {
    [
        "text",
        "image_url",
        "input_audio",
        "audio_url",
        "video_url",
        "image_embeds",
    ]
    .into_iter()
    .find(|kind| part.contains_key(*kind))
}

fn prepare_tool_calls(message: &mut Map<String, Value>) -> Result<(), String> {
    match message.get_mut("tool_calls") {
        None => return Ok(()),
        Some(Value::Array(calls)) if !calls.is_empty() => {
            for call in calls {
                let Some(Value::Object(function)) = call.get_mut("function") else {
                    return Err("a tool call has no function".into());
                };
                if !function.get("name").is_some_and(Value::is_string) {
                    return Err("a tool call's function has no name".into());
                }
                let arguments = match function.get_mut("arguments").map(Value::take) {
                    Some(Value::String(json)) => serde_json::from_str(&json).unwrap_or_default(),
                    Some(arguments) => arguments,
                    None => Value::Null,
                };
                // What is no object has no named arguments for a template to print.
                let arguments = if arguments.is_object() { arguments } else { json!({}) };
                function.insert("arguments".into(), arguments);
            }
            return Ok(());
        }
        Some(Value::Null | Value::Array(_)) => {}
        Some(_) => return Err("tool_calls is not a list".into()),
    }
    message.shift_remove("tool_calls");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(message: Value, format: ContentFormat) -> Result<Value, MessageError> {
        for_template(vec![message], format).map(|mut messages| messages.remove(0))
    }

    #[test]
    fn content_takes_the_templates_shape() {
        let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]});
        assert_eq!(one(parts.clone(), ContentFormat::String).unwrap()["content"], "a\nb\nc");
        let texts = ["a", "b", "c"].map(|text| json!({"type": "text", "text": text}));
        assert_eq!(one(parts, ContentFormat::Parts).unwrap()["content"], json!(texts));
        let text = json!({"role": "user", "content": "x"});
        assert_eq!(one(text.clone(), ContentFormat::String).unwrap(), text);
        assert_eq!(
            one(text, ContentFormat::Parts).unwrap()["content"],
            json!([{"type": "text", "text": "x"}])
        );
        for content in [json!({"role": "user"}), json!({"role": "user", "content": null})] {
            assert_eq!(one(content.clone(), ContentFormat::String).unwrap()["content"], "");
            assert_eq!(one(content, ContentFormat::Parts).unwrap()["content"], json!([]));
        }
        let tool = json!({"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "18C"}, {"type": "text", "text": "dry"}]});
        assert_eq!(one(tool, ContentFormat::Parts).unwrap()["content"], "18C\ndry");
    }

    #[test]
    fn arguments_become_objects() {
        let call = |arguments: Value| json!({"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]});
        for (arguments, expected) in [
            (json!("{\"a\": 1}"), json!({"a": 1})),
            (json!({"a": 1}), json!({"a": 1})),
            (json!("{\"a\":"), json!({})),
            (json!("[1]"), json!({})),
            (json!(""), json!({})),
            (json!(null), json!({})),
        ] {
            let message = one(call(arguments), ContentFormat::String).unwrap();
            assert_eq!(message["tool_calls"][0]["function"]["arguments"], expected);
        }
        for calls in [json!([]), json!(null)] {
            let message = json!({"role": "assistant", "content": "x", "tool_calls": calls});
            assert_eq!(
                one(message, ContentFormat::String).unwrap(),
                json!({"role": "assistant", "content": "x"})
            );
        }
    }

    #[test]
    fn reasoning_has_both_names() {
        for name in ["reasoning", "reasoning_content"] {
            let message = one(
                json!({"role": "assistant", "content": "x", name: "r"}),
                ContentFormat::String,
            )
            .unwrap();
            assert_eq!(
                (&message["reasoning"], &message["reasoning_content"]),
                (&json!("r"), &json!("r"))
            );
        }
        let none = json!({"role": "assistant", "content": "x", "reasoning": null});
        assert_eq!(
            one(none, ContentFormat::String).unwrap(),
            json!({"role": "assistant", "content": "x"})
        );
    }

    #[test]
    fn what_cannot_be_rendered_is_refused() {
        assert!(for_template(vec![], ContentFormat::String).is_err());
        let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]});
        assert!(
            one(image, ContentFormat::String)
                .unwrap_err()
                .0
                .contains("is not a multimodal model")
        );
        for message in [
            json!("hello"),
            json!({"content": "x"}),
            json!({"role": 1, "content": "x"}),
            json!({"role": "user", "content": 5}),
            json!({"role": "user", "content": [5]}),
            json!({"role": "user", "content": [{"type": "hologram"}]}),
            json!({"role": "user", "content": [{"type": "text"}]}),
            json!({"role": "assistant", "tool_calls": 5}),
            json!({"role": "assistant", "tool_calls": [5]}),
            json!({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}),
        ] {
            assert!(one(message.clone(), ContentFormat::String).is_err(), "{message}");
        }
    }
}
