use proptest::prelude::*;

use super::super::marker::SCANNED;
use super::super::tool::ToolCall;
use super::super::{cases, reasoning, tool};
use super::*;

const START: &str = "<|tool_call_start|>";
const END: &str = "<|tool_call_end|>";

/// Markers found as text, no token ids: what the cut can spoil most.
fn parser(thinking: bool, tools: bool) -> AssistantParser {
    let prompt = Prompt {
        text: "<|im_start|>assistant\n",
        token_ids: &[],
        enable_thinking: thinking,
        also_end: &[],
    };
    let reasoning = (reasoning::find("qwen3").unwrap().new)(&prompt, &|_| None);
    let tool = tool::find("lfm2", &|_| Some(0)).unwrap();
    AssistantParser::new(Some(reasoning), tools.then(|| (tool.new)()), true)
}

/// Pieces in, everything out: content and reasoning as a stream shows them, the calls as streamed, the blocks.
#[derive(Debug, Default, PartialEq)]
struct Sum {
    content: String,
    reasoning: String,
    streamed: Vec<ToolCall>,
    block: Option<ToolBlock>,
}

fn read<'a>(mut parser: AssistantParser, pieces: impl IntoIterator<Item = &'a str>) -> Sum {
    let mut sum = Sum::default();
    let mut parts: Vec<AssistantDelta> = pieces.into_iter().flat_map(|piece| parser.push(piece, &[])).collect();
    parts.extend(parser.finish());
    for part in parts {
        match part {
            AssistantDelta::Content(text) => sum.content += &text,
            AssistantDelta::Reasoning(text) => sum.reasoning += &text,
            AssistantDelta::ToolCallStart { index, name } => {
                assert_eq!(index, sum.streamed.len());
                sum.streamed.push(ToolCall {
                    name,
                    arguments: String::new(),
                });
            }
            AssistantDelta::ToolCallArguments { index, arguments } => sum.streamed[index].arguments += &arguments,
            AssistantDelta::ToolBlock(block) => {
                assert!(sum.block.is_none(), "only the first block counts");
                sum.content += block.stream_content().unwrap_or("");
                sum.block = Some(block);
            }
        }
    }
    sum
}

fn call(name: &str, arguments: &str) -> ToolCall {
    ToolCall {
        name: name.into(),
        arguments: arguments.into(),
    }
}

#[test]
fn echoes_are_dropped_and_other_text_is_not() {
    let after = |text: &str| {
        let text = format!("{START}[f()]{END}{text}");
        let whole = read(parser(false, true), [text.as_str()]);
        assert_eq!(read(parser(false, true), cases::pieces(&text)), whole, "{text}");
        assert_eq!(whole.streamed, [call("f", "{}")]);
        whole.content
    };
    assert_eq!(after(&format!("\n[f()]{END}\n[f()]{END} ok")), " ok");
    assert_eq!(after(&format!(" {START}[g()]{END}")), "");
    assert_eq!(after(&format!("a {START}[g()]{END} b")), "a  b");
    assert_eq!(after(&format!("a {START}[g()")), format!("a {START}[g()"));
    assert_eq!(after("[f("), "[f(");
    assert_eq!(after(" <|tool_call"), " <|tool_call");
    assert_eq!(after("\n\n"), "\n\n");
    assert_eq!(after("<b>"), "<b>");
    assert_eq!(after(END), "");
}

#[test]
fn nothing_follows_an_unreadable_block_but_content() {
    let text = format!("a{START}oops{END}b{START}[f()]{END}</think>");
    let sum = read(parser(false, true), [text.as_str()]);
    assert_eq!((sum.content, sum.streamed), (text.clone(), vec![]));
    assert_eq!(sum.block, Some(ToolBlock::Invalid(format!("{START}oops{END}"))));
}

