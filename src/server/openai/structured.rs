//! `response_format` and `structured_outputs` as the grammar that they ask for.

use serde_json::{Map, Value};

use super::types::{SamplingFields, StructuredOutputs};
use crate::config::StructuredOutputsConfig;
use crate::grammar::{GrammarKind, GrammarOptions, GrammarSpec};
use crate::server::error::ApiError;

/// The grammar of a request, none if it asks for none. It has not been compiled yet.
///
/// As vLLM: a `response_format` of JSON replaces `json` and `json_object` of `structured_outputs`, and keeps its options.
///
/// # Errors
/// 400: an unknown format, no or several constraints.
pub fn grammar_spec(
    fields: &SamplingFields,
    defaults: &StructuredOutputsConfig,
) -> Result<Option<GrammarSpec>, ApiError> {
    let format = fields
        .response_format
        .as_ref()
        .map(response_format)
        .transpose()?
        .flatten();
    let asked = fields
        .structured_outputs
        .as_ref()
        .map(structured_outputs)
        .transpose()?
        .flatten();
    let kind = match (format, asked) {
        (Some(format), None | Some(GrammarKind::JsonSchema(_) | GrammarKind::JsonObject)) => format,
        (None, Some(asked)) => asked,
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => return Err(one_kind()),
    };
    let options = fields.structured_outputs.clone().unwrap_or_default();
    Ok(Some(GrammarSpec {
        kind,
        options: GrammarOptions {
            disable_any_whitespace: options.disable_any_whitespace.unwrap_or(false) || defaults.disable_any_whitespace,
            disable_additional_properties: options.disable_additional_properties.unwrap_or(false)
                || defaults.disable_additional_properties,
            whitespace_pattern: options.whitespace_pattern,
        },
    }))
}

fn response_format(format: &Map<String, Value>) -> Result<Option<GrammarKind>, ApiError> {
    const KINDS: &str = "Input should be 'text', 'json_object', 'json_schema' or 'structural_tag'";
    let at_type = |code, message: &str| ApiError::validation(code, &["response_format".into(), "type".into()], message);
    let kind = match format.get("type") {
        None => return Err(at_type("missing", "Field required")),
        Some(kind) => kind.as_str().unwrap_or_default(),
    };
    match kind {
        "text" => Ok(None),
        "json_object" => Ok(Some(GrammarKind::JsonObject)),
        "json_schema" => match format.get("json_schema") {
            Some(Value::Object(described)) => match described.get("schema") {
                None | Some(Value::Null) => Err(ApiError::validation(
                    "missing",
                    &["response_format".into(), "json_schema".into(), "schema".into()],
                    "Field required",
                )),
                Some(schema) => Ok(Some(GrammarKind::JsonSchema(schema.clone()))),
            },
            None | Some(Value::Null) => Err(ApiError::invalid(
                "response_format",
                "When response_format type is 'json_schema', the 'json_schema' field must be provided.",
            )),
            Some(_) => Err(ApiError::validation(
                "model_type",
                &["response_format".into(), "json_schema".into()],
                "Input should be a valid dictionary or instance of JsonSchemaResponseFormat",
            )),
        },
        "structural_tag" => Ok(Some(GrammarKind::StructuralTag(Value::Object(format.clone())))),
        _ => Err(at_type("literal_error", KINDS)),
    }
}

fn structured_outputs(asked: &StructuredOutputs) -> Result<Option<GrammarKind>, ApiError> {
    let kinds = [
        asked
            .json
            .as_ref()
            .map(|json| parsed(json, "json").map(GrammarKind::JsonSchema)),
        asked.regex.clone().map(|pattern| Ok(GrammarKind::Regex(pattern))),
        asked.choice.clone().map(|choices| Ok(GrammarKind::Choice(choices))),
        asked.grammar.clone().map(|text| Ok(GrammarKind::Grammar(text))),
        asked
            .structural_tag
            .as_ref()
            .map(|tag| parsed(tag, "structural_tag").map(GrammarKind::StructuralTag)),
    ];
    let json_object = asked
        .json_object
        .filter(|asked| *asked)
        .map(|_| Ok(GrammarKind::JsonObject));
    let mut kinds = kinds.into_iter().chain([json_object]).flatten();
    match (kinds.next(), kinds.next()) {
        (Some(kind), None) => kind.map(Some),
        (None, _) if asked.json_object == Some(false) => Ok(None),
        _ => Err(one_kind()),
    }
}

