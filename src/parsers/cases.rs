//! `compat-tests/goldens/parser-cases.json`: what vLLM made of model outputs, replayed against [`AssistantParser`].
//!
//! The file's `meta` explains its groups. Where we differ on purpose, [`differences`] gives our own expectation.
//! In streams an absent content and an empty one are the same here: the role chunk always carries `"content": ""`.

use serde_json::{Value, json};

use super::reasoning::Prompt;
use super::{AssistantDelta, AssistantParser, Parsers, ToolBlock, Turn};

const SENTINELS: [&str; 4] = ["<|tool_call_start|>", "<|tool_call_end|>", "<think>", "</think>"];

fn token_id(text: &str) -> Option<u32> {
    let special = ["<|im_start|>", "<|im_end|>"].into_iter().chain(SENTINELS);
    special.zip(1..).find_map(|(name, id)| (name == text).then_some(id))
}

/// Cases in which we differ from vLLM on purpose: `(group, id, our result)`. The result replaces the keys it names,
/// in a collected message and in a stream alike unless it says `nonstream` or `stream`.
fn differences() -> Vec<(&'static str, &'static str, Value)> {
    const CALL: &str = "lookup_stock";
    let acme = json!([{"name": CALL, "arguments": "{\"symbol\": \"ACME\"}"}]);
    let raw_block = |raw: &str| json!({"stream": {"content": raw}});
    vec![
        // A call inside an unclosed <think> is found.
        (
            "combined",
            "auto_call_without_think",
            json!({"both": {"reasoning": null, "tool_calls": acme, "finish_reason": "tool_calls"}}),
        ),
        (
            "combined",
            "auto_call_inside_unclosed_reasoning",
            json!({"both": {"reasoning": "I will call ", "tool_calls": acme, "finish_reason": "tool_calls"}}),
        ),
        // An unreadable block is content in a stream too; vLLM's stream loses it.
        (
            "combined",
            "auto_bad_call",
            raw_block("<|tool_call_start|>[ping(host=)]<|tool_call_end|>"),
        ),
        (
            "tool",
            "fstring_with_placeholder",
            raw_block("<|tool_call_start|>[say(text=f'hi {name}')]<|tool_call_end|>"),
        ),
        (
            "tool",
            "nested_quotes_ambiguous",
            raw_block("<|tool_call_start|>[run(cmd='a', 'b', flag='c')]<|tool_call_end|>"),
        ),
        (
            "tool",
            "variable_value",
            raw_block("<|tool_call_start|>[lookup_stock(symbol=ACME)]<|tool_call_end|>"),
        ),
        (
            "tool",
            "expression_value",
            raw_block("<|tool_call_start|>[calc(a=1+2)]<|tool_call_end|>"),
        ),
        (
            "tool",
            "bytes_value",
            raw_block("<|tool_call_start|>[say(text=b'raw')]<|tool_call_end|>"),
        ),
        (
            "tool",
            "call_as_value",
            raw_block("<|tool_call_start|>[outer(x=inner())]<|tool_call_end|>"),
        ),
        (
            "tool",
            "not_a_list",
            raw_block("<|tool_call_start|>ping()<|tool_call_end|>"),
        ),
        (
            "tool",
            "list_of_strings",
            raw_block("<|tool_call_start|>['ping']<|tool_call_end|>"),
        ),
        (
            "tool",
            "json_tool_call",
            raw_block("<|tool_call_start|>[{\"name\": \"ping\", \"arguments\": {}}]<|tool_call_end|>"),
        ),
        (
            "tool",
            "empty_block",
            raw_block("<|tool_call_start|>[]<|tool_call_end|>"),
        ),
        (
            "tool",
            "blank_block",
            raw_block("<|tool_call_start|>[ ]<|tool_call_end|>"),
        ),
        (
            "tool",
            "nothing_between",
            raw_block("<|tool_call_start|><|tool_call_end|>"),
        ),
        (
            "tool",
            "missing_end_truncated_name",
            raw_block("<|tool_call_start|>[boo"),
        ),
        ("tool", "only_start", raw_block("<|tool_call_start|>")),
        (
            "tool",
            "syntax_error",
            raw_block("<|tool_call_start|>[ping(host=)]<|tool_call_end|>"),
        ),
        (
            "tool",
            "unbalanced",
            raw_block("<|tool_call_start|>[ping(host='a']<|tool_call_end|>"),
        ),
        (
            "tool",
            "comment_in_block",
            raw_block("<|tool_call_start|>[ping() # note]<|tool_call_end|>"),
        ),
        // Adjacent string literals are one string in a stream too; vLLM's stops in the middle.
        (
            "tool",
            "implicit_string_concat",
            json!({"stream": {"tool_calls": [{"name": "say", "arguments": "{\"text\": \"abcd\"}"}]}}),
        ),
        // Text that began like an echo and was none is sent at the end; vLLM's stream loses it.
        (
            "tool",
            "trailing_bracket_no_second_end",
            json!({"stream": {"content": "[1] is the answer"}}),
        ),
        (
            "tool",
            "trailing_angle_no_second_end",
            json!({"stream": {"content": "<b>bold</b>"}}),
        ),
        // Text before a second block stays; vLLM drops it from whole answers and streams the block as text.
        (
            "tool",
            "two_blocks_text_between",
            json!({"nonstream": {"content": "and"}, "stream": {"content": " and "}}),
        ),
        // Infinity is written as a number that JSON has.
        (
            "tool",
            "float_specials",
            json!({"both": {"tool_calls": [{"name": "calc", "arguments": "{\"a\": 1e999}"}]}}),
        ),
        // A later </think> is dropped in streams as in whole answers.
        (
            "reasoning",
            "second_think_in_content",
            json!({"stream": {"content": "b<think>cd"}}),
        ),
        ("reasoning", "double_end", json!({"stream": {"content": "bc"}})),
    ]
}

