//! Structural tags: text with constrained parts, in llguidance's Lark.
//!
//! # Source
//! xgrammar's `structural_tag` formats as vLLM takes them, and the older `structures` with `triggers`.

use serde_json::{Map, Value, json};

use super::{GrammarError, GrammarOptions, ebnf, lark, schema};

/// Deepest nesting of formats, and most of them.
const MAX_DEPTH: usize = 32;
const MAX_FORMATS: usize = 2_000;

/// A Lark grammar with a rule `start`.
///
/// # Errors
/// Malformed, or a format that cannot be enforced; the path is in the message.
pub(super) fn to_lark(tag: &Value, options: &GrammarOptions) -> Result<String, GrammarError> {
    let format = match (tag.get("format"), tag.get("structures")) {
        (Some(format), _) => format.clone(),
        (None, Some(_)) => from_legacy(tag)?,
        (None, None) => return Err(refusal("", "it needs `format`, or `structures` and `triggers`")),
    };
    let mut translation = Translation {
        options,
        rules: Vec::new(),
        num_formats: 0,
    };
    let start = translation.format(&format, "/format", 0, true)?;
    translation.rules.insert(0, format!("start: {start}"));
    Ok(translation.rules.join("\n"))
}

fn refusal(path: &str, what: impl std::fmt::Display) -> GrammarError {
    GrammarError::invalid(format!("the structural tag cannot be used, at #{path}: {what}"))
}