fn one_kind() -> ApiError {
    ApiError::bad_request(
        "You must use exactly one kind of structured outputs constraint: json, regex, choice, grammar, json_object or \
         structural_tag",
    )
}

/// JSON, or the text of it.
fn parsed(value: &Value, name: &str) -> Result<Value, ApiError> {
    match value {
        Value::String(text) => serde_json::from_str(text)
            .map_err(|error| ApiError::bad_request(format!("structured_outputs.{name} is no JSON: {error}"))),
        value => Ok(value.clone()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::server::body::parse;

    fn spec(body: &str) -> Result<Option<GrammarSpec>, (String, u16)> {
        let fields: SamplingFields = parse(body.as_bytes()).unwrap();
        grammar_spec(&fields, &StructuredOutputsConfig::default())
            .map_err(|error| (error.param.unwrap_or_default(), error.status.as_u16()))
    }

    fn kind(body: &str) -> GrammarKind {
        spec(body).unwrap().expect("there is a grammar").kind
    }

    #[test]
    fn every_kind_is_understood() {
        let schema = json!({"type": "integer"});
        for (body, expected) in [
            (r#"{"response_format":{"type":"json_object"}}"#, GrammarKind::JsonObject),
            (
                r#"{"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{"type":"integer"}}}}"#,
                GrammarKind::JsonSchema(schema.clone()),
            ),
            (
                r#"{"structured_outputs":{"json":{"type":"integer"}}}"#,
                GrammarKind::JsonSchema(schema.clone()),
            ),
            (
                r#"{"structured_outputs":{"json":"{\"type\":\"integer\"}"}}"#,
                GrammarKind::JsonSchema(schema),
            ),
            (
                r#"{"structured_outputs":{"regex":"a+"}}"#,
                GrammarKind::Regex("a+".into()),
            ),
            (
                r#"{"structured_outputs":{"choice":["a"]}}"#,
                GrammarKind::Choice(vec!["a".into()]),
            ),
            (
                r#"{"structured_outputs":{"grammar":"root ::= \"a\""}}"#,
                GrammarKind::Grammar("root ::= \"a\"".into()),
            ),
            (
                r#"{"structured_outputs":{"json_object":true}}"#,
                GrammarKind::JsonObject,
            ),
            (
                r#"{"structured_outputs":{"structural_tag":"{\"format\":1}"}}"#,
                GrammarKind::StructuralTag(json!({"format": 1})),
            ),
        ] {
            assert_eq!(kind(body), expected, "{body}");
        }
        for body in [
            "{}",
            r#"{"response_format":{"type":"text"}}"#,
            r#"{"response_format":null,"structured_outputs":null}"#,
            r#"{"structured_outputs":{"json_object":false}}"#,
            r#"{"guided_json":{"type":"integer"}}"#,
        ] {
            assert_eq!(spec(body), Ok(None), "{body}");
        }
    }

    #[test]
    fn response_format_replaces_json_and_keeps_the_options() {
        let body = r#"{"response_format":{"type":"json_object"},"structured_outputs":{"json":{},"disable_any_whitespace":true}}"#;
        let spec = spec(body).unwrap().unwrap();
        assert_eq!(spec.kind, GrammarKind::JsonObject);
        assert!(spec.options.disable_any_whitespace);
    }

    #[test]
    fn what_is_unclear_is_refused() {
        for (body, param) in [
            (r#"{"response_format":{"type":"json_schema"}}"#, "response_format"),
            (
                r#"{"response_format":{"type":"json_schema","json_schema":{"name":"n"}}}"#,
                "body.response_format.json_schema.schema",
            ),
            (r#"{"response_format":{"type":"xml"}}"#, "body.response_format.type"),
            (r#"{"response_format":{"type":7}}"#, "body.response_format.type"),
            (r#"{"response_format":{}}"#, "body.response_format.type"),
            (r#"{"structured_outputs":{}}"#, ""),
            (r#"{"structured_outputs":{"regex":"a","choice":["b"]}}"#, ""),
            (
                r#"{"structured_outputs":{"regex":"a"},"response_format":{"type":"json_object"}}"#,
                "",
            ),
            (r#"{"structured_outputs":{"json":"{"}}"#, ""),
        ] {
            assert_eq!(spec(body), Err((param.to_owned(), 400)), "{body}");
        }
    }
}