/// Not ours yet or not ours at all.
fn is_left_out(case: &Value) -> bool {
    match case.pointer("/request/tool_choice") {
        // `required` and a named function constrain the output to JSON: no text protocol is involved. An explicit
        // null is refused or read as absent before a parser is chosen.
        Some(choice) => choice != "none" && choice != "auto",
        None => false,
    }
}

struct Replay {
    parser: AssistantParser,
    parts: Vec<AssistantDelta>,
    include_reasoning: bool,
}

/// The parser that the group's server makes for the case's request.
pub(crate) fn parser(group: &str, case: &Value) -> AssistantParser {
    let reasoning = matches!(group, "reasoning" | "combined").then_some("qwen3");
    let tool = (group != "reasoning").then_some("lfm2");
    let parsers = Parsers::resolve(
        Some(reasoning.unwrap_or("none")),
        Some(tool.unwrap_or("none")),
        "",
        &token_id,
    )
    .unwrap();
    let flag = |pointer: &str| case.pointer(pointer).and_then(Value::as_bool).unwrap_or(true);
    let default_tail = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n";
    let prompt = case["prompt_tail"].as_str().unwrap_or(default_tail);
    let no_tools = case.pointer("/request/tools").is_some_and(Value::is_null);
    let none = case
        .pointer("/request/tool_choice")
        .is_some_and(|choice| choice == "none");
    let turn = Turn {
        prompt: Prompt {
            text: prompt,
            token_ids: &ids(prompt),
            enable_thinking: flag("/chat_template_kwargs/enable_thinking"),
            also_end: &[],
        },
        parse_tools: !no_tools && !none,
        forced: None,
        parallel_tool_calls: flag("/request/parallel_tool_calls"),
    };
    parsers.assistant(&turn, &token_id)
}

/// Token ids of a text: one per piece.
pub(crate) fn ids(text: &str) -> Vec<u32> {
    pieces(text).iter().map(|piece| token_id(piece).unwrap_or(99)).collect()
}

impl Replay {
    fn new(group: &str, case: &Value) -> Self {
        let include_reasoning = case.pointer("/request/include_reasoning") != Some(&json!(false));
        Replay {
            parser: parser(group, case),
            parts: Vec::new(),
            include_reasoning,
        }
    }

    fn push(&mut self, text: &str) -> Value {
        let parts = self.parser.push(text, &ids(text));
        self.add(parts)
    }

    fn finish(&mut self) -> Value {
        let parts = self.parser.finish();
        self.add(parts)
    }

    fn add(&mut self, mut parts: Vec<AssistantDelta>) -> Value {
        if !self.include_reasoning {
            parts.retain(|part| !matches!(part, AssistantDelta::Reasoning(_)));
        }
        let delta = streamed(&parts);
        self.parts.extend(parts);
        delta
    }
}

