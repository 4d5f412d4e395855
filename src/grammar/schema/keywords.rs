//! Keywords whose value is no schema: what each may say, and what the automaton's compiler takes.

use llguidance::derivre::RegexBuilder;
use llguidance::regex_to_lark;
use serde_json::{Map, Value};

use super::Place;
use crate::grammar::GrammarError;

/// Bounds that a schema may ask to be met. Longer strings and arrays are not refused, only never made.
const MAX_LENGTH: u64 = 8_192;
const MAX_ITEMS: u64 = 4_096;
/// `multipleOf` is tested by a remainder automaton over decimal digits.
const MULTIPLES: std::ops::RangeInclusive<f64> = 1e-6..=1e6;

/// Keywords that cannot be enforced.
pub(super) const UNSUPPORTED: &[&str] = &[
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedItems",
    "$recursiveRef",
    "$dynamicRef",
];

/// Formats that are enforced; others are annotations, as the standard has it.
const FORMATS: &[&str] = &[
    "date-time",
    "time",
    "date",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
];

/// Keywords whose value is no schema.
pub(super) const SIMPLE: &[&str] = &[
    "type",
    "const",
    "enum",
    "properties",
    "additionalProperties",
    "items",
    "prefixItems",
    "additionalItems",
    "required",
    "minProperties",
    "maxProperties",
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
];

/// A schema that is nothing but `allOf` of one.
pub(super) fn sole_part(object: &Map<String, Value>) -> Option<&Value> {
    let parts = object.get("allOf")?.as_array()?;
    let others = [
        "$ref",
        "anyOf",
        "oneOf",
        "patternProperties",
        "unevaluatedProperties",
        "uniqueItems",
    ];
    let is_alone = !object.keys().any(|keyword| {
        SIMPLE.contains(&keyword.as_str())
            || UNSUPPORTED.contains(&keyword.as_str())
            || others.contains(&keyword.as_str())
    });
    match parts.as_slice() {
        [only] if is_alone => Some(only),
        _ => None,
    }
}

/// The value as the compiler takes it; none where it says nothing.
pub(super) fn simple(keyword: &str, value: &Value, at: &Place) -> Result<Option<Value>, GrammarError> {
    const TYPES: [&str; 7] = ["null", "boolean", "integer", "number", "string", "array", "object"];
    let is_type = |value: &Value| value.as_str().is_some_and(|name| TYPES.contains(&name));
    match keyword {
        "type" => match value {
            Value::Array(types) if !types.is_empty() && types.iter().all(is_type) => Ok(Some(value.clone())),
            value if is_type(value) => Ok(Some(value.clone())),
            _ => at.refuse("a type is one of null, boolean, integer, number, string, array, object, or a list of them"),
        },
        "required" => match value {
            Value::Array(names) if names.iter().all(Value::is_string) => Ok(Some(value.clone())),
            _ => at.refuse("it must be a list of names"),
        },
        "minLength" | "minItems" | "minProperties" => {
            let count = count(value, at)?;
            let most = if keyword == "minLength" { MAX_LENGTH } else { MAX_ITEMS };
            if count > most {
                return at.refuse(format_args!("at most {most} can be demanded"));
            }
            Ok(Some(count.into()))
        }
        // What is shorter than asked for is allowed.
        "maxLength" => Ok(Some(count(value, at)?.min(MAX_LENGTH).into())),
        "maxItems" | "maxProperties" => Ok(Some(count(value, at)?.min(MAX_ITEMS).into())),
        "minimum" | "maximum" => number(value, at).map(Some),
        "exclusiveMinimum" | "exclusiveMaximum" if value.is_boolean() => Ok(Some(value.clone())),
        "exclusiveMinimum" | "exclusiveMaximum" => number(value, at).map(Some),
        "multipleOf" => match value.as_f64() {
            Some(step) if MULTIPLES.contains(&step) => Ok(Some(value.clone())),
            _ => at.refuse("a multiple of a number between 1e-6 and 1e6 can be enforced"),
        },
        "pattern" => match value {
            Value::String(pattern) => check_pattern(pattern, at).map(|()| Some(value.clone())),
            _ => at.refuse("it must be a string"),
        },
        "format" => match value {
            Value::String(name) => Ok(FORMATS.contains(&name.as_str()).then(|| value.clone())),
            _ => at.refuse("it must be a string"),
        },
        _ => Ok(Some(value.clone())),
    }
}

fn count(value: &Value, at: &Place) -> Result<u64, GrammarError> {
    let whole = value
        .as_f64()
        .filter(|number| number.fract() == 0.0 && (0.0..1e18).contains(number));
    match whole {
        Some(count) => Ok(count as u64),
        None => at.refuse("it must be a whole number that is not negative"),
    }
}

/// Numbers are compared as texts of up to 15 digits.
fn number(value: &Value, at: &Place) -> Result<Value, GrammarError> {
    match value.as_f64() {
        Some(number) if number.abs() < 1e15 => Ok(value.clone()),
        Some(_) => at.refuse("bounds beyond 1e15 cannot be enforced"),
        None => at.refuse("it must be a number"),
    }
}

pub(super) fn check_pattern(pattern: &str, at: &Place) -> Result<(), GrammarError> {
    const MAX_BYTES: usize = 8 << 10;
    if pattern.len() > MAX_BYTES {
        return at.refuse(format_args!("the pattern has more than {MAX_BYTES} bytes"));
    }
    match RegexBuilder::new().mk_regex_for_serach(&regex_to_lark(pattern, "dw")) {
        Ok(_) => Ok(()),
        Err(error) => at.refuse(format_args!(
            "the pattern cannot be used: {}",
            crate::grammar::compiler::last_line(&error)
        )),
    }
}

/// A `type` beside an `enum` has been applied to its values.
pub(super) fn drops_type(schema: &Map<String, Value>) -> bool {
    schema.contains_key("enum") && schema.contains_key("type")
}

pub(super) fn has_type(value: &Value, types: &Value) -> bool {
    let is = |name: &Value| match (name.as_str(), value) {
        (Some("null"), Value::Null)
        | (Some("boolean"), Value::Bool(_))
        | (Some("number"), Value::Number(_))
        | (Some("string"), Value::String(_))
        | (Some("array"), Value::Array(_))
        | (Some("object"), Value::Object(_)) => true,
        (Some("integer"), Value::Number(number)) => number.as_f64().is_some_and(|number| number.fract() == 0.0),
        _ => false,
    };
    match types {
        Value::Array(types) => types.iter().any(is),
        one => is(one),
    }
}

/// # Errors
/// A pattern that matches something other than JSON's white space.
pub(super) fn check_whitespace(pattern: &str) -> Result<&str, GrammarError> {
    const MAX_FUEL: u64 = 20_000;
    let contained = RegexBuilder::new().is_contained_in(pattern, r"[ \t\n\r]*", MAX_FUEL);
    match contained {
        Ok(true) => Ok(pattern),
        _ => Err(GrammarError::invalid(
            "whitespace_pattern must be a regular expression that matches nothing but JSON's white space",
        )),
    }
}
