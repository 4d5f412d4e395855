//! `tools` and `tool_choice` as a chat request has them.

use serde_json::{Map, Value, json};

use super::types::{Tool, ToolChoiceObject};
use crate::server::body::parse_value;
use crate::server::error::{ApiError, shortened};

/// Tools and choice in OpenAI's chat form; none where there is nothing to choose.
#[derive(Debug, Default, PartialEq)]
pub struct Tools {
    pub tools: Option<Vec<Value>>,
    pub choice: Option<Value>,
}

/// # Errors
/// 400 that names the field.
pub fn convert_tools(tools: &[Map<String, Value>], choice: Option<&Value>) -> Result<Tools, ApiError> {
    let mut tools = tools
        .iter()
        .enumerate()
        .map(|(index, tool)| convert_tool(index, tool))
        .collect::<Result<Vec<Value>, ApiError>>()?;
    let choice = match choice {
        None => json!("auto"),
        Some(Value::String(word)) if matches!(word.as_str(), "auto" | "none" | "required") => json!(word),
        Some(Value::Object(object)) => convert_choice(object, &mut tools)?,
        Some(_) => {
            return Err(ApiError::validation(
                "literal_error",
                &["tool_choice".to_owned()],
                "Input should be 'none', 'auto', 'required' or an object",
            ));
        }
    };
    if !tools.is_empty() {
        return Ok(Tools {
            tools: Some(tools),
            choice: Some(choice),
        });
    }
    if choice == "auto" || choice == "none" {
        return Ok(Tools::default());
    }
    Err(ApiError::invalid(
        "tool_choice",
        "Tool choice 'required' must be specified with 'tools' parameter.",
    ))
}

fn convert_tool(index: usize, tool: &Map<String, Value>) -> Result<Value, ApiError> {
    let place = ["tools".to_owned(), index.to_string()];
    let tool: Tool = parse_value(Value::Object(tool.clone()), &place)?;
    let missing =
        |field: &str| ApiError::validation("missing", &[&place[..], &[field.to_owned()]].concat(), "Field required");
    match tool.r#type.as_deref() {
        Some("function") => {}
        None => return Err(missing("type")),
        Some(other) => {
            return Err(ApiError::invalid(
                &format!("tools.{index}.type"),
                format!(
                    "tools of type {} are not supported: only functions of the client's own are",
                    shortened(other)
                ),
            ));
        }
    }
    if tool.defer_loading == Some(true) {
        return Err(ApiError::unsupported(&format!("tools.{index}.defer_loading")));
    }
    let name = tool.name.ok_or_else(|| missing("name"))?;
    let mut function = json!({"name": name, "description": tool.description, "parameters": tool.parameters});
    if let Some(strict) = tool.strict {
        function["strict"] = strict.into();
    }
    Ok(json!({"type": "function", "function": function}))
}

fn convert_choice(object: &Map<String, Value>, tools: &mut Vec<Value>) -> Result<Value, ApiError> {
    let choice: ToolChoiceObject = parse_value(Value::Object(object.clone()), &["tool_choice".to_owned()])?;
    let missing =
        |field: &str| ApiError::validation("missing", &["tool_choice".into(), field.into()], "Field required");
    match choice.r#type.as_deref() {
        None => Err(missing("type")),
        Some("function") => {
            let name = choice.name.ok_or_else(|| missing("name"))?;
            Ok(json!({"type": "function", "function": {"name": name}}))
        }
        Some("allowed_tools") => {
            let mode = choice.mode.ok_or_else(|| missing("mode"))?;
            let allowed = choice.tools.ok_or_else(|| missing("tools"))?;
            let name = |tool: &Value| tool["function"]["name"].as_str().map(str::to_owned);
            for (index, tool) in allowed.iter().enumerate() {
                if !tools.iter().any(|known| name(known) == tool.name) {
                    return Err(ApiError::invalid(
                        &format!("tool_choice.tools.{index}"),
                        "an allowed tool is none of `tools`",
                    ));
                }
            }
            // What may not be called is not shown.
            tools.retain(|known| allowed.iter().any(|tool| name(known) == tool.name));
            Ok(json!(mode.0))
        }
        Some(other) => Err(ApiError::invalid(
            "tool_choice.type",
            format!("a tool_choice of type {} is not supported", shortened(other)),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert(tools: Value, choice: Value) -> Result<Tools, String> {
        let tools: Vec<Map<String, Value>> = serde_json::from_value(tools).unwrap();
        convert_tools(&tools, Some(&choice)).map_err(|error| error.param.unwrap())
    }

    fn two() -> Value {
        json!([{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": true},
            {"type": "function", "name": "g"}])
    }

    #[test]
    fn tools_and_choices_are_a_chats() {
        let all = convert(two(), json!("auto")).unwrap();
        assert_eq!(
            all.tools.unwrap(),
            [
                json!({"type": "function", "function": {"name": "f", "description": null,
                    "parameters": {"type": "object"}, "strict": true}}),
                json!({"type": "function", "function": {"name": "g", "description": null, "parameters": null}}),
            ]
        );
        let named = convert(two(), json!({"type": "function", "name": "g"})).unwrap();
        assert_eq!(
            named.choice.unwrap(),
            json!({"type": "function", "function": {"name": "g"}})
        );
        let allowed = json!({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]});
        let allowed = convert(two(), allowed).unwrap();
        assert_eq!(allowed.choice.unwrap(), "auto");
        assert_eq!(allowed.tools.unwrap()[0]["function"]["name"], "g");
        assert_eq!(convert(json!([]), json!("auto")), Ok(Tools::default()));
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        for (tools, choice, param) in [
            (json!([{"name": "f"}]), json!("auto"), "body.tools.0.type"),
            (json!([{"type": "function"}]), json!("auto"), "body.tools.0.name"),
            (json!([{"type": "web_search"}]), json!("auto"), "tools.0.type"),
            (json!([{"type": "custom", "name": "c"}]), json!("auto"), "tools.0.type"),
            (
                json!([{"type": "function", "name": "f", "parameters": 7}]),
                json!("auto"),
                "body.tools.0.parameters",
            ),
            (two(), json!("maybe"), "body.tool_choice"),
            (two(), json!({"type": "mcp"}), "tool_choice.type"),
            (two(), json!({"type": "function"}), "body.tool_choice.name"),
            (
                two(),
                json!({"type": "allowed_tools", "tools": []}),
                "body.tool_choice.mode",
            ),
            (
                two(),
                json!({"type": "allowed_tools", "mode": "auto", "tools": [{"name": "h"}]}),
                "tool_choice.tools.0",
            ),
            (json!([]), json!("required"), "tool_choice"),
            (json!([]), json!({"type": "function", "name": "f"}), "tool_choice"),
        ] {
            assert_eq!(convert(tools, choice.clone()), Err(param.to_owned()), "{choice}");
        }
    }
}
