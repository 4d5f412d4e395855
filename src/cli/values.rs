//! From a flag's text to its value, as vLLM's argparse types do it.

use serde_json::{Map, Number, Value};

use super::table::{Flag, Kind};

/// Reads one value of `flag`.
///
/// # Errors
/// argparse's wording, without the `argument --x:` in front.
pub fn parse_value(flag: &Flag, text: &str) -> Result<Value, String> {
    if flag.optional && (text.is_empty() || text == "None") {
        return Ok(Value::Null);
    }
    let value = match flag.kind {
        Kind::Bool | Kind::Switch | Kind::Help => parse_bool(text)
            .map(Value::Bool)
            .ok_or_else(|| format!("ignored explicit argument '{text}'"))?,
        Kind::Str => Value::from(text),
        Kind::Int => Value::from(parse_int(text).ok_or_else(|| format!("invalid int value: '{text}'"))?),
        Kind::FloatOrInf if matches!(text, "inf" | "Infinity" | "infinity") => Value::Null,
        Kind::Float | Kind::FloatOrInf => parse_float(text).ok_or_else(|| format!("invalid float value: '{text}'"))?,
        Kind::HumanInt => Value::from(human_int(text)?),
        Kind::HumanIntOrAuto if text.eq_ignore_ascii_case("auto") => Value::from(-1),
        Kind::HumanIntOrAuto => Value::from(human_int(text)?),
        Kind::Json => parse_json(text).map_err(|e| format!("value {text} cannot be read as JSON: {e}"))?,
        Kind::JsonOrStr if text.trim_start().starts_with(['{', '[']) => {
            parse_json(text).map_err(|e| format!("value {text} cannot be read as JSON: {e}"))?
        }
        Kind::JsonOrStr => Value::from(text),
    };
    if flag.choices.is_empty() || flag.choices.contains(&value) {
        return Ok(value);
    }
    let choices: Vec<String> = flag.choices.iter().map(quoted).collect();
    Err(format!(
        "invalid choice: {} (choose from {})",
        quoted(&value),
        choices.join(", ")
    ))
}

/// As Python prints it.
fn quoted(value: &Value) -> String {
    match value {
        Value::String(s) => format!("'{s}'"),
        other => other.to_string(),
    }
}

pub fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "1" => Some(true),
        "false" | "False" | "0" => Some(false),
        _ => None,
    }
}

/// Python's `int()`: blanks around, a sign, underscores between digits.
fn parse_int(text: &str) -> Option<i64> {
    digits(text.trim())?.parse().ok()
}

/// Python's `float()`. Infinities and NaN are no JSON numbers and are refused, as no flag has a use for them.
fn parse_float(text: &str) -> Option<Value> {
    digits(text.trim())?
        .parse()
        .ok()
        .and_then(Number::from_f64)
        .map(Value::Number)
}

/// Drops underscores that stand between two digits; none where one stands elsewhere.
fn digits(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let is_digit = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    let misplaced = |i: usize| bytes[i] == b'_' && !(i > 0 && is_digit(i - 1) && is_digit(i + 1));
    let plain = !text.is_empty() && !(0..bytes.len()).any(misplaced);
    plain.then(|| text.replace('_', ""))
}

/// `512`, `25.6k` (powers of 1000, decimals allowed) or `2K` (powers of 1024, integers only).
///
/// # Errors
/// The text is neither, is no whole number, or is beyond 64 bits.
pub fn human_int(text: &str) -> Result<i64, String> {
    let invalid = || format!("invalid human_readable_int value: '{text}'");
    let trimmed = text.trim();
    let Some(suffix) = trimmed.chars().next_back().filter(|c| c.is_ascii_alphabetic()) else {
        return parse_int(trimmed).ok_or_else(invalid);
    };
    let number = &trimmed[..trimmed.len() - 1];
    let power = "kmgt".find(suffix.to_ascii_lowercase()).ok_or_else(invalid)? as u32 + 1;
    if suffix.is_ascii_uppercase() {
        if number.contains('.') {
            return Err(format!(
                "'{text}': decimals are not allowed with binary suffixes such as {suffix}"
            ));
        }
        let scaled = parse_int(number).ok_or_else(invalid)?.checked_mul(1 << (10 * power));
        return scaled.ok_or_else(|| format!("'{text}' is too large"));
    }
    decimal_times_1000(number, power).ok_or_else(invalid)
}

/// `number` (digits, perhaps a point and more digits) times 1000^power, cut to an integer without rounding errors.
fn decimal_times_1000(number: &str, power: u32) -> Option<i64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let (sign, whole) = whole.strip_prefix('-').map_or((1, whole), |w| (-1, w));
    if whole.is_empty() && fraction.is_empty() || !whole.chars().chain(fraction.chars()).all(|c| c.is_ascii_digit()) {
        return None;
    }
    let places = 3 * power as usize;
    let kept: String = fraction.chars().chain(std::iter::repeat('0')).take(places).collect();
    let value: i64 = format!("{whole}{kept}").parse().ok()?;
    Some(sign * value)
}

/// JSON in which bare numbers may carry a suffix of [`human_int`]: `{"max_tokens": 1k}`.
///
/// # Errors
/// The JSON error of the text as written.
pub fn parse_json(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(text).or_else(|error| serde_json::from_str(&expand_suffixes(text)).map_err(|_| error))
}

/// Replaces suffixed numbers outside strings by what they mean.
fn expand_suffixes(text: &str) -> String {
    let mut expanded = String::with_capacity(text.len());
    let mut token = String::new();
    let (mut in_string, mut escaped) = (false, false);
    let flush = |token: &mut String, expanded: &mut String| {
        match human_int(token) {
            Ok(value) if token.ends_with(|c: char| c.is_ascii_alphabetic()) => expanded.push_str(&value.to_string()),
            _ => expanded.push_str(token),
        }
        token.clear();
    };
    for c in text.chars() {
        if !in_string && (c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+')) {
            token.push(c);
            continue;
        }
        flush(&mut token, &mut expanded);
        expanded.push(c);
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = in_string;
        } else if c == '"' {
            in_string = !in_string;
        }
    }
    flush(&mut token, &mut expanded);
    expanded
}

/// The value of a dotted flag: JSON, else a suffixed number, else the string itself.
pub fn parse_dotted_value(text: &str) -> Value {
    if let Ok(value) = parse_json(text) {
        return value;
    }
    let suffixed = text.ends_with(|c: char| c.is_ascii_alphabetic()) && text.starts_with(|c: char| c.is_ascii_digit());
    match human_int(text) {
        Ok(value) if suffixed => Value::from(value),
        _ => Value::from(text),
    }
}

/// Puts `value` at `path` of nested objects.
///
/// # Errors
/// A part of the path is already something else than an object. True in `Ok`: an earlier value was replaced.
pub fn insert_at(object: &mut Map<String, Value>, path: &[&str], value: Value, append: bool) -> Result<bool, String> {
    let Some((&key, rest)) = path.split_first() else {
        return Err("the path is empty".into());
    };
    if !rest.is_empty() {
        let child = object.entry(key).or_insert_with(|| Value::Object(Map::new()));
        let child = child
            .as_object_mut()
            .ok_or_else(|| format!("'{key}' already has a value that is no object"))?;
        return insert_at(child, rest, value, append);
    }
    if append {
        let list = object.entry(key).or_insert_with(|| Value::Array(Vec::new()));
        let list = list
            .as_array_mut()
            .ok_or_else(|| format!("'{key}' already has a value that is no list"))?;
        list.push(value);
        return Ok(false);
    }
    Ok(object.insert(key.to_owned(), value).is_some())
}