#[test]
fn a_stream_never_contradicts_itself() {
    // The first call was sent as it stood; the second can be read only at the end of the block.
    let text = format!("{START}[f(a='1', a='longer'), g(c='x 'y' z')]{END}");
    let sum = read(parser(false, true), cases::pieces(&text));
    assert_eq!(
        sum.streamed,
        [call("f", r#"{"a": "1"}"#), call("g", r#"{"c": "x 'y' z"}"#)]
    );
    let whole = vec![call("f", r#"{"a": "longer"}"#), call("g", r#"{"c": "x 'y' z"}"#)];
    assert_eq!(sum.block, Some(ToolBlock::Calls(whole)));
    // What stands behind a doubtful string is not sent before the end decides.
    for rest in [", b='q'r', c=1)]", ", t=(1, 12))]|'z', c=1)]"] {
        let text = format!("{START}[f(a='x'f'z'{rest}{END}");
        let sum = read(parser(false, true), cases::pieces(&text));
        assert_eq!(sum.block, Some(ToolBlock::Calls(sum.streamed.clone())), "{text}");
        assert!(
            serde_json::from_str::<serde_json::Value>(&sum.streamed[0].arguments).is_ok(),
            "{text}"
        );
    }
    // Both in one call: what was begun is ended.
    let text = format!("{START}[f(a='one', b=2, a='x'y', c=3)]{END}");
    let sum = read(parser(false, true), cases::pieces(&text));
    assert_eq!(sum.streamed, [call("f", r#"{"a": "one", "b": 2, "c": 3}"#)]);
    let whole = vec![call("f", r#"{"a": "x'y", "b": 2, "c": 3}"#)];
    assert_eq!(sum.block, Some(ToolBlock::Calls(whole)));
}

#[test]
fn strings_stream_while_they_come() {
    let mut parser = parser(false, true);
    parser.push(&format!("{START}[say(text='one "), &[]);
    let arguments = |text: &str| AssistantDelta::ToolCallArguments {
        index: 0,
        arguments: text.into(),
    };
    assert_eq!(parser.push("two", &[]), [arguments(" two")]);
    assert_eq!(parser.push(" \\", &[]), []);
    assert_eq!(parser.push("n", &[]), [arguments(" \\n")]);
    assert_eq!(parser.push("'", &[]), []);
    assert_eq!(parser.push(")", &[]), [arguments("\"}")]);
}

#[test]
fn calls_in_unclosed_reasoning_are_read_and_other_text_stays_reasoning() {
    let read = |text: &str| {
        let whole = read(parser(true, true), [text]);
        assert_eq!(self::read(parser(true, true), cases::pieces(text)), whole, "{text}");
        whole
    };
    let sum = read(&format!("<think>a {START}[f(x=1)]{END} b"));
    assert_eq!((sum.reasoning.as_str(), sum.content.as_str()), ("a  b", ""));
    assert_eq!(sum.streamed, [call("f", r#"{"x": 1}"#)]);
    for text in [
        format!("a {START}[f(x="),
        format!("a {START}no{END} b"),
        format!("a {START}"),
        "a <|tool".to_owned(),
    ] {
        let sum = read(&text);
        assert_eq!((sum.reasoning, sum.streamed, sum.block), (text, vec![], None));
    }
    let sum = read(&format!("a {START}[f()]{END} b</think>{START}[g()]{END}"));
    assert_eq!(sum.reasoning, format!("a {START}[f()]{END} b"));
    assert_eq!(sum.streamed, [call("g", "{}")]);
}

#[test]
fn a_marker_that_is_a_token_counts_only_as_that_token() {
    let token = |text: &str| {
        ["<think>", "</think>"]
            .iter()
            .zip(1..)
            .find_map(|(name, id)| (*name == text).then_some(id))
    };
    let prompt = Prompt {
        text: "",
        token_ids: &[],
        enable_thinking: true,
        also_end: &[],
    };
    let reasoning = (reasoning::find("qwen3").unwrap().new)(&prompt, &token);
    let mut parser = AssistantParser::new(Some(reasoning), None, true);
    let reasoning = |text: &str| AssistantDelta::Reasoning(text.into());
    // Spelled by other tokens it is text, and its beginning is not held back.
    assert_eq!(parser.push("a </th", &[7, 8]), [reasoning("a </th")]);
    assert_eq!(parser.push("ink>", &[9]), [reasoning("ink>")]);
    // The token may come before its text.
    assert_eq!(parser.push("", &[2]), []);
    assert_eq!(parser.push("</thi", &[10]), []);
    assert_eq!(parser.push("nk>b", &[]), [AssistantDelta::Content("b".into())]);
    assert_eq!(parser.reasoning_tokens(), 3);
}

/// Reads with the reasoning parser that a checkpoint gets without a flag.
fn read_detected(prompt: &str, text: &str) -> (String, String) {
    let special = ["<think>", "</think>"];
    let token = |text: &str| {
        special
            .iter()
            .zip(1..)
            .find_map(|(name, id)| (*name == text).then_some(id))
    };
    let entry = reasoning::detect("<think>", &token).unwrap();
    assert_eq!(entry.name, "lfm2");
    let prompt_ids: Vec<u32> = cases::pieces(prompt).into_iter().filter_map(token).collect();
    let prompt = Prompt {
        text: prompt,
        token_ids: &prompt_ids,
        enable_thinking: true,
        also_end: &[],
    };
    let ids: Vec<u32> = cases::pieces(text)
        .into_iter()
        .map(|piece| token(piece).unwrap_or(9))
        .collect();
    let mut sums = vec![];
    for (token, pieces) in [
        (&token as &dyn Fn(&str) -> Option<u32>, vec![(text, ids.as_slice())]),
        (&token, cases::pieces(text).into_iter().zip(ids.chunks(1)).collect()),
        (
            &|_: &str| None,
            text.split_inclusive(|_| true).map(|c| (c, &[][..])).collect(),
        ),
    ] {
        let mut parser = AssistantParser::new(Some((entry.new)(&prompt, token)), None, true);
        let mut parts: Vec<AssistantDelta> = pieces.iter().flat_map(|(text, ids)| parser.push(text, ids)).collect();
        parts.extend(parser.finish());
        let (mut reasoning, mut content) = (String::new(), String::new());
        for part in parts {
            match part {
                AssistantDelta::Reasoning(text) => reasoning += &text,
                AssistantDelta::Content(text) => content += &text,
                part => panic!("{part:?}"),
            }
        }
        sums.push((reasoning, content));
    }
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
    sums.remove(0)
}

#[test]
fn without_a_flag_only_opened_reasoning_is_reasoning() {
    let turn = "<|im_start|>assistant\n";
    let sum = |reasoning: &str, content: &str| (reasoning.to_owned(), content.to_owned());
    assert_eq!(read_detected(turn, "Hello!"), sum("", "Hello!"));
    assert_eq!(read_detected(turn, " \n"), sum("", " \n"));
    assert_eq!(read_detected(turn, " <thin"), sum("", " <thin"));
    assert_eq!(read_detected(turn, "\n<think>a</think> b"), sum("a", " b"));
    assert_eq!(read_detected(turn, "<think>a"), sum("a", ""));
    assert_eq!(read_detected(turn, "é <think>a"), sum("", "é <think>a"));
    assert_eq!(
        read_detected("<|im_start|>assistant\n<think>\n", "a</think>b"),
        sum("a", "b")
    );
    assert_eq!(
        read_detected("<|im_start|>assistant\n<think></think>", "<think>b"),
        sum("", "<think>b")
    );
    assert_eq!(read_detected("", "a"), sum("", "a"));
}

#[test]
fn work_is_linear_in_the_text() {
    let n = 4_000;
    for text in [
        "a ".repeat(n),
        "<".repeat(n),
        "<think>".repeat(n),
        "</think>".repeat(n),
        format!("</think>{}", START.repeat(n)),
        format!("</think>{}", END.repeat(n)),
        format!("</think>{START}{}", "<".repeat(n)),
        format!("</think>{START}[f()]{END}{}", " ".repeat(n)),
        format!("</think>{START}[f()]{END}{}", "[ ".repeat(n)),
        format!("</think>{START}[f()]{END}{}", format!("{START}{END}").repeat(n)),
        format!("</think>{START}[f()]{END}{}", format!("a {START}").repeat(n)),
        START.repeat(n),
        format!("{START}{}", "<|tool_call_".repeat(n)),
    ] {
        let mut counts = vec![];
        for pieces in [vec![text.as_str()], text.split_inclusive(|_| true).collect()] {
            let before = SCANNED.get();
            read(parser(true, true), pieces);
            counts.push(SCANNED.get() - before);
        }
        // Held beginnings are looked at again, each no longer than a marker; reasoning is looked at twice.
        assert!(
            counts.iter().all(|count| *count <= 40 * text.len()),
            "{counts:?} for {} bytes",
            text.len()
        );
    }
}

fn any_output() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "<think>",
        "</think>",
        "<tool_call>",
        START,
        END,
        "[f(a='x y')]",
        "[",
        "f(",
        "a=",
        "'",
        "x",
        "1",
        "}",
        "{",
        ")",
        "]",
        ", ",
        "<",
        "<|",
        " ",
        "\n",
        "é",
        "\\",
        "text",
    ]);
    prop::collection::vec(piece, 0..30).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn the_cut_changes_nothing(text in any_output(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6), thinking: bool) {
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).filter(|&at| text.is_char_boundary(at)).collect();
        at.sort();
        let mut pieces = vec![];
        let mut from = 0;
        for to in at.into_iter().chain([text.len()]) {
            pieces.push(&text[from..to]);
            from = to;
        }
        let mut whole = read(parser(thinking, true), [text.as_str()]);
        let mut cut = read(parser(thinking, true), pieces);
        if !matches!(whole.block, Some(ToolBlock::Calls(_))) {
            // How far a stream got into a call that is none depends on the cut, and so whether it calls it cut.
            (whole.streamed, cut.streamed) = (vec![], vec![]);
            if let (Some(ToolBlock::Cut(a) | ToolBlock::Invalid(a)), Some(ToolBlock::Cut(b) | ToolBlock::Invalid(b))) = (&whole.block, &cut.block) {
                prop_assert_eq!(a, b);
                (whole.block, cut.block) = (None, None);
                (whole.content, cut.content) = (String::new(), String::new());
            }
        }
        prop_assert_eq!(whole, cut);
    }

    #[test]
    fn complete_calls_are_valid_json_and_text_is_not_lost(text in any_output(), thinking: bool) {
        let sum = read(parser(thinking, true), text.split_inclusive(|_| true));
        match sum.block {
            Some(ToolBlock::Calls(calls)) => {
                prop_assert_eq!(calls.len(), sum.streamed.len());
                for call in calls.iter().chain(&sum.streamed) {
                    prop_assert!(serde_json::from_str::<serde_json::Value>(&call.arguments).unwrap().is_object());
                }
            }
            Some(ToolBlock::Cut(_)) => prop_assert!(!sum.streamed.is_empty()),
            _ => {
                let mut expected = text.clone();
                if thinking {
                    expected = expected.replace("</think>", "");
                    let open = expected.len() - text.split("</think>").skip(1).map(str::len).sum::<usize>();
                    let open = expected[..open].find("<tool_call>").unwrap_or(open);
                    expected = expected[..open].replace("<think>", "") + &expected[open..];
                }
                prop_assert_eq!(sum.reasoning + &sum.content, expected);
            }
        }
    }

    #[test]
    fn no_text_panics(text in ".*", bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        for text in [text, String::from_utf8_lossy(&bytes).into_owned()] {
            let block = format!("{START}[f(a={text}{END}");
            for text in [text, block] {
                read(parser(true, true), text.split_inclusive(|_| true));
            }
        }
    }
}
