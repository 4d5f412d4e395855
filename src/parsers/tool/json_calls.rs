//! Calls that a grammar has forced: the whole text is JSON.
//!
//! `tool_choice: "required"` makes it an array of `{"name": …, "parameters": …}`, a named function its arguments alone.
//!
//! # Source
//! vLLM 0.33: a stream passes the arguments as the model wrote them, a whole answer of `required` writes them anew as
//! Python's `json.dumps` does. Differs from vLLM: text that breaks off, of which vLLM's whole answer keeps nothing, is content.

use serde_json::Value;

use super::{ToolBlock, ToolCall, ToolParser};
use crate::parsers::AssistantDelta;

/// Reads an array of calls.
#[derive(Default)]
pub(in crate::parsers) struct JsonCalls {
    text: String,
    scan: Scan,
    /// Calls begun in the stream.
    num_calls: usize,
}

/// Where in the array the text is.
#[derive(Default)]
struct Scan {
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// The string at the call's own level that is being read, quotes included.
    string: Option<String>,
    /// The key whose value comes or is being read.
    key: Option<String>,
    /// Between a key's colon and the end of its value.
    in_value: bool,
    /// The value of `parameters` has begun.
    in_arguments: bool,
}

/// The array, and the object of one call in it.
const CALL_DEPTH: usize = 2;

impl JsonCalls {
    fn read(&mut self, c: char, arguments: &mut String, out: &mut Vec<AssistantDelta>) {
        let scan = &mut self.scan;
        let at_call = scan.depth == CALL_DEPTH;
        if scan.in_string {
            if let Some(string) = &mut scan.string {
                string.push(c);
            }
            if scan.in_arguments {
                arguments.push(c);
            }
            match c {
                _ if scan.escaped => scan.escaped = false,
                '\\' => scan.escaped = true,
                '"' => {
                    scan.in_string = false;
                    let string = scan
                        .string
                        .take()
                        .and_then(|json| serde_json::from_str::<String>(&json).ok());
                    match string {
                        Some(key) if !scan.in_value => scan.key = Some(key),
                        Some(name) if scan.key.as_deref() == Some("name") => {
                            out.push(AssistantDelta::ToolCallStart {
                                index: self.num_calls,
                                name,
                            });
                            self.num_calls += 1;
                        }
                        _ => {}
                    }
                }
                _ => {}
            }
            return;
        }
        let ends_value = at_call && matches!(c, ',' | '}');
        if ends_value {
            (scan.in_value, scan.in_arguments, scan.key) = (false, false, None);
        }
        let begins_value = at_call && scan.in_value && !c.is_whitespace();
        if begins_value && scan.key.as_deref() == Some("parameters") && self.num_calls > 0 {
            scan.in_arguments = true;
        }
        // White space behind the arguments is none of theirs.
        if scan.in_arguments && !(at_call && c.is_whitespace()) {
            arguments.push(c);
        }
        match c {
            '"' => {
                scan.in_string = true;
                scan.string = (at_call && !scan.in_arguments).then(|| c.to_string());
            }
            ':' if at_call => scan.in_value = true,
            '{' | '[' => scan.depth += 1,
            '}' | ']' => scan.depth = scan.depth.saturating_sub(1),
            _ => {}
        }
    }

    fn send_arguments(&self, arguments: &mut String, out: &mut Vec<AssistantDelta>) {
        if !arguments.is_empty() {
            out.push(AssistantDelta::ToolCallArguments {
                index: self.num_calls.saturating_sub(1),
                arguments: std::mem::take(arguments),
            });
        }
    }
}

impl ToolParser for JsonCalls {
    fn push(&mut self, text: &str, out: &mut Vec<AssistantDelta>) {
        self.text.push_str(text);
        let mut arguments = String::new();
        for c in text.chars() {
            if c == '{' && self.scan.depth + 1 == CALL_DEPTH && !self.scan.in_string {
                self.send_arguments(&mut arguments, out);
            }
            self.read(c, &mut arguments, out);
        }
        self.send_arguments(&mut arguments, out);
    }

    fn finish(&mut self, out: &mut Vec<AssistantDelta>) {
        if self.text.is_empty() {
            return;
        }
        let raw = std::mem::take(&mut self.text);
        out.push(AssistantDelta::ToolBlock(match whole_calls(&raw) {
            Some(calls) => ToolBlock::Calls(calls),
            None if self.num_calls > 0 => ToolBlock::Cut(raw),
            None => ToolBlock::Invalid(raw),
        }));
    }

    fn start_marker(&self) -> Option<&'static str> {
        None
    }
}

fn whole_calls(text: &str) -> Option<Vec<ToolCall>> {
    let calls: Vec<Value> = serde_json::from_str(text).ok()?;
    calls
        .iter()
        .map(|call| {
            let mut arguments = String::new();
            write_spaced(call.get("parameters")?, &mut arguments);
            Some(ToolCall {
                name: call.get("name")?.as_str()?.to_owned(),
                arguments,
            })
        })
        .collect()
}

