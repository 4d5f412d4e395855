//! Template values as Python writes them: `str`, `repr` and `json.dumps`.

use std::fmt::Write;

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Nesting that no sane tool schema reaches.
const MAX_DEPTH: usize = 200;

/// How `json.dumps` was asked to write.
#[derive(Clone, Debug)]
pub struct JsonStyle {
    pub ensure_ascii: bool,
    /// One level of indentation; none = on one line.
    pub indent: Option<String>,
    /// Between items and after keys.
    pub separators: (String, String),
    pub sort_keys: bool,
}

impl Default for JsonStyle {
    /// As `tojson` in Hugging Face's templates.
    fn default() -> Self {
        Self {
            ensure_ascii: false,
            indent: None,
            separators: (", ".into(), ": ".into()),
            sort_keys: false,
        }
    }
}

/// `json.dumps`. Unlike minijinja's own filter it escapes nothing for HTML.
///
/// # Errors
/// A value that JSON does not have (undefined, a function), or absurd nesting.
pub fn to_json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut out = String::new();
    write_json(value, style, 0, &mut out)?;
    Ok(out)
}

fn write_json(value: &Value, style: &JsonStyle, depth: usize, out: &mut String) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => match as_float(value) {
            Some(float) => out.push_str(&json_float(float)),
            None => out.push_str(&value.to_string()),
        },
        ValueKind::String => json_string(value.as_str().unwrap_or_default(), style.ensure_ascii, out),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_items(['[', ']'], &items, style, depth, out, |item, out| {
                write_json(item, style, depth + 1, out)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort();
            }
            write_items(['{', '}'], &keys, style, depth, out, |key, out| {
                json_string(&json_key(key)?, style.ensure_ascii, out);
                out.push_str(&style.separators.1);
                write_json(&value.get_item(key)?, style, depth + 1, out)
            })?;
        }
        kind => {
            return Err(Error::new(
                ErrorKind::BadSerialization,
                format!("a value of type {kind} is not JSON"),
            ));
        }
    }
    Ok(())
}

fn write_items(
    [open, close]: [char; 2],
    items: &[Value],
    style: &JsonStyle,
    depth: usize,
    out: &mut String,
    mut write: impl FnMut(&Value, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    let new_line = |depth: usize, out: &mut String| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    };
    out.push(open);
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.push_str(&style.separators.0);
        }
        new_line(depth + 1, out);
        write(item, out)?;
    }
    if !items.is_empty() {
        new_line(depth, out);
    }
    out.push(close);
    Ok(())
}

fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None | ValueKind::Bool | ValueKind::Number => to_json(key, &JsonStyle::default()),
        kind => Err(Error::new(
            ErrorKind::BadSerialization,
            format!("a key of type {kind} is not JSON"),
        )),
    }
}

fn json_string(text: &str, ensure_ascii: bool, out: &mut String) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            character if character < ' ' || (ensure_ascii && character > '~') => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    // Writing to a String cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            character => out.push(character),
        }
    }
    out.push('"');
}

fn json_float(value: f64) -> String {
    match value {
        value if value.is_nan() => "NaN".into(),
        value if value.is_infinite() => if value > 0.0 { "Infinity" } else { "-Infinity" }.into(),
        value => float_repr(value),
    }
}

/// `str(value)`: what `{{ value }}` prints.
///
/// # Errors
/// Absurd nesting.
pub fn to_str(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            let mut out = String::new();
            write_repr(value, 0, &mut out)?;
            Ok(out)
        }
        _ => Ok(value.to_string()),
    }
}

fn write_repr(value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::Number => match as_float(value) {
            Some(float) => out.push_str(&float_repr(float)),
            None => out.push_str(&value.to_string()),
        },
        ValueKind::String => string_repr(value.as_str().unwrap_or_default(), out),
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Seq => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_items(['[', ']'], &items, &JsonStyle::default(), 0, out, |item, out| {
                write_repr(item, depth + 1, out)
            })?;
        }
        ValueKind::Map => {
            let keys: Vec<Value> = value.try_iter()?.collect();
            write_items(['{', '}'], &keys, &JsonStyle::default(), 0, out, |key, out| {
                write_repr(key, depth + 1, out)?;
                out.push_str(": ");
                write_repr(&value.get_item(key)?, depth + 1, out)
            })?;
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// `repr` of a str. Differs from Python in rare unprintable characters outside ASCII, which stay as they are.
fn string_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            character if character == quote => {
                out.push('\\');
                out.push(quote);
            }
            character if character.is_control() || character == '\u{a0}' || character == '\u{ad}' => {
                let _ = write!(out, "\\x{:02x}", character as u32);
            }
            character => out.push(character),
        }
    }
    out.push(quote);
}

/// `repr` of a float: shortest digits, an exponent below 1e-4 and from 1e16 on.
fn float_repr(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{value:e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    let mut plain = value.to_string();
    if !plain.contains('.') {
        plain.push_str(".0");
    }
    plain
}

/// The value of a float; none for integers, of whatever width.
fn as_float(value: &Value) -> Option<f64> {
    if value.is_integer() {
        None
    } else {
        f64::try_from(value.clone()).ok()
    }
}

fn check_depth(depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::new(ErrorKind::InvalidOperation, "a value is nested too deeply"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value(json: serde_json::Value) -> Value {
        Value::from(minijinja::value::Serde(json))
    }

    #[test]
    fn floats_as_python_prints_them() {
        let cases = [
            (0.25, "0.25"),
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (1e-4, "0.0001"),
            (1.25e-5, "1.25e-05"),
            (f64::NAN, "nan"),
        ];
        for (float, expected) in cases {
            assert_eq!(to_str(&Value::from(float)).unwrap(), expected);
        }
        assert_eq!(
            to_json(&Value::from(f64::NEG_INFINITY), &JsonStyle::default()).unwrap(),
            "-Infinity"
        );
    }

    #[test]
    fn containers_as_python_prints_them() {
        let printed = to_str(&value(
            json!({"k": [1, 2.0, null, true, "it's", "a\"b'c\n", "é"], "e": {}}),
        ))
        .unwrap();
        assert_eq!(
            printed,
            r#"{'k': [1, 2.0, None, True, "it's", 'a"b\'c\n', 'é'], 'e': {}}"#
        );
    }

    #[test]
    fn json_as_python_dumps_it() {
        let tree = value(json!({"b": "<&'\"\u{1}\u{7f}é🙂", "a": [1, {"x": 1e20}], "n": null, "z": []}));
        let plain = to_json(&tree, &JsonStyle::default()).unwrap();
        assert_eq!(
            plain,
            "{\"b\": \"<&'\\\"\\u0001\u{7f}é🙂\", \"a\": [1, {\"x\": 1e+20}], \"n\": null, \"z\": []}"
        );
        let style = JsonStyle {
            ensure_ascii: true,
            indent: Some("  ".into()),
            separators: (",".into(), ": ".into()),
            sort_keys: true,
        };
        assert_eq!(
            to_json(&tree, &style).unwrap(),
            "{\n  \"a\": [\n    1,\n    {\n      \"x\": 1e+20\n    }\n  ],\n  \"b\": \"<&'\\\"\\u0001\\u007f\\u00e9\\ud83d\\ude42\",\n  \"n\": null,\n  \"z\": []\n}"
        );
        assert!(to_json(&Value::UNDEFINED, &JsonStyle::default()).is_err());
    }
}
