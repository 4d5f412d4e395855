//! JSON schemas before they are compiled: references resolved, keywords checked where they stand, sizes bounded.
//!
//! What comes out is a schema that the automaton's compiler takes as it is: references lead to `$defs` only, annotations are
//! gone, and what it could not enforce has been refused with its path. Its own intersections can multiply a schema
//! (`allOf` of `anyOf`s, references beside other keywords), so their size is estimated here first.
//!
//! As vLLM's default grammar engine does, objects that name properties take no others unless the schema says so.

mod keywords;

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use self::keywords::{SIMPLE, UNSUPPORTED, check_pattern, check_whitespace, drops_type, has_type, simple, sole_part};
use super::{GrammarError, GrammarOptions};

/// Deepest nesting, references followed.
pub(super) const MAX_DEPTH: usize = 256;
/// Most schemas, copies included, and most values of all `enum`s.
const MAX_NODES: usize = 20_000;
const MAX_ENUM_VALUES: usize = 40_000;
/// Each two options of a `oneOf` are compared.
const MAX_ONE_OF: usize = 128;
const MAX_PROPERTIES: usize = 2_000;
const MAX_PATTERN_PROPERTIES: usize = 16;

/// White space between tokens: none, one blank, or a line break with its indentation.
const WHITESPACE: &str = r" |\r?\n[ \t]{0,40}";

/// The schema to compile, with the options in it.
///
/// # Errors
/// Malformed, unsupported or too large; the path is in the message.
pub(super) fn prepare(schema: &Value, options: &GrammarOptions) -> Result<Value, GrammarError> {
    let mut walker = Walker {
        root: schema,
        close_all: options.disable_additional_properties,
        defs: HashMap::new(),
        prepared: Vec::new(),
        num_nodes: 0,
        num_enum_values: 0,
    };
    let place = Place {
        path: "#".into(),
        depth: 0,
        composed: false,
        copied: false,
    };
    let (root, _) = walker.schema(schema, &place)?;
    let mut root = match root {
        Value::Object(root) => root,
        Value::Bool(true) => Map::new(),
        _ => {
            return Err(GrammarError::invalid(
                "the JSON schema cannot be used, at #: nothing validates against it",
            ));
        }
    };
    if !walker.prepared.is_empty() {
        let defs = walker.prepared.into_iter().enumerate();
        let defs: Map<String, Value> = defs.map(|(id, def)| (def_name(id), def)).collect();
        root.insert("$defs".into(), Value::Object(defs));
    }
    let mut guidance = json!({"whitespace_flexible": !options.disable_any_whitespace});
    if !options.disable_any_whitespace {
        guidance["whitespace_pattern"] = match &options.whitespace_pattern {
            Some(pattern) => check_whitespace(pattern)?.into(),
            None => WHITESPACE.into(),
        };
    }
    root.insert("x-guidance".into(), guidance);
    Ok(Value::Object(root))
}

/// The innermost part of a schema that `works` refuses although it accepts each of that part's own parts.
pub(super) fn locate(schema: &Value, mut works: impl FnMut(&Value) -> bool) -> String {
    /// Each trial is a compilation.
    const MAX_TRIALS: usize = 40;
    let root = schema;
    let (mut path, mut at, mut trials) = (String::from("#"), schema, 0);
    'deeper: loop {
        for (step, part) in parts(at) {
            trials += 1;
            if trials > MAX_TRIALS {
                return path;
            }
            let mut alone = part.clone();
            // Its references lead into the whole.
            if let (Value::Object(alone), Value::Object(root)) = (&mut alone, root) {
                for name in ["$defs", "definitions"] {
                    if let Some(defs) = root.get(name) {
                        alone.entry(name).or_insert_with(|| defs.clone());
                    }
                }
            }
            if !works(&alone) {
                path += &step;
                at = part;
                continue 'deeper;
            }
        }
        return path;
    }
}