/// Sentinels whole, everything else character by character: the file's finest cut.
pub(crate) fn pieces(text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let special = ["<|im_start|>", "<|im_end|>"]
            .into_iter()
            .chain(SENTINELS)
            .find(|name| rest.starts_with(name));
        let (piece, tail) = rest.split_at(special.map_or(c.len_utf8(), str::len));
        pieces.push(piece);
        rest = tail;
    }
    pieces
}

/// What a stream of the parts adds up to, in the file's form. Empty strings read as null.
fn streamed(parts: &[AssistantDelta]) -> Value {
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for part in parts {
        match part {
            AssistantDelta::Content(text) => content += text,
            AssistantDelta::Reasoning(text) => reasoning += text,
            AssistantDelta::ToolCallStart { index, name } => calls.push((*index, Some(name.clone()), String::new())),
            AssistantDelta::ToolCallArguments { index, arguments } => match calls.iter_mut().find(|c| c.0 == *index) {
                Some(call) => call.2 += arguments,
                None => calls.push((*index, None, arguments.clone())),
            },
            AssistantDelta::ToolBlock(block) => content += block.stream_content().unwrap_or(""),
        }
    }
    let null_if_empty = |text: String| {
        if text.is_empty() {
            Value::Null
        } else {
            Value::String(text)
        }
    };
    let calls: Vec<Value> = calls
        .into_iter()
        .map(|(_, name, arguments)| match name {
            Some(name) => json!({"name": name, "arguments": arguments}),
            None => json!({"arguments": arguments}),
        })
        .collect();
    json!({"content": null_if_empty(content), "reasoning": null_if_empty(reasoning), "tool_calls": calls})
}

/// An expectation in the same form.
fn normal(expected: &Value) -> Value {
    let text = |key: &str| match expected[key].as_str() {
        None | Some("") => Value::Null,
        Some(text) => text.into(),
    };
    let calls: Vec<Value> = expected["tool_calls"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|call| {
            let mut call = call.clone();
            for key in ["index", "id", "type"] {
                call.as_object_mut().unwrap().remove(key);
            }
            call
        })
        .collect();
    json!({"content": text("content"), "reasoning": text("reasoning"), "tool_calls": calls})
}

pub(crate) fn expected(group: &str, case: &Value, mode: &str) -> Value {
    let mut value = case
        .get(mode)
        .or_else(|| case.get("stream_incremental"))
        .unwrap_or(&Value::Null)
        .clone();
    for (of_group, id, ours) in differences() {
        if of_group == group && case["id"] == id {
            for changed in [&ours["both"], &ours[mode]].into_iter().filter_map(Value::as_object) {
                value.as_object_mut().unwrap().extend(changed.clone());
            }
        }
    }
    value
}

pub(crate) fn each_case(mut check: impl FnMut(&str, &Value)) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/compat-tests/goldens/parser-cases.json");
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    for group in ["tool", "reasoning", "tool_only", "combined"] {
        file[group]
            .as_array()
            .unwrap()
            .iter()
            .filter(|case| !is_left_out(case))
            .for_each(|case| check(group, case));
    }
}

/// What must not depend on the cut: all but how far a stream got into a call before its block proved unreadable.
fn certain(parts: &[AssistantDelta]) -> Value {
    let mut value = streamed(parts);
    if parts
        .iter()
        .any(|part| matches!(part, AssistantDelta::ToolBlock(ToolBlock::Invalid(_))))
    {
        value["tool_calls"] = json!("unreadable");
    }
    value
}

fn replay<'a>(group: &str, case: &Value, pieces: impl IntoIterator<Item = &'a str>) -> Replay {
    let mut replay = Replay::new(group, case);
    for piece in pieces {
        replay.push(piece);
    }
    replay.finish();
    replay
}

