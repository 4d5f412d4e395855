use proptest::prelude::*;
use serde_json::Value;

use super::*;

fn parse(text: &str) -> Option<Vec<ToolCall>> {
    let mut list = CallList::default();
    text.chars().for_each(|c| list.push(c));
    Some(list.finish(text)?.into_iter().map(|read| read.call).collect())
}

/// The arguments of the only call of `[f(ARGUMENTS)]`.
fn arguments(arguments: &str) -> Option<String> {
    let mut calls = parse(&format!("[f({arguments})]"))?;
    assert_eq!(calls.len(), 1, "{arguments}");
    calls.pop().map(|call| call.arguments)
}

#[test]
fn python_values_read_as_json() {
    // Expectations by CPython 3.12: json.dumps(value, ensure_ascii=False).
    for (python, json) in [
        (
            r"'\x41\101\u00e9\U0001F600\d\
'",
            r#""AAé😀\\d""#,
        ),
        (r"'\ud83d\ude00'", r#""😀""#),
        (r#"r'a\n\'b'"#, r#""a\\n\\'b""#),
        (r#"'''a'b''c\''''"#, r#""a'b''c'""#),
        (r#""""x"""  'y' "z""#, r#""xyz""#),
        ("f'{{}}'", r#""{}""#),
        ("''", r#""""#),
        ("'\u{7f}\u{1}\\b\\f'", "\"\u{7f}\\u0001\\b\\f\""),
        ("1e16", "1e+16"),
        ("1e15", "1000000000000000.0"),
        ("0.00001", "1e-05"),
        ("0.0001", "0.0001"),
        ("1.", "1.0"),
        (".5", "0.5"),
        ("- 1.5", "-1.5"),
        ("-0", "0"),
        ("-0.0", "-0.0"),
        ("0b101", "5"),
        ("0o17", "15"),
        ("0xe+0", ""),
        ("1_000.5", "1000.5"),
        ("()", "[]"),
        ("(1,)", "[1]"),
        ("((1))", "1"),
        ("({'a': (1, 2)}, [3,],)", r#"[{"a": [1, 2]}, [3]]"#),
        ("{(1, 2), 'x'}", r#"[[1, 2], "x"]"#),
        ("{{1}}", "[[1]]"),
        (
            "{1: 'a', 1.0: 'b', None: 2, 1.5: 3, False: 4}",
            r#"{"1": "b", "null": 2, "1.5": 3, "false": 4}"#,
        ),
        ("{'a': {'b': 1}, 'a': [2]}", r#"{"a": [2]}"#),
        ("[1, # one\n 2]", "[1, 2]"),
        ("[1, \\\n2]", "[1, 2]"),
    ] {
        let expected = if json.is_empty() {
            None
        } else {
            Some(format!("{{\"a\": {json}}}"))
        };
        assert_eq!(arguments(&format!("a={python}")), expected, "{python}");
    }
}

#[test]
fn what_is_no_literal_is_no_call() {
    for python in [
        "x",
        "x.y",
        "g()",
        "1+2",
        "--1",
        "-True",
        "-'a'",
        "b'x'",
        "f'{x}'",
        "f'}'",
        "'\\N{DASH}'",
        "'\\xg1'",
        "'\\U00110000'",
        "1j",
        "1__0",
        "1_",
        "0xg",
        "1e",
        "..",
        "...",
        "[1 2]",
        "[,]",
        "(,)",
        "{,}",
        "{'a'}:1",
        "{'a':}",
        "{'a': 1, 'b'}",
        "{'a', 'b': 1}",
        "{[1]: 2}",
        "{-1: 2}",
        "{null: 2}",
        "{**{}}",
        "[*[]]",
        "lambda: 1",
        "not True",
        "'a",
        "[1)",
        "$",
        "",
        ",",
    ] {
        assert_eq!(arguments(&format!("a={python}")), None, "{python}");
    }
    for text in [
        "",
        "f()",
        "[f]",
        "[f()",
        "f()]",
        "[f()]]",
        "[f() g()]",
        "[f(),,]",
        "[f.()]",
        "[.f()]",
        "[f(a=1 b=2)]",
        "[f(a=1, 2)]",
        "[f(*[1])]",
        "[f(,)]",
        "[f()] x",
        "[f()];",
        "[1]",
    ] {
        assert_eq!(parse(text), None, "{text}");
    }
}

#[test]
fn positional_arguments_are_dropped_without_a_trace() {
    assert_eq!(
        arguments("1, 'x', [2, {'a': (3,)}], name, -4, a={5}, **{'b': 6},").unwrap(),
        r#"{"a": [5], "null": {"b": 6}}"#
    );
    assert_eq!(arguments("name").unwrap(), "{}");
}

#[test]
fn a_broken_string_closes_at_the_only_quote_that_reads() {
    assert_eq!(arguments("a='it's', b=2").unwrap(), r#"{"a": "it's", "b": 2}"#);
    assert_eq!(arguments("a=''x' y'").unwrap(), r#"{"a": "'x' y"}"#);
    assert_eq!(
        arguments("a=\"say \"hi\" to\nme\"").unwrap(),
        r#"{"a": "say \"hi\" to\nme"}"#
    );
    // Two readings: "x 'y" with b, or all of it.
    assert_eq!(arguments("a='x 'y', b='z'"), None);
    // More quotes than are tried.
    assert_eq!(arguments(&format!("a='x 'y {}'", "', ".repeat(MAX_READINGS))), None);
}

#[test]
fn depth_is_bounded() {
    for (open, close) in [
        ("[", "]"),
        ("(", ")"),
        ("{", "}"),
        ("{'a': ", "}"),
        ("(1, ", ")"),
        ("[f(a=", ")]"),
    ] {
        let nested = |depth: usize| arguments(&format!("a={}1{}", open.repeat(depth), close.repeat(depth)));
        assert_eq!(nested(MAX_DEPTH - 1).is_some(), open != "[f(a=", "{open}");
        assert_eq!(nested(MAX_DEPTH), None, "{open}");
        assert_eq!(nested(200_000), None, "{open}");
    }
}

#[test]
fn work_is_linear_in_the_text() {
    let long = 20_000;
    for text in [
        format!("[f(a='{}')]", "x ".repeat(long)),
        format!("[f(a='{}", " ".repeat(long)),
        format!("[f(a='{}')]", "\\'".repeat(long)),
        format!("[f(a='{}", "', '".repeat(long)),
        format!("[f(a='b'c{}')]", "', ".repeat(long)),
        format!("[f(a={}", "{".repeat(long)),
        format!("[{}]", "f(a=1),".repeat(long)),
        format!("[f(a={})]", "9".repeat(long)),
        format!("[f({})]", "a=1,".repeat(long)),
    ] {
        let before = STEPS.get();
        let _ = parse(&text);
        let steps = STEPS.get() - before;
        // One pass, and one for each quote that the repair tries, with its escapes.
        assert!(
            steps <= (2 * MAX_READINGS + 1) * text.len(),
            "{steps} steps for {} bytes",
            text.len()
        );
        if !text.contains("', ") {
            assert_eq!(steps, text.chars().count());
        }
    }
}

/// A value's JSON and one of its Python spellings.
fn python(value: &Value, choice: u32) -> String {
    match value {
        Value::Null => ["None", "null"][choice as usize % 2].into(),
        Value::Bool(true) => ["True", "true"][choice as usize % 2].into(),
        Value::Bool(false) => ["False", "false"][choice as usize % 2].into(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => {
            let quote = ['\'', '"'][choice as usize % 2];
            let escaped = text.replace('\\', "\\\\").replace(quote, &format!("\\{quote}"));
            format!("{quote}{escaped}{quote}")
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(|item| python(item, choice / 2)).collect();
            format!("[ {} ]", items.join(" ,"))
        }
        Value::Object(entries) => {
            let entries: Vec<String> = entries
                .iter()
                .map(|(key, value)| {
                    format!(
                        "{}: {}",
                        python(&Value::String(key.clone()), choice),
                        python(value, choice / 2)
                    )
                })
                .collect();
            format!("{{{}}}", entries.join(", "))
        }
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>()
            .prop_filter("finite", |x| x.is_finite())
            .prop_map(Value::from),
        ".*".prop_map(Value::from),
        "['\"\\\\ \n,)\\]}]{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((".{0,4}", inner), 0..4)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn json_values_survive_python(value in any_value(), choice: u32) {
        let got = arguments(&format!("a={}", python(&value, choice))).unwrap();
        let got: Value = serde_json::from_str(&got).unwrap();
        prop_assert_eq!(&got["a"], &value);
    }

    #[test]
    fn any_text_is_read_or_refused(text in r#"[\[\](){}'",:=.a1\\ \n#*+f-]{0,40}"#) {
        let mut list = CallList::default();
        let mut shown = vec![];
        for c in text.chars() {
            list.push(c);
            list.settle();
            for (index, call) in list.calls().iter().enumerate() {
                if index == shown.len() {
                    shown.push(String::new());
                }
                // What may be sent only grows.
                prop_assert!(call.settled().starts_with(&shown[index]));
                shown[index] = call.settled().to_owned();
            }
        }
        for read in list.finish(&text).into_iter().flatten() {
            for arguments in [read.call.arguments, read.streamed] {
                let arguments = arguments.replace("1e999", "1");
                prop_assert!(serde_json::from_str::<Value>(&arguments).unwrap().is_object());
            }
        }
    }

    #[test]
    fn call_lists_of_any_pieces_are_read_or_refused(
        pieces in prop::collection::vec(prop::sample::select(vec![
            "f(", "a=", "'x'", "\"y\"", "1", "-2.5", "None", ", ", ")", "[", "]", "{", "}", ": ", "(", "'it's'", "**", "f'", "#\n", "0x1F",
        ]), 0..24),
    ) {
        let text = format!("[{}]", pieces.concat());
        for call in parse(&text).into_iter().flatten() {
            prop_assert!(serde_json::from_str::<Value>(&call.arguments).unwrap().is_object(), "{}", call.arguments);
        }
    }
}