/// The subschemas of a schema, with their steps in a path.
fn parts(schema: &Value) -> Vec<(String, &Value)> {
    let Value::Object(object) = schema else {
        return Vec::new();
    };
    let mut parts = Vec::new();
    for (keyword, value) in object {
        let in_place = matches!(keyword.as_str(), "items" | "additionalProperties" | "additionalItems");
        match value {
            Value::Object(named)
                if matches!(
                    keyword.as_str(),
                    "properties" | "patternProperties" | "$defs" | "definitions"
                ) =>
            {
                parts.extend(
                    named
                        .iter()
                        .map(|(name, part)| (format!("/{keyword}/{}", escape(name)), part)),
                );
            }
            Value::Array(list) if matches!(keyword.as_str(), "items" | "prefixItems" | "allOf" | "anyOf" | "oneOf") => {
                parts.extend(
                    list.iter()
                        .enumerate()
                        .map(|(i, part)| (format!("/{keyword}/{i}"), part)),
                );
            }
            Value::Object(_) if in_place => parts.push((format!("/{keyword}"), value)),
            _ => {}
        }
    }
    parts
}

/// What compiling a schema may cost: the schemas it becomes, and the most alternatives on a way through it.
#[derive(Clone, Copy, Debug)]
struct Cost {
    size: usize,
    width: usize,
}

impl Cost {
    const ONE: Cost = Cost { size: 1, width: 1 };

    fn under(parts: impl Iterator<Item = Cost>) -> Cost {
        parts.fold(Cost::ONE, |sum, part| Cost {
            size: sum.size.saturating_add(part.size),
            width: sum.width.max(part.width),
        })
    }

    fn choice(options: usize, parts: Cost) -> Cost {
        Cost {
            size: parts.size,
            width: parts.width.saturating_mul(options.max(1)),
        }
    }

    /// All of several: each alternative of one with each of the others.
    fn all(parts: &[Cost]) -> Cost {
        match parts {
            [] => Cost::ONE,
            [one] => *one,
            parts => {
                let width = parts
                    .iter()
                    .fold(1_usize, |width, part| width.saturating_mul(part.width));
                let size = parts.iter().fold(0_usize, |size, part| size.saturating_add(part.size));
                Cost {
                    size: size.saturating_mul(width),
                    width,
                }
            }
        }
    }
}

/// Where a schema stands.
#[derive(Clone)]
struct Place {
    path: String,
    depth: usize,
    /// One of several that the same value must satisfy: it does not know all properties.
    composed: bool,
    /// References here are not kept but replaced by copies of what they lead to.
    copied: bool,
}

impl Place {
    fn at(&self, step: &str) -> Place {
        Place {
            path: format!("{}/{}", self.path, escape(step)),
            depth: self.depth + 1,
            composed: self.composed,
            copied: self.copied,
        }
    }

    fn refuse<T>(&self, what: impl std::fmt::Display) -> Result<T, GrammarError> {
        Err(GrammarError::invalid(format!(
            "the JSON schema cannot be used, at {}: {what}",
            shortened(&self.path)
        )))
    }
}

struct Walker<'a> {
    root: &'a Value,
    close_all: bool,
    /// Number of each definition, by its pointer and how it is used; with its cost once known.
    defs: HashMap<(String, bool, bool), (usize, Option<Cost>)>,
    prepared: Vec<Value>,
    num_nodes: usize,
    num_enum_values: usize,
}