#[test]
fn streams_add_up_to_vllms() {
    let mut wrong = Vec::new();
    each_case(|group, case| {
        let input = case["input"].as_str().unwrap();
        let got = streamed(&replay(group, case, pieces(input)).parts);
        let want = normal(&expected(group, case, "stream"));
        if got != want {
            wrong.push(format!("{group}/{}\n  got  {got}\n  want {want}", case["id"]));
        }
    });
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn explicit_chunks_give_vllms_deltas() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    each_case(|group, case| {
        for chunks in case["stream_chunks"].as_array().into_iter().flatten() {
            let mut replay = Replay::new(group, case);
            let pieces: Vec<&str> = chunks["pieces"]
                .as_array()
                .unwrap()
                .iter()
                .filter_map(Value::as_str)
                .collect();
            let mut got: Vec<Value> = pieces.iter().map(|piece| replay.push(piece)).collect();
            got.push(replay.finish());
            let mut want: Vec<Value> = chunks["deltas"].as_array().unwrap().iter().map(normal).collect();
            want.resize(got.len(), normal(&Value::Null));
            if case["id"] == "trailing_bracket_no_second_end" {
                *want.last_mut().unwrap() = normal(&json!({"content": "[1] is the answer"}));
            }
            seen += 1;
            if got != want {
                wrong.push(format!("{group}/{}\n  got  {got:?}\n  want {want:?}", case["id"]));
            }
        }
    });
    assert!(seen > 15);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_cut_gives_the_same() {
    each_case(|group, case| {
        let input = case["input"].as_str().unwrap();
        let whole = certain(&replay(group, case, [input]).parts);
        assert_eq!(
            certain(&replay(group, case, pieces(input)).parts),
            whole,
            "{group}/{}",
            case["id"]
        );
        for (at, _) in input.char_indices() {
            // Ids come with the first piece that holds their text; a cut sentinel has none, so give them all at once.
            let mut replay = Replay::new(group, case);
            let (head, tail) = input.split_at(at);
            let first = replay.parser.push(head, &ids(input));
            replay.add(first);
            let second = replay.parser.push(tail, &[]);
            replay.add(second);
            replay.finish();
            assert_eq!(certain(&replay.parts), whole, "{group}/{} cut at {at}", case["id"]);
        }
    });
}

#[test]
fn every_cut_gives_the_same_without_marker_tokens() {
    each_case(|group, case| {
        let input = case["input"].as_str().unwrap();
        let run = |pieces: &[&str]| {
            let mut replay = Replay::new(group, case);
            // A vocabulary without the markers: they are found as text.
            let reasoning = matches!(group, "reasoning" | "combined").then(|| super::reasoning::find("qwen3").unwrap());
            let prompt = Prompt {
                text: case["prompt_tail"].as_str().unwrap_or("<|im_start|>assistant\n"),
                token_ids: &[],
                enable_thinking: case.pointer("/chat_template_kwargs/enable_thinking") != Some(&json!(false)),
                also_end: &[],
            };
            let tools = replay
                .parser
                .parses_tools()
                .then(|| (super::tool::find("lfm2", &token_id).unwrap().new)());
            let parallel = case.pointer("/request/parallel_tool_calls") != Some(&json!(false));
            replay.parser = AssistantParser::new(reasoning.map(|r| (r.new)(&prompt, &|_| None)), tools, parallel);
            for piece in pieces {
                replay.push(piece);
            }
            replay.finish();
            certain(&replay.parts)
        };
        let want = run(&[input]);
        assert_eq!(
            want["content"],
            normal(&expected(group, case, "stream"))["content"],
            "{group}/{}",
            case["id"]
        );
        let characters: Vec<&str> = input.split("").filter(|piece| !piece.is_empty()).collect();
        assert_eq!(run(&characters), want, "{group}/{}", case["id"]);
        for (at, _) in input.char_indices() {
            assert_eq!(
                run(&[&input[..at], &input[at..]]),
                want,
                "{group}/{} cut at {at}",
                case["id"]
            );
        }
    });
}

#[test]
fn reasoning_tokens_are_counted() {
    each_case(|group, case| {
        let Some(want) = case["nonstream"]["reasoning_tokens"].as_u64() else {
            return;
        };
        let got = replay(group, case, pieces(case["input"].as_str().unwrap()))
            .parser
            .reasoning_tokens();
        assert_eq!(got > 0, want > 0, "{group}/{}", case["id"]);
    });
}

/// The block's end tells the calls as a collected message has them.
#[test]
fn blocks_end_with_vllms_whole_result() {
    each_case(|group, case| {
        let want = normal(&expected(group, case, "nonstream"))["tool_calls"].clone();
        let replay = replay(group, case, [case["input"].as_str().unwrap()]);
        let calls: Vec<Value> = replay
            .parts
            .iter()
            .filter_map(|part| match part {
                AssistantDelta::ToolBlock(ToolBlock::Calls(calls)) => Some(calls),
                _ => None,
            })
            .flatten()
            .map(|call| json!({"name": call.name, "arguments": call.arguments}))
            .collect();
        assert_eq!(Value::from(calls), want, "{group}/{}", case["id"]);
    });
}