/// `{structures: [{begin, schema, end}], triggers}` as the format it stands for.
fn from_legacy(tag: &Value) -> Result<Value, GrammarError> {
    let Some(structures) = tag["structures"].as_array() else {
        return Err(refusal("/structures", "it must be a list"));
    };
    let tags: Vec<Value> = structures
        .iter()
        .map(|structure| {
            let schema = match &structure["schema"] {
                Value::Null => json!(true),
                schema => schema.clone(),
            };
            json!({
                "begin": structure["begin"],
                "content": {"type": "json_schema", "json_schema": schema},
                "end": structure["end"],
            })
        })
        .collect();
    Ok(json!({"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}))
}

struct Translation<'a> {
    options: &'a GrammarOptions,
    rules: Vec<String>,
    num_formats: usize,
}

impl Translation<'_> {
    /// An expression. `is_last`: nothing follows, so free text needs no end.
    fn format(&mut self, format: &Value, path: &str, depth: usize, is_last: bool) -> Result<String, GrammarError> {
        self.num_formats += 1;
        if depth > MAX_DEPTH || self.num_formats > MAX_FORMATS {
            return Err(refusal(path, "it is too large or nested too deeply"));
        }
        let Value::Object(object) = format else {
            return Err(refusal(path, "a format must be an object"));
        };
        match object.get("type").and_then(Value::as_str) {
            Some("const_string") => Ok(lark::literal(text(object, "value", path)?)),
            Some("json_schema" | "qwen_xml_parameter") if object.get("style").is_some_and(|style| style != "json") => {
                Err(refusal(path, "only the style \"json\" is supported"))
            }
            Some("json_schema") => {
                let schema = object.get("json_schema").unwrap_or(&Value::Null);
                Ok(format!("%json {}", schema::prepare(schema, self.options)?))
            }
            Some("regex") => {
                let pattern = lark::without_anchors(text(object, "pattern", path)?);
                lark::check_regex(pattern).map_err(|error| refusal(path, error))?;
                Ok(lark::regex(pattern))
            }
            Some("grammar") => {
                let inner = ebnf::to_lark(text(object, "grammar", path)?, self.options)?;
                Ok(format!("%lark {{\n{inner}\n}}"))
            }
            Some("any_text") if is_last => Ok(lark::regex("(?s:.*)")),
            Some("any_text") => Err(refusal(path, "free text must come last, or in a tag with an end")),
            Some("sequence") => {
                let elements = list(object, "elements", path)?;
                let last = elements.len() - 1;
                let parts = elements.iter().enumerate().map(|(i, element)| {
                    let path = format!("{path}/elements/{i}");
                    self.format(element, &path, depth + 1, is_last && i == last)
                });
                Ok(format!("({})", parts.collect::<Result<Vec<_>, _>>()?.join(" ")))
            }
            Some("or") => {
                let elements = list(object, "elements", path)?;
                let parts = elements
                    .iter()
                    .enumerate()
                    .map(|(i, element)| self.format(element, &format!("{path}/elements/{i}"), depth + 1, is_last));
                Ok(format!("({})", parts.collect::<Result<Vec<_>, _>>()?.join(" | ")))
            }
            Some("tag") => self.tag(object, path, depth, ""),
            Some("triggered_tags") => self.triggered_tags(object, path, depth, is_last),
            Some("tags_with_separator") => self.tags_with_separator(object, path, depth),
            Some(kind) => Err(refusal(path, format_args!("the format {kind:?} is not supported"))),
            None => Err(refusal(path, "it needs a `type`")),
        }
    }

    /// Begin, content, end; without the `trigger` at its beginning, which the text before has taken.
    fn tag(
        &mut self,
        tag: &Map<String, Value>,
        path: &str,
        depth: usize,
        trigger: &str,
    ) -> Result<String, GrammarError> {
        let begin = text(tag, "begin", path)?;
        let Some(begin) = begin.strip_prefix(trigger) else {
            return Err(refusal(path, format_args!("no trigger is the beginning of {begin:?}")));
        };
        let ends: Vec<&str> = match tag.get("end") {
            Some(Value::String(end)) => vec![end],
            Some(Value::Array(ends)) => ends.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        if ends.is_empty() {
            return Err(refusal(path, "it needs an `end`"));
        }
        let content = tag.get("content").unwrap_or(&Value::Null);
        let path = format!("{path}/content");
        let rest = if content["type"] == "any_text" {
            if ends.contains(&"") {
                return Err(refusal(&path, "free text in a tag needs an end"));
            }
            let ends: Vec<String> = ends.iter().map(|end| lark::escaped(end)).collect();
            self.lazy(&format!("(?s:.*)({})", ends.join("|")))
        } else {
            let content = self.format(content, &path, depth + 1, false)?;
            let ends: Vec<String> = ends.iter().map(|end| lark::literal(end)).collect();
            format!("{content} ({})", ends.join(" | "))
        };
        Ok(format!("({} {rest})", lark::literal(begin)))
    }

    /// Free text; what begins with a trigger must be one of the tags.
    fn triggered_tags(
        &mut self,
        format: &Map<String, Value>,
        path: &str,
        depth: usize,
        is_last: bool,
    ) -> Result<String, GrammarError> {
        if !is_last {
            return Err(refusal(path, "triggered tags must come last: free text surrounds them"));
        }
        if format
            .get("excludes")
            .and_then(Value::as_array)
            .is_some_and(|list| !list.is_empty())
        {
            return Err(refusal(path, "`excludes` is not supported"));
        }
        let triggers = list(format, "triggers", path)?;
        let triggers: Vec<&str> = triggers
            .iter()
            .filter_map(Value::as_str)
            .filter(|text| !text.is_empty())
            .collect();
        if triggers.len() != list(format, "triggers", path)?.len() {
            return Err(refusal(path, "triggers must be texts that are not empty"));
        }
        let tags = list(format, "tags", path)?;
        let mut of_trigger: Vec<Vec<String>> = vec![Vec::new(); triggers.len()];
        for (i, tag) in tags.iter().enumerate() {
            let path = format!("{path}/tags/{i}");
            let Value::Object(tag) = tag else {
                return Err(refusal(&path, "a tag must be an object"));
            };
            let begin = text(tag, "begin", &path)?;
            let which = triggers
                .iter()
                .position(|trigger| begin.starts_with(trigger))
                .unwrap_or(0);
            let tag = self.tag(tag, &path, depth + 1, triggers[which])?;
            of_trigger[which].push(tag);
        }
        let mut triggered = Vec::new();
        for (trigger, tags) in triggers.iter().zip(of_trigger).filter(|(_, tags)| !tags.is_empty()) {
            // Text up to the first trigger, and the trigger.
            let text = self.lazy(&format!("(?s:.*){}", lark::escaped(trigger)));
            triggered.push(format!("({text} ({}))", tags.join(" | ")));
        }
        let any = triggers
            .iter()
            .map(|trigger| lark::escaped(trigger))
            .collect::<Vec<_>>()
            .join("|");
        let tail = format!("TAIL{}", self.rules.len());
        self.rules.push(format!("{tail}: /(?s:.+)/ & ~/(?s:.*)({any})(?s:.*)/"));
        let at_least_one = format.get("at_least_one") == Some(&Value::Bool(true));
        let only_one = format.get("stop_after_first") == Some(&Value::Bool(true));
        let tags = triggered.join(" | ");
        Ok(match (at_least_one, only_one) {
            (true, true) => format!("({tags})"),
            (false, true) => format!("(({tags}) | ({tail})?)"),
            (true, false) => format!("(({tags})+ ({tail})?)"),
            (false, false) => format!("(({tags})* ({tail})?)"),
        })
    }

    fn tags_with_separator(
        &mut self,
        format: &Map<String, Value>,
        path: &str,
        depth: usize,
    ) -> Result<String, GrammarError> {
        let separator = lark::literal(text(format, "separator", path)?);
        let tags = list(format, "tags", path)?;
        let tags = tags.iter().enumerate().map(|(i, tag)| {
            let path = format!("{path}/tags/{i}");
            match tag {
                Value::Object(tag) => self.tag(tag, &path, depth + 1, ""),
                _ => Err(refusal(&path, "a tag must be an object")),
            }
        });
        let tags = tags.collect::<Result<Vec<_>, _>>()?.join(" | ");
        let many = if format.get("stop_after_first") == Some(&Value::Bool(true)) {
            format!("({tags})")
        } else {
            format!("(({tags}) ({separator} ({tags}))*)")
        };
        Ok(if format.get("at_least_one") == Some(&Value::Bool(true)) {
            many
        } else {
            format!("({many})?")
        })
    }

    /// A rule for the shortest text that matches.
    fn lazy(&mut self, pattern: &str) -> String {
        let name = format!("lazy{}", self.rules.len());
        self.rules.push(format!("{name}[lazy]: {}", lark::regex(pattern)));
        name
    }
}

fn text<'a>(object: &'a Map<String, Value>, key: &str, path: &str) -> Result<&'a str, GrammarError> {
    object
        .get(key)
        .and_then(Value::as_str)
        .ok_or_else(|| refusal(path, format_args!("it needs a text `{key}`")))
}

fn list<'a>(object: &'a Map<String, Value>, key: &str, path: &str) -> Result<&'a [Value], GrammarError> {
    object
        .get(key)
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .filter(|list| !list.is_empty())
        .ok_or_else(|| refusal(path, format_args!("it needs a list `{key}`")))
}