impl Walker<'_> {
    fn schema(&mut self, schema: &Value, place: &Place) -> Result<(Value, Cost), GrammarError> {
        self.num_nodes += 1;
        if place.depth > MAX_DEPTH {
            return place.refuse("it is nested too deeply");
        }
        if self.num_nodes > MAX_NODES {
            return place.refuse("it is too large");
        }
        let object = match schema {
            Value::Bool(_) => return Ok((schema.clone(), Cost::ONE)),
            Value::Object(object) => object,
            _ => return place.refuse("a schema must be an object or a boolean"),
        };
        if let Some(only) = sole_part(object) {
            return self.schema(only, &place.at("allOf").at("0"));
        }
        let composes = ["$ref", "allOf", "anyOf", "oneOf"];
        let num_compositions = composes.iter().filter(|keyword| object.contains_key(**keyword)).count();
        let is_constrained = object
            .keys()
            .any(|keyword| SIMPLE.contains(&keyword.as_str()) && keyword != "type" || keyword == "patternProperties");
        let has_members = object.get("allOf").and_then(Value::as_array).map_or(0, Vec::len);
        let composed = place.composed || num_compositions + usize::from(is_constrained) > 1 || has_members > 1;
        let inner = Place {
            composed,
            copied: place.copied || composed || (num_compositions > 0 && object.contains_key("type")),
            ..place.clone()
        };

        let mut out = Map::new();
        let mut costs = Vec::new();
        let mut own = Vec::new();
        for (keyword, value) in object {
            let at = inner.at(keyword);
            // What a value's own parts must be is composed only where the whole is.
            let below = Place {
                composed: place.composed,
                copied: place.copied,
                ..at.clone()
            };
            match keyword.as_str() {
                "$ref" => {
                    let (reference, cost) = self.reference(value, &at)?;
                    out.insert(keyword.clone(), reference);
                    costs.push(cost);
                }
                "allOf" => {
                    let (parts, part_costs) = self.list(value, &at)?;
                    out.insert(keyword.clone(), parts);
                    costs.extend(part_costs);
                }
                "anyOf" | "oneOf" => {
                    let (parts, part_costs) = self.list(value, &at)?;
                    let options = part_costs.len();
                    if options == 0 {
                        return at.refuse("it needs at least one schema");
                    }
                    if keyword == "oneOf" && options > MAX_ONE_OF {
                        return at.refuse(format_args!("more than {MAX_ONE_OF} options; use anyOf"));
                    }
                    out.insert(keyword.clone(), parts);
                    costs.push(Cost::choice(options, Cost::under(part_costs.into_iter())));
                }
                "enum" => {
                    let values = self.values(value, object.get("type"), &at)?;
                    costs.push(Cost {
                        size: 1,
                        width: values.len(),
                    });
                    out.insert(keyword.clone(), Value::Array(values));
                }
                "const" => {
                    self.count_values(value, &at)?;
                    out.insert(keyword.clone(), value.clone());
                }
                "properties" | "patternProperties" => {
                    let (named, part_costs) = self.named(keyword, value, &below)?;
                    out.insert(keyword.clone(), named);
                    own.extend(part_costs);
                }
                "items" if value.is_array() => {
                    let (parts, part_costs) = self.list(value, &below)?;
                    out.insert(keyword.clone(), parts);
                    own.extend(part_costs);
                }
                "prefixItems" => {
                    let (parts, part_costs) = self.list(value, &below)?;
                    out.insert(keyword.clone(), parts);
                    own.extend(part_costs);
                }
                "items" | "additionalItems" | "additionalProperties" => {
                    let (part, cost) = self.schema(value, &below)?;
                    out.insert(keyword.clone(), part);
                    own.push(cost);
                }
                "unevaluatedProperties" if num_compositions > 0 => {
                    return at.refuse("it is not supported beside allOf, anyOf, oneOf or $ref");
                }
                "unevaluatedProperties" if object.contains_key("additionalProperties") => {}
                "unevaluatedProperties" => {
                    let (part, cost) = self.schema(value, &below)?;
                    out.insert("additionalProperties".into(), part);
                    own.push(cost);
                }
                "uniqueItems" if value != &Value::Bool(false) => {
                    return at.refuse("unique items cannot be enforced");
                }
                keyword if UNSUPPORTED.contains(&keyword) => return at.refuse("the keyword is not supported"),
                keyword if SIMPLE.contains(&keyword) => {
                    if let Some(value) = simple(keyword, value, &at)? {
                        out.insert(keyword.to_owned(), value);
                    }
                }
                // Annotations, and what no draft knows.
                _ => {}
            }
        }
        if drops_type(&out) {
            out.remove("type");
        }
        let names_required = out.get("required").and_then(Value::as_array).is_none_or(|names| {
            let properties = object.get("properties");
            names
                .iter()
                .filter_map(Value::as_str)
                .all(|name| properties.is_some_and(|named| named.get(name).is_some()))
        });
        let closed_by_default =
            !composed && num_compositions == 0 && names_required && object.contains_key("properties");
        let closed_by_option =
            self.close_all && (object.contains_key("properties") || object.contains_key("patternProperties"));
        if (closed_by_default && !object.contains_key("patternProperties") || closed_by_option)
            && !out.contains_key("additionalProperties")
        {
            out.insert("additionalProperties".into(), Value::Bool(false));
        }
        if !own.is_empty() || costs.is_empty() || is_constrained {
            costs.push(Cost::under(own.into_iter()));
        }
        let cost = Cost::all(&costs);
        if cost.size > MAX_NODES {
            return place.refuse("its combinations are too many");
        }
        Ok((Value::Object(out), cost))
    }

    fn list(&mut self, value: &Value, place: &Place) -> Result<(Value, Vec<Cost>), GrammarError> {
        let Value::Array(list) = value else {
            return place.refuse("it must be a list of schemas");
        };
        let mut costs = Vec::with_capacity(list.len());
        let mut out = Vec::with_capacity(list.len());
        for (i, part) in list.iter().enumerate() {
            let (part, cost) = self.schema(part, &place.at(&i.to_string()))?;
            out.push(part);
            costs.push(cost);
        }
        Ok((Value::Array(out), costs))
    }

    fn named(&mut self, keyword: &str, value: &Value, place: &Place) -> Result<(Value, Vec<Cost>), GrammarError> {
        let Value::Object(named) = value else {
            return place.refuse("it must be an object of schemas");
        };
        let are_patterns = keyword == "patternProperties";
        if are_patterns && named.len() > MAX_PATTERN_PROPERTIES {
            return place.refuse(format_args!("more than {MAX_PATTERN_PROPERTIES} patterns"));
        }
        if named.len() > MAX_PROPERTIES {
            return place.refuse(format_args!("more than {MAX_PROPERTIES} properties"));
        }
        let mut costs = Vec::with_capacity(named.len());
        let mut out = Map::new();
        for (name, part) in named {
            let at = place.at(name);
            if are_patterns {
                check_pattern(name, &at)?;
            }
            let (part, cost) = self.schema(part, &at)?;
            out.insert(name.clone(), part);
            costs.push(cost);
        }
        Ok((Value::Object(out), costs))
    }

    /// Follows a reference the first time.
    fn reference(&mut self, value: &Value, place: &Place) -> Result<(Value, Cost), GrammarError> {
        let Value::String(reference) = value else {
            return place.refuse("a reference must be a string");
        };
        let Some(pointer) = reference.strip_prefix('#') else {
            return place.refuse("only references within the schema (\"#/…\") are followed");
        };
        let pointer = percent_decoded(pointer);
        let pointer = if pointer == "/" { String::new() } else { pointer };
        let root = self.root;
        let Some(target) = root.pointer(&pointer) else {
            return place.refuse(format_args!("{:?} leads nowhere", shortened(reference)));
        };
        let key = (pointer, place.composed, place.copied);
        let (id, cost) = match self.defs.get(&key) {
            Some(&known) => known,
            None => {
                let id = self.prepared.len();
                self.defs.insert(key.clone(), (id, None));
                self.prepared.push(Value::Bool(true));
                let at = Place {
                    path: format!("#{}", key.0),
                    ..place.clone()
                };
                let (prepared, cost) = self.schema(target, &at)?;
                self.prepared[id] = prepared;
                self.defs.insert(key, (id, Some(cost)));
                (id, Some(cost))
            }
        };
        // A loop of copies is found by the compiler.
        let cost = if place.copied {
            cost.unwrap_or(Cost::ONE)
        } else {
            Cost::ONE
        };
        Ok((format!("#/$defs/{}", def_name(id)).into(), cost))
    }

    /// The values of an `enum` that `type` allows.
    fn values(&mut self, value: &Value, of_type: Option<&Value>, place: &Place) -> Result<Vec<Value>, GrammarError> {
        let Value::Array(values) = value else {
            return place.refuse("it must be a list of values");
        };
        if values.is_empty() {
            return place.refuse("it must have at least one value");
        }
        for value in values {
            self.count_values(value, place)?;
        }
        let of_type = |value: &&Value| of_type.is_none_or(|types| has_type(value, types));
        let values: Vec<Value> = values.iter().filter(of_type).cloned().collect();
        if values.is_empty() {
            return place.refuse("none of its values has the schema's type");
        }
        Ok(values)
    }

    fn count_values(&mut self, value: &Value, place: &Place) -> Result<(), GrammarError> {
        self.num_enum_values += 1;
        if self.num_enum_values > MAX_ENUM_VALUES {
            return place.refuse(format_args!("more than {MAX_ENUM_VALUES} values"));
        }
        match value {
            Value::Array(list) => list.iter().try_for_each(|value| self.count_values(value, place)),
            Value::Object(object) => object.values().try_for_each(|value| self.count_values(value, place)),
            _ => Ok(()),
        }
    }
}

fn def_name(id: usize) -> String {
    format!("r{id}")
}

/// A step of a JSON pointer.
fn escape(step: &str) -> String {
    step.replace('~', "~0").replace('/', "~1")
}

fn percent_decoded(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, after @ ..] = rest {
        let hex = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        let decoded = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match decoded {
            Some(decoded) if *byte == b'%' => {
                out.push(decoded);
                rest = &after[2..];
            }
            _ => {
                out.push(*byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn shortened(text: &str) -> String {
    const MAX_CHARS: usize = 200;
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
