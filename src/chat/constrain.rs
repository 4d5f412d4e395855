//! Which grammar a turn is under, and where in the turn it begins.

use serde_json::{Map, Value, json};

use super::ToolChoice;
use crate::grammar::{GrammarKind, GrammarOptions, GrammarSpec, Reasoning, Start};
use crate::parsers::reasoning::{Beginning, Prompt, SpecialToken};
use crate::parsers::{ForcedCalls, Parsers};
use crate::step::TokenId;
use crate::text::Tokenizer;

impl ToolChoice {
    /// The calls that this choice forces.
    pub(super) fn forced(&self) -> Option<ForcedCalls<'_>> {
        match self {
            ToolChoice::None | ToolChoice::Auto => None,
            ToolChoice::Required => Some(ForcedCalls::Any),
            ToolChoice::Named(name) => Some(ForcedCalls::Named(name)),
        }
    }
}

/// The grammar of the calls that `forced` asks for.
///
/// # Source
/// vLLM 0.33's schemas for `required` and named choices. Each function's parameters become a definition of their own, so that
/// references inside them still lead where they did.
pub(super) fn calls_grammar(
    forced: ForcedCalls<'_>,
    tools: &[Value],
    parallel: bool,
    options: GrammarOptions,
) -> GrammarSpec {
    let parameters = |tool: &Value| match &tool["function"]["parameters"] {
        Value::Object(schema) if !schema.is_empty() => Value::Object(schema.clone()),
        _ => json!({"type": "object", "properties": {}}),
    };
    let schema = match forced {
        ForcedCalls::Named(name) => tools
            .iter()
            .find(|tool| tool["function"]["name"] == name)
            .map_or_else(|| json!({"type": "object", "properties": {}}), parameters),
        ForcedCalls::Any => {
            let (mut calls, mut definitions) = (Vec::new(), Map::new());
            for (i, tool) in tools.iter().enumerate() {
                let definition = format!("tool{i}");
                calls.push(json!({
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "enum": [tool["function"]["name"]]},
                        "parameters": {"$ref": format!("#/$defs/{definition}")},
                    },
                    "required": ["name", "parameters"],
                }));
                let mut schema = parameters(tool);
                move_references(&mut schema, &format!("#/$defs/{definition}"));
                definitions.insert(definition, schema);
            }
            let mut schema = json!({
                "type": "array",
                "minItems": 1,
                "items": {"anyOf": calls},
                "$defs": definitions,
            });
            if !parallel {
                schema["maxItems"] = 1.into();
            }
            schema
        }
    };
    GrammarSpec {
        kind: GrammarKind::JsonSchema(schema),
        options,
    }
}

/// Points the references of a schema that has moved to `place` to where their targets are now. Its depth is bounded by the
/// request's JSON.
fn move_references(schema: &mut Value, place: &str) {
    match schema {
        Value::Array(list) => list.iter_mut().for_each(|part| move_references(part, place)),
        Value::Object(object) => {
            for (key, part) in object {
                match part {
                    Value::String(reference) if key == "$ref" && reference.starts_with('#') => {
                        reference.replace_range(..1, place);
                    }
                    part => move_references(part, place),
                }
            }
        }
        _ => {}
    }
}

/// Who makes the calls of a turn under a grammar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Calls {
    /// Nobody: there are none.
    None,
    /// The model, in place of the constrained output.
    Model,
    /// The grammar.
    Grammar,
}

/// Where the grammar of a turn begins: behind the reasoning, where there is some.
pub(super) fn start(parsers: Parsers, prompt: &Prompt<'_>, calls: Calls, tokenizer: &Tokenizer) -> Start {
    let lookup = |token: &str| tokenizer.token_to_id(token);
    let (Some(entry), beginning) = (parsers.reasoning, parsers.beginning(prompt, &lookup)) else {
        return Start::Now;
    };
    let [open, close] = entry.markers;
    let marker = |which: usize| parsers.tool.and_then(|tool| lookup(tool.markers[which]));
    let reasoning = Reasoning {
        close: tokenizer.encode(close, false).unwrap_or_default().into(),
        call: marker(0).filter(|_| calls == Calls::Grammar),
        call_end: marker(1).filter(|_| calls == Calls::Model),
    };
    match (beginning, lookup(open)) {
        (Beginning::Reasoning, _) => Start::AfterReasoning(reasoning),
        (Beginning::Undecided, Some(open)) => Start::MayReason { open, reasoning },
        (Beginning::Undecided, None) | (Beginning::Content, _) => Start::Now,
    }
}

/// The tokens that end reasoning because the grammar begins behind them, for who reads the text.
pub(super) fn also_end(start: &Start, eos: impl Iterator<Item = TokenId>, tokenizer: &Tokenizer) -> Vec<SpecialToken> {
    let reasoning = match start {
        Start::Now => return Vec::new(),
        Start::AfterReasoning(reasoning) | Start::MayReason { reasoning, .. } => reasoning,
    };
    let token = |id| SpecialToken {
        id,
        text: String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned(),
    };
    let tokens = eos.chain(reasoning.call).map(token);
    tokens.filter(|token| token.text.starts_with('<')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_of_a_tools_parameters_still_lead_into_them() {
        let tools = [json!({"type": "function", "function": {"name": "f", "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/a"}, "again": {"$ref": "#"}},
            "$defs": {"a": {"type": "integer"}}
        }}})];
        let GrammarKind::JsonSchema(schema) =
            calls_grammar(ForcedCalls::Any, &tools, false, GrammarOptions::default()).kind
        else {
            panic!("calls are JSON");
        };
        assert_eq!(schema["maxItems"], 1);
        let parameters = &schema["$defs"]["tool0"]["properties"];
        assert_eq!(parameters["a"]["$ref"], "#/$defs/tool0/$defs/a");
        assert_eq!(parameters["again"]["$ref"], "#/$defs/tool0");
        assert_eq!(schema.pointer("/$defs/tool0/$defs/a/type"), Some(&json!("integer")));
    }
}
