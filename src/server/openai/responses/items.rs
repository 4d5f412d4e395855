//! Items become the messages of a chat.

use serde_json::{Value, json};

use super::output::OutputItem;
use super::types::InputItem;
use crate::server::body::parse_value;
use crate::server::error::{ApiError, shortened};
use crate::server::field::TextOrList;
use crate::server::openai::chat_completions::messages::set_reasoning;

/// A conversation as a chat request has it.
#[derive(Debug, Default, PartialEq)]
pub struct Conversation {
    pub messages: Vec<Value>,
    /// The last item is an assistant's message that is not whole: the answer goes on with it.
    pub continues: bool,
}

impl Conversation {
    /// Appends `input`: a user's text, or items.
    ///
    /// # Errors
    /// 400 that names the item and its field.
    pub fn push_input(&mut self, input: TextOrList<Value>) -> Result<(), ApiError> {
        match input {
            TextOrList::Text(text) => self.messages.push(json!({"role": "user", "content": text})),
            TextOrList::List(items) => {
                for (index, item) in items.into_iter().enumerate() {
                    self.push(item, &["input".to_owned(), index.to_string()])?;
                }
            }
        }
        Ok(())
    }

    /// Appends what a response answered.
    ///
    /// # Errors
    /// None for items of this server.
    pub fn push_output(&mut self, output: Vec<OutputItem>) -> Result<(), ApiError> {
        for (index, item) in output.into_iter().enumerate() {
            let item = serde_json::to_value(item).unwrap_or_default();
            self.push(item, &["previous_response_id".to_owned(), index.to_string()])?;
        }
        self.continues = false;
        Ok(())
    }

    /// Appends one item; reasoning, text and calls of one turn are one message.
    fn push(&mut self, item: Value, place: &[String]) -> Result<(), ApiError> {
        if !item.is_object() {
            return Err(ApiError::validation(
                "dict_type",
                place,
                "Input should be a valid dictionary",
            ));
        }
        let item: InputItem = parse_value(item, place)?;
        self.continues = false;
        match item.r#type.as_deref() {
            None | Some("message") => self.push_message(item, place)?,
            Some("reasoning") => self.push_reasoning(item, place)?,
            Some("function_call") => self.push_call(item, place)?,
            Some("function_call_output") => self.push_result(item, place)?,
            Some(other) => {
                return Err(ApiError::invalid(
                    &format!("{}.type", place.join(".")),
                    format!("items of type {} are not supported", shortened(other)),
                ));
            }
        }
        Ok(())
    }

    fn push_message(&mut self, item: InputItem, place: &[String]) -> Result<(), ApiError> {
        let role = item.role.ok_or_else(|| missing(place, "role"))?.0;
        let content = value(item.content, place, "content")?;
        if role == "assistant" {
            self.continues = item.status.is_some_and(|status| status.0 != "completed");
            let message = self.turn(|message| message.get("content").is_none() && message.get("tool_calls").is_none());
            message["content"] = content;
        } else {
            self.messages.push(json!({"role": role, "content": content}));
        }
        Ok(())
    }

    fn push_reasoning(&mut self, item: InputItem, place: &[String]) -> Result<(), ApiError> {
        if item.encrypted_content.is_some_and(|content| !content.is_empty()) {
            return Err(ApiError::invalid(
                &format!("{}.encrypted_content", place.join(".")),
                "Encrypted content is not supported.",
            ));
        }
        let texts = |parts: &[Value]| -> String { parts.iter().filter_map(|part| part["text"].as_str()).collect() };
        let content = match &item.content {
            Some(TextOrList::Text(text)) => text.clone(),
            Some(TextOrList::List(parts)) => texts(parts),
            None => String::new(),
        };
        let reasoning = match item.summary {
            Some(summary) if content.is_empty() => {
                texts(&summary.into_iter().map(Value::Object).collect::<Vec<Value>>())
            }
            _ => content,
        };
        // Reasoning is the first thing in a turn.
        set_reasoning(self.turn(|_| false), reasoning);
        Ok(())
    }

    fn push_call(&mut self, item: InputItem, place: &[String]) -> Result<(), ApiError> {
        if item.namespace.is_some() {
            return Err(ApiError::unsupported(&format!("{}.namespace", place.join("."))));
        }
        let call = json!({
            "id": item.call_id.ok_or_else(|| missing(place, "call_id"))?,
            "type": "function",
            "function": {
                "name": item.name.ok_or_else(|| missing(place, "name"))?,
                "arguments": item.arguments.ok_or_else(|| missing(place, "arguments"))?,
            },
        });
        let message = self.turn(|_| true);
        match message.get_mut("tool_calls").and_then(Value::as_array_mut) {
            Some(calls) => calls.push(call),
            None => message["tool_calls"] = json!([call]),
        }
        Ok(())
    }

    fn push_result(&mut self, item: InputItem, place: &[String]) -> Result<(), ApiError> {
        self.messages.push(json!({
            "role": "tool",
            "tool_call_id": item.call_id.ok_or_else(|| missing(place, "call_id"))?,
            "content": value(item.output, place, "output")?,
        }));
        Ok(())
    }

    /// The assistant's message that an item belongs to: the last one if it `joins`, else a new one.
    fn turn(&mut self, joins: impl Fn(&Value) -> bool) -> &mut Value {
        let belongs = self
            .messages
            .last()
            .is_some_and(|last| last["role"] == "assistant" && joins(last));
        if !belongs {
            self.messages.push(json!({"role": "assistant"}));
        }
        let last = self.messages.len() - 1;
        &mut self.messages[last]
    }
}

