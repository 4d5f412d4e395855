//! Every request field of vLLM's routes that are served here, and what becomes of it: for refusals, which say why, and for
//! docs/compatibility.md, which is made from the same table.

use std::fmt::Write as _;
use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::ApiError;

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    serde_json::from_str(include_str!("fields.json")).unwrap_or_else(|error| unreachable!("fields.json: {error}"))
});

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    requests: Vec<RequestFields>,
    /// Fields that several requests have.
    groups: Map<String, Value>,
}

/// The fields of one request type.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestFields {
    /// vLLM's name of the type.
    name: String,
    /// The routes that take it.
    routes: Vec<String>,
    /// A smallest body that gets a 200.
    #[cfg_attr(not(test), allow(dead_code, reason = "tests send it"))]
    body: Map<String, Value>,
    fields: Vec<FieldRow>,
    /// Of the table's `groups`.
    #[serde(default)]
    also: Vec<String>,
}

/// What this server does with a field.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    /// As vLLM.
    Same,
    /// As vLLM, and more.
    Better,
    /// As vLLM for some values; others are refused.
    InPart,
    /// Read, without effect.
    Accepted,
    /// 400 by name.
    Refused,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Verdict::Same => "same",
            Verdict::Better => "better",
            Verdict::InPart => "in part",
            Verdict::Accepted => "accepted",
            Verdict::Refused => "refused",
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FieldRow {
    name: String,
    here: Verdict,
    /// Same, better, in part: what is worth saying. Accepted: why it has no effect. Refused: why.
    #[serde(default)]
    text: String,
    /// A value that means something: 400 that names the field where it is refused, else 200. Absent: part of `body`.
    #[cfg_attr(not(test), allow(dead_code, reason = "tests send it"))]
    example: Option<Value>,
    /// Fields that the example needs beside it.
    #[serde(default)]
    #[cfg_attr(not(test), allow(dead_code, reason = "tests send it"))]
    with: Map<String, Value>,
}

impl Table {
    /// The rows of a request, those of its groups last.
    fn rows(&self, request: &RequestFields) -> Vec<FieldRow> {
        let mut rows = request.fields.clone();
        for group in &request.also {
            let group: Vec<FieldRow> = self
                .groups
                .get(group)
                .and_then(|rows| serde_json::from_value(rows.clone()).ok())
                .unwrap_or_else(|| unreachable!("fields.json: the group {group}"));
            rows.extend(group);
        }
        rows
    }
}

/// The error for a field that vLLM honours and this server does not.
pub fn refused(field: &str) -> ApiError {
    let mut rows = TABLE.requests.iter().flat_map(|request| TABLE.rows(request));
    let row = rows.find(|row| row.name == field && row.here != Verdict::Same);
    let why = row.map_or(String::new(), |row| format!(": {}", row.text));
    ApiError::invalid(field, format!("`{field}` is not supported by this server{why}"))
}

/// A request that has one field more than it needs, and what its table says of it.
#[cfg(test)]
#[derive(Clone, Debug)]
pub struct Example {
    pub route: String,
    pub field: String,
    pub body: Value,
    pub refused: bool,
}

/// One request for every field of every route.
#[cfg(test)]
pub fn examples() -> Vec<Example> {
    let mut examples = Vec::new();
    for request in &TABLE.requests {
        for row in TABLE.rows(request) {
            let mut body = request.body.clone();
            body.extend(row.with);
            if let Some(example) = row.example {
                body.insert(row.name.clone(), example);
            }
            assert!(
                body.contains_key(&row.name),
                "{}.{} has no example",
                request.name,
                row.name
            );
            examples.extend(request.routes.iter().map(|route| Example {
                route: route.clone(),
                field: row.name.clone(),
                body: Value::Object(body.clone()),
                refused: row.here == Verdict::Refused,
            }));
        }
    }
    examples
}

/// What stands before and after the generated part of docs/compatibility.md.
pub const BEGIN: &str = "<!-- request fields: generated from src/server/fields.json -->\n";
pub const END: &str = "<!-- end of request fields -->\n";

/// The document's part on request fields.
pub fn markdown() -> String {
    let mut out = String::from(BEGIN);
    out += "## Request fields\n\nEvery field of vLLM's request types, and what becomes of it. Same: as in vLLM. Better: as in \
            vLLM, and more. In part: for the values named. Accepted: read, without effect. Refused: 400 that names the \
            field. Fields that are in no table are ignored, as in vLLM (`best_of` among them).\n";
    for request in &TABLE.requests {
        let routes: Vec<String> = request.routes.iter().map(|route| format!("`{route}`")).collect();
        // Writing into a string cannot fail.
        let _ = write!(
            out,
            "\n### {}\n\n{}\n\n| field | here | |\n|---|---|---|\n",
            request.name,
            routes.join(", ")
        );
        for row in TABLE.rows(request) {
            let text = row.text.replace('|', "\\|");
            let _ = writeln!(out, "| `{}` | {} | {text} |", row.name, row.here.word());
        }
    }
    out + END
}

#[cfg(test)]
mod tests;