/// As `json.dumps(…, ensure_ascii=False)`: a blank after each comma and colon.
fn write_spaced(value: &Value, out: &mut String) {
    match value {
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_spaced(item, out);
            }
            out.push(']');
        }
        Value::Object(entries) => {
            out.push('{');
            for (i, (key, item)) in entries.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push_str(": ");
                write_spaced(item, out);
            }
            out.push('}');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

/// Takes the whole text as the arguments of one function.
pub(in crate::parsers) struct NamedCall {
    name: String,
    text: String,
}

impl NamedCall {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            text: String::new(),
        }
    }
}

impl ToolParser for NamedCall {
    fn push(&mut self, text: &str, out: &mut Vec<AssistantDelta>) {
        if text.is_empty() {
            return;
        }
        if self.text.is_empty() {
            out.push(AssistantDelta::ToolCallStart {
                index: 0,
                name: self.name.clone(),
            });
        }
        self.text.push_str(text);
        out.push(AssistantDelta::ToolCallArguments {
            index: 0,
            arguments: text.to_owned(),
        });
    }

    fn finish(&mut self, out: &mut Vec<AssistantDelta>) {
        if !self.text.is_empty() {
            let call = ToolCall {
                name: self.name.clone(),
                arguments: std::mem::take(&mut self.text),
            };
            out.push(AssistantDelta::ToolBlock(ToolBlock::Calls(vec![call])));
        }
    }

    fn start_marker(&self) -> Option<&'static str> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(parser: &mut dyn ToolParser, pieces: &[&str]) -> (Vec<(String, String)>, Vec<ToolBlock>) {
        let mut out = Vec::new();
        pieces.iter().for_each(|piece| parser.push(piece, &mut out));
        parser.finish(&mut out);
        let (mut calls, mut blocks) = (Vec::<(String, String)>::new(), Vec::new());
        for part in out {
            match part {
                AssistantDelta::ToolCallStart { index, name } => {
                    assert_eq!(index, calls.len());
                    calls.push((name, String::new()));
                }
                AssistantDelta::ToolCallArguments { index, arguments } => {
                    assert!(!arguments.is_empty());
                    calls[index].1 += &arguments;
                }
                AssistantDelta::ToolBlock(block) => blocks.push(block),
                other => panic!("{other:?}"),
            }
        }
        (calls, blocks)
    }

    fn cuts(text: &str) -> impl Iterator<Item = Vec<&str>> {
        let each: Vec<&str> = text.split_inclusive(|_: char| true).collect();
        let halves = text.char_indices().map(|(at, _)| vec![&text[..at], &text[at..]]);
        halves.chain([each, vec![text]])
    }

    #[test]
    fn calls_stream_as_written_and_are_collected_as_python_writes_them() {
        let text = "[{\"name\": \"f\", \"parameters\": {\"a\":[1,2],\"name\":\"x}\\\"]\"} },\n {\"name\":\"g\\u00e9\",\"parameters\":{}}]";
        for pieces in cuts(text) {
            let (calls, blocks) = run(&mut JsonCalls::default(), &pieces);
            let sent = [("f", "{\"a\":[1,2],\"name\":\"x}\\\"]\"}"), ("gé", "{}")];
            assert_eq!(
                calls,
                sent.map(|(name, json)| (name.to_owned(), json.to_owned())),
                "{pieces:?}"
            );
            let call = |name: &str, arguments: &str| ToolCall {
                name: name.into(),
                arguments: arguments.into(),
            };
            let whole = vec![call("f", "{\"a\": [1, 2], \"name\": \"x}\\\"]\"}"), call("gé", "{}")];
            assert_eq!(blocks, [ToolBlock::Calls(whole)]);
        }
    }

    #[test]
    fn what_breaks_off_is_kept_as_text() {
        let (calls, blocks) = run(
            &mut JsonCalls::default(),
            &["[{\"name\":\"f\",\"param", "eters\":{\"a\":"],
        );
        assert_eq!(calls, [("f".to_owned(), "{\"a\":".to_owned())]);
        assert_eq!(
            blocks,
            [ToolBlock::Cut("[{\"name\":\"f\",\"parameters\":{\"a\":".into())]
        );
        assert_eq!(
            run(&mut JsonCalls::default(), &["[{\"na"]).1,
            [ToolBlock::Invalid("[{\"na".into())]
        );
        assert_eq!(run(&mut JsonCalls::default(), &[]), (vec![], vec![]));
    }

    #[test]
    fn a_named_functions_text_is_its_arguments() {
        let (calls, blocks) = run(&mut NamedCall::new("f"), &["{\"a\"", "", ":1}"]);
        assert_eq!(calls, [("f".to_owned(), "{\"a\":1}".to_owned())]);
        assert!(matches!(&blocks[..], [ToolBlock::Calls(calls)] if calls[0].arguments == "{\"a\":1}"));
        assert_eq!(run(&mut NamedCall::new("f"), &[""]), (vec![], vec![]));
    }
}
