//! Random schemas, random output, random nonsense.

use proptest::prelude::*;

use super::*;

/// Schemas of every supported kind, and values that they are to be checked by.
fn any_schema() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!({"type": "null"})),
        Just(json!({"type": "boolean"})),
        (-50_i64..50, 0_i64..60)
            .prop_map(|(low, more)| json!({"type": "integer", "minimum": low, "maximum": low + more})),
        Just(json!({"type": "integer"})),
        Just(json!({"type": "number"})),
        (0_u8..4, 0_u8..8).prop_map(|(min, more)| json!({"type": "string", "minLength": min, "maxLength": min + more})),
        Just(json!({"type": "string", "pattern": "^[a-c]{1,4}$"})),
        Just(json!({"type": "string", "format": "date"})),
        prop::collection::vec("[a-zé\"\\\\]{0,4}", 1..4).prop_map(|values| json!({"enum": values})),
        (-5_i32..5).prop_map(|value| json!({"const": value})),
        Just(json!({"type": ["string", "null"], "maxLength": 3})),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            (inner.clone(), 0_u8..3, 0_u8..3).prop_map(
                |(items, min, more)| json!({"type": "array", "items": items, "minItems": min, "maxItems": min + more})
            ),
            prop::collection::vec((inner.clone(), any::<bool>()), 0..4).prop_map(|properties| {
                let required: Vec<String> = (0..properties.len())
                    .filter(|&i| properties[i].1)
                    .map(|i| format!("p{i}"))
                    .collect();
                let named = properties
                    .into_iter()
                    .enumerate()
                    .map(|(i, (part, _))| (format!("p{i}"), part));
                json!({"type": "object", "properties": named.collect::<serde_json::Map<_, _>>(), "required": required})
            }),
            prop::collection::vec(inner, 1..3).prop_map(|options| json!({"anyOf": options})),
        ]
    })
}

/// Anything at all where a schema is expected.
fn any_json() -> impl Strategy<Value = Value> {
    let keyword = prop::sample::select(vec![
        "type",
        "properties",
        "items",
        "required",
        "enum",
        "const",
        "$ref",
        "allOf",
        "anyOf",
        "oneOf",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "multipleOf",
        "additionalProperties",
        "patternProperties",
        "prefixItems",
        "minItems",
        "maxItems",
        "$defs",
        "x-guidance",
        "not",
        "title",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(vec![
            "string",
            "object",
            "array",
            "integer",
            "#",
            "#/$defs/a",
            "(a|b)*c",
            "date",
            "é",
            ""
        ])
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
            prop::collection::vec((keyword.clone(), inner), 0..5).prop_map(|entries| {
                Value::Object(
                    entries
                        .into_iter()
                        .map(|(key, value)| (key.to_owned(), value))
                        .collect(),
                )
            }),
        ]
    })
}

/// A plain reading of the keywords that [`any_schema`] uses.
fn validates(schema: &Value, value: &Value) -> bool {
    let is_type = |name: &str| match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        _ => value.is_object(),
    };
    let of_type = match &schema["type"] {
        Value::String(name) => is_type(name),
        Value::Array(names) => names.iter().any(|name| is_type(name.as_str().unwrap())),
        _ => true,
    };
    let number = |key: &str| schema[key].as_f64();
    let within = |count: usize, min: &str, max: &str| {
        schema[min].as_u64().is_none_or(|min| count as u64 >= min)
            && schema[max].as_u64().is_none_or(|max| count as u64 <= max)
    };
    of_type
        && schema["enum"].as_array().is_none_or(|values| values.contains(value))
        && (schema["const"].is_null() || schema["const"].as_f64() == value.as_f64())
        && schema["anyOf"]
            .as_array()
            .is_none_or(|options| options.iter().any(|option| validates(option, value)))
        && value.as_f64().is_none_or(|n| {
            number("minimum").is_none_or(|min| n >= min) && number("maximum").is_none_or(|max| n <= max)
        })
        && value.as_str().is_none_or(|text| {
            let is_abc = (1..=4).contains(&text.len()) && text.bytes().all(|byte| (b'a'..=b'c').contains(&byte));
            within(text.chars().count(), "minLength", "maxLength") && (schema["pattern"].is_null() || is_abc)
        })
        && value.as_array().is_none_or(|items| {
            within(items.len(), "minItems", "maxItems")
                && items
                    .iter()
                    .all(|item| schema["items"].is_null() || validates(&schema["items"], item))
        })
        && value.as_object().is_none_or(|object| {
            let required = schema["required"]
                .as_array()
                .is_none_or(|names| names.iter().all(|name| object.contains_key(name.as_str().unwrap())));
            required
                && object.iter().all(|(name, value)| {
                    schema["properties"].get(name).is_none_or(|part| validates(part, value))
                        && (schema["properties"].is_null() || schema["properties"].get(name).is_some())
                })
        })
}

proptest! {
    #[test]
    fn random_output_under_a_random_schema_validates(part in any_schema(), seed in any::<u64>()) {
        // An object around it, so that random tokens cannot end it early.
        let whole = json!({"type": "object", "properties": {"value": part}, "required": ["value"]});
        if let Some(text) = sample(schema(whole.clone()), seed, 6_000) {
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?} under {whole}"));
            prop_assert!(validates(&whole, &value), "{} under {}", text, whole);
        }
    }

    #[test]
    fn no_schema_panics(schema in any_json()) {
        let _ = compile(GrammarKind::JsonSchema(schema.clone()));
        let _ = compile(GrammarKind::StructuralTag(schema));
    }

    #[test]
    fn no_grammar_panics(text in "[a-z\"'()|*+?{}\\[\\]:=%<>/#.&~ \\n0-9,-]{0,60}") {
        let _ = compile(GrammarKind::Grammar(text.clone()));
        let _ = compile(GrammarKind::Grammar(format!("root ::= {text}")));
        let _ = compile(GrammarKind::Regex(text));
    }
}