/// The text or the parts of `field`; what each part says is the chat layer's to read.
fn value(content: Option<TextOrList<Value>>, place: &[String], field: &str) -> Result<Value, ApiError> {
    let parts = match content {
        None => return Err(missing(place, field)),
        Some(TextOrList::Text(text)) => return Ok(text.into()),
        Some(TextOrList::List(parts)) => parts,
    };
    match parts.iter().position(|part| !part.is_object()) {
        None => Ok(parts.into()),
        Some(index) => Err(ApiError::validation(
            "dict_type",
            &[place, &[field.to_owned(), index.to_string()]].concat(),
            "Input should be a valid dictionary",
        )),
    }
}

fn missing(place: &[String], field: &str) -> ApiError {
    ApiError::validation("missing", &[place, &[field.to_owned()]].concat(), "Field required")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation(items: Value) -> Result<Conversation, String> {
        let mut conversation = Conversation::default();
        let items = items.as_array().unwrap().clone();
        match conversation.push_input(TextOrList::List(items)) {
            Ok(()) => Ok(conversation),
            Err(error) => Err(error.param.unwrap()),
        }
    }

    #[test]
    fn items_of_a_turn_are_one_message() {
        let items = json!([
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "q"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}],
                "encrypted_content": null},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{\"a\": 1}"},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "1"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
            {"role": "assistant", "content": "Done."},
            {"role": "assistant", "content": "Really."},
        ]);
        assert_eq!(
            conversation(items).unwrap(),
            Conversation {
                continues: false,
                messages: vec![
                    json!({"role": "developer", "content": "Be brief."}),
                    json!({"role": "user", "content": [{"type": "input_text", "text": "q"}]}),
                    json!({"role": "assistant", "thinking": "hm", "reasoning": "hm",
                        "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
                        "tool_calls": [
                            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}},
                            {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]}),
                    json!({"role": "tool", "tool_call_id": "c1", "content": "1"}),
                    json!({"role": "tool", "tool_call_id": "c2", "content": [{"type": "input_text", "text": "2"}]}),
                    json!({"role": "assistant", "thinking": "so", "reasoning": "so", "content": "Done."}),
                    json!({"role": "assistant", "content": "Really."}),
                ],
            }
        );
    }

    #[test]
    fn an_unfinished_message_goes_on() {
        let part = |status: &str| json!([{"role": "assistant", "content": "One, tw", "status": status}]);
        assert!(conversation(part("incomplete")).unwrap().continues);
        assert!(!conversation(part("completed")).unwrap().continues);
    }

    #[test]
    fn malformed_items_name_their_place() {
        for (item, param) in [
            (json!(7), "body.input.0"),
            (json!({"content": "x"}), "body.input.0.role"),
            (json!({"role": "tool", "content": "x"}), "body.input.0.role"),
            (json!({"role": "user"}), "body.input.0.content"),
            (json!({"role": "user", "content": 7}), "body.input.0.content"),
            (json!({"role": "user", "content": ["x"]}), "body.input.0.content.0"),
            (
                json!({"type": "function_call", "name": "f", "arguments": "{}"}),
                "body.input.0.call_id",
            ),
            (
                json!({"type": "function_call", "call_id": "c", "arguments": "{}"}),
                "body.input.0.name",
            ),
            (
                json!({"type": "function_call", "call_id": "c", "name": "f"}),
                "body.input.0.arguments",
            ),
            (
                json!({"type": "function_call_output", "output": "x"}),
                "body.input.0.call_id",
            ),
            (
                json!({"type": "function_call_output", "call_id": "c"}),
                "body.input.0.output",
            ),
            (
                json!({"type": "reasoning", "summary": [], "encrypted_content": "x"}),
                "input.0.encrypted_content",
            ),
            (json!({"type": "item_reference", "id": "msg_1"}), "input.0.type"),
        ] {
            assert_eq!(conversation(json!([item])), Err(param.to_owned()));
        }
    }
}
