//! Values as JSON text, with Python's ideas of equal keys and of numbers.

use std::collections::HashMap;

/// CPython refuses longer integers.
pub(super) const MAX_NUMBER_CHARS: usize = 4300;

#[derive(Clone)]
pub(super) struct Key {
    /// Equal for keys that are equal in Python: `1`, `1.0` and `True`.
    pub canonical: String,
    /// Quoted JSON text.
    pub json: String,
}

/// Insertion order; a later equal key replaces the value, as in Python.
#[derive(Default)]
pub(super) struct Dict {
    pub entries: Vec<(String, Literal)>,
    positions: HashMap<String, usize>,
}

impl Dict {
    pub fn contains(&self, key: &Key) -> bool {
        self.positions.contains_key(&key.canonical)
    }

    pub fn insert(&mut self, key: Key, value: Literal) {
        match self.positions.get(&key.canonical) {
            Some(&at) => self.entries[at].1 = value,
            None => {
                self.positions.insert(key.canonical, self.entries.len());
                self.entries.push((key.json, value));
            }
        }
    }

    pub fn write(&self, out: &mut String) {
        out.push('{');
        for (i, (key, value)) in self.entries.iter().enumerate() {
            if i > 0 {
                out.push_str(", ");
            }
            out.push_str(key);
            out.push_str(": ");
            value.write(out);
        }
        out.push('}');
    }
}

pub(super) enum Literal {
    Scalar { json: String, kind: Kind },
    List(Vec<Literal>),
    Dict(Dict),
}

pub(super) enum Kind {
    Text,
    Int,
    Float(f64),
    Bool(bool),
    None,
    /// Readable as a value, no constant in Python: f-strings, signed numbers, `null`/`true`/`false`.
    NotConstant,
}

impl Literal {
    /// Depth is bounded by [`MAX_DEPTH`](super::MAX_DEPTH).
    pub fn write(&self, out: &mut String) {
        match self {
            Literal::Scalar { json, .. } => out.push_str(json),
            Literal::List(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    item.write(out);
                }
                out.push(']');
            }
            Literal::Dict(dict) => dict.write(out),
        }
    }

    pub fn key(&self) -> Option<Key> {
        let Literal::Scalar { json, kind } = self else {
            return None;
        };
        let canonical = match kind {
            Kind::Text => {
                return Some(Key {
                    canonical: json.clone(),
                    json: json.clone(),
                });
            }
            Kind::Int | Kind::None => json.clone(),
            Kind::Bool(value) => u8::from(*value).to_string(),
            Kind::Float(value) if value.fract() == 0.0 && value.abs() < 1e15 => format!("{value:.0}"),
            Kind::Float(_) => json.clone(),
            Kind::NotConstant => return None,
        };
        Some(Key {
            canonical,
            json: format!("\"{json}\""),
        })
    }
}

/// A Python number as JSON.
pub(super) fn parse_number(text: &str) -> Option<(String, Kind)> {
    if text.len() > MAX_NUMBER_CHARS || text.contains("__") || text.ends_with('_') || text.starts_with('_') {
        return None;
    }
    let digits = text.replace('_', "");
    let lower = digits.to_ascii_lowercase();
    for (prefix, radix) in [("0x", 16), ("0o", 8), ("0b", 2)] {
        if let Some(rest) = lower.strip_prefix(prefix) {
            return Some((u128::from_str_radix(rest, radix).ok()?.to_string(), Kind::Int));
        }
    }
    if digits.bytes().all(|b| b.is_ascii_digit()) {
        let significant = digits.trim_start_matches('0');
        let json = if significant.is_empty() { "0" } else { significant };
        return Some((json.to_owned(), Kind::Int));
    }
    if !digits
        .bytes()
        .all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'+' | b'-'))
    {
        return None;
    }
    let value: f64 = digits.parse().ok()?;
    Some((float_repr(value), Kind::Float(value)))
}

/// Python's `repr` of a float that is not negative.
///
/// Differs from vLLM for infinity: `1e999` is JSON and reads as infinity, `Infinity` is no JSON.
fn float_repr(value: f64) -> String {
    if value.is_infinite() {
        return "1e999".to_owned();
    }
    let scientific = format!("{value:e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let Ok(exponent) = exponent.parse::<i32>() else {
        return scientific;
    };
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}
