mod bombs;
mod cost;
mod properties;

use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};

use super::*;

/// Every byte, some longer tokens, two markers; the last one is EOS.
fn words() -> Vec<(Vec<u8>, bool)> {
    let mut words: Vec<(Vec<u8>, bool)> = (0..=255_u8).map(|byte| (vec![byte], false)).collect();
    for text in [
        "{\"", "\": ", "\",", "123", "true", "  ", "\n  ", "ab", "abc", "</", ">\"",
    ] {
        words.push((text.into(), false));
    }
    words.push((b"<think>".to_vec(), true));
    words.push((b"</think>".to_vec(), true));
    words.push((b"<|im_end|>".to_vec(), true));
    words
}

const OPEN: u32 = 267;
const CLOSE: u32 = 268;
const EOS: u32 = 269;

fn compiler() -> &'static GrammarCompiler {
    static COMPILER: OnceLock<GrammarCompiler> = OnceLock::new();
    COMPILER.get_or_init(fresh_compiler)
}

fn fresh_compiler() -> GrammarCompiler {
    let words = words();
    assert_eq!(words.len(), EOS as usize + 1);
    let vocabulary = Vocabulary::new(words.len(), &[EOS], |id| {
        let (bytes, is_added) = &words[id as usize];
        (bytes, *is_added)
    });
    GrammarCompiler::new(&vocabulary).unwrap()
}

fn compile(kind: GrammarKind) -> Result<Arc<Grammar>, String> {
    compiler()
        .compile(&GrammarSpec::new(kind))
        .map_err(|error| error.to_string())
}

fn start(kind: GrammarKind) -> ConstraintState {
    ConstraintState::new(&Constraint {
        grammar: compile(kind).unwrap(),
        start: Start::Now,
    })
}

fn allows(mask: &[u32], token: u32) -> bool {
    mask[token as usize / 32] & (1 << (token % 32)) != 0
}

/// Whether the text, byte by byte, may be the whole output.
fn accepts(kind: &GrammarKind, text: &str) -> bool {
    let mut state = start(kind.clone());
    for byte in text.bytes() {
        if !allows(&state.mask().unwrap(), u32::from(byte)) {
            return false;
        }
        state.push(u32::from(byte)).unwrap();
    }
    allows(&state.mask().unwrap(), EOS)
}

/// Samples among what is allowed until EOS, as a model at a high temperature does. None when it does not end.
fn sample(kind: GrammarKind, seed: u64, max_tokens: usize) -> Option<String> {
    let words = words();
    let mut state = start(kind);
    let mut random = seed;
    let mut text = Vec::new();
    for _ in 0..max_tokens {
        let mask = state.mask().unwrap();
        let allowed: Vec<u32> = (0..=EOS).filter(|&token| allows(&mask, token)).collect();
        assert!(!allowed.is_empty(), "after {:?}", String::from_utf8_lossy(&text));
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let token = allowed[(random >> 33) as usize % allowed.len()];
        state.push(token).unwrap();
        if token == EOS {
            assert!(state.is_complete());
            return Some(String::from_utf8(text).expect("output is UTF-8"));
        }
        text.extend_from_slice(&words[token as usize].0);
    }
    None
}

fn schema(schema: Value) -> GrammarKind {
    GrammarKind::JsonSchema(schema)
}

fn person() -> GrammarKind {
    schema(json!({
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"]
    }))
}

#[test]
fn a_schema_is_met_and_objects_have_what_it_names() {
    for text in [
        r#"{"name":"a","age":3}"#,
        r#"{"name": "é\n", "age": 150}"#,
        "{\n  \"name\": \"a\",\n  \"age\": 0\n}",
    ] {
        assert!(accepts(&person(), text), "{text}");
    }
    for text in [
        r#"{"name":"a"}"#,
        r#"{"age":3,"name":"a"}"#,
        r#"{"name":"a","age":151}"#,
        r#"{"name":"a","age":3,"more":1}"#,
        r#"{"name":"a",   "age":3}"#,
        r#"["name"]"#,
    ] {
        assert!(!accepts(&person(), text), "{text}");
    }
}

#[test]
fn white_space_is_as_the_options_say() {
    let accepts = |options: GrammarOptions, text: &str| {
        let spec = GrammarSpec {
            kind: person(),
            options,
        };
        let grammar = compiler().compile(&spec).unwrap();
        let mut state = ConstraintState::new(&Constraint {
            grammar,
            start: Start::Now,
        });
        text.bytes()
            .all(|byte| allows(&state.mask().unwrap(), u32::from(byte)) && state.push(u32::from(byte)).is_ok())
    };
    let compact = || GrammarOptions {
        disable_any_whitespace: true,
        ..GrammarOptions::default()
    };
    assert!(accepts(compact(), r#"{"name":"a b","age":3}"#));
    assert!(!accepts(compact(), r#"{"name": "a"#));
    let two = || GrammarOptions {
        whitespace_pattern: Some("[ ]{2}".into()),
        ..GrammarOptions::default()
    };
    assert!(accepts(two(), r#"{  "name"  :"a","#));
    assert!(!accepts(two(), "{\n"));
    let not_blank = GrammarSpec {
        kind: person(),
        options: GrammarOptions {
            whitespace_pattern: Some("x?".into()),
            ..GrammarOptions::default()
        },
    };
    assert!(
        compiler()
            .compile(&not_blank)
            .unwrap_err()
            .to_string()
            .contains("whitespace_pattern")
    );
    // Unbounded on paper, bounded in fact.
    let endless = GrammarOptions {
        whitespace_pattern: Some(r"[ \n]*".into()),
        ..GrammarOptions::default()
    };
    assert!(accepts(endless.clone(), &format!("{{{}", " ".repeat(64))));
    assert!(!accepts(endless, &format!("{{{}", " ".repeat(65))));
}

#[test]
fn additional_properties_follow_the_schema_and_the_option() {
    let open = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": true});
    assert!(accepts(&schema(open), r#"{"a":1,"b":[null]}"#));
    let free = json!({"type": "object"});
    assert!(accepts(&schema(free), r#"{"b":[null,{"c":1.5e3}]}"#));
    assert!(accepts(&GrammarKind::JsonObject, r#"{"b":[null,{"c":"x"}]}"#));
    assert!(!accepts(&GrammarKind::JsonObject, r"[1]"));
    // Parts of a composition do not close each other.
    let composed = json!({"allOf": [
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
    ]});
    assert!(accepts(&schema(composed), r#"{"a":1,"b":2}"#));
}

#[test]
fn references_are_followed() {
    let tree = json!({
        "$ref": "#/$defs/no~1de",
        "$defs": {"no/de": {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/no~1de"}, {"type": "null"}]}},
            "required": ["value", "next"]
        }}
    });
    assert!(accepts(&schema(tree), r#"{"value":1,"next":{"value":2,"next":null}}"#));
    let root = json!({"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}});
    assert!(accepts(&schema(root), r#"{"kids":[{"kids":[]},{}]}"#));
    let pydantic = json!({
        "type": "object",
        "properties": {"color": {"allOf": [{"$ref": "#/definitions/Color"}], "description": "which"}},
        "required": ["color"],
        "definitions": {"Color": {"type": "string", "enum": ["red", "blue"], "title": "Color"}}
    });
    assert!(accepts(&schema(pydantic.clone()), r#"{"color":"blue"}"#));
    assert!(!accepts(&schema(pydantic), r#"{"color":"green"}"#));
}

#[test]
fn refusals_name_the_place() {
    let at = |part: Value| json!({"type": "object", "properties": {"a": {"type": "array", "items": part}}});
    for (part, expected) in [
        (json!({"not": {}}), "#/properties/a/items/not"),
        (
            json!({"type": "array", "uniqueItems": true}),
            "#/properties/a/items/uniqueItems",
        ),
        (json!({"type": "strin"}), "#/properties/a/items/type"),
        (
            json!({"$ref": "http://example.com/x.json"}),
            "#/properties/a/items/$ref",
        ),
        (json!({"$ref": "#/nowhere"}), "#/properties/a/items/$ref"),
        (
            json!({"type": "string", "pattern": "(?=x)"}),
            "#/properties/a/items/pattern",
        ),
        (
            json!({"type": "string", "pattern": "("}),
            "#/properties/a/items/pattern",
        ),
        (
            json!({"type": "number", "multipleOf": 1e-12}),
            "#/properties/a/items/multipleOf",
        ),
        (json!({"type": "string", "minLength": 9}), ""),
        (
            json!({"type": "string", "minLength": 1_000_000_000}),
            "#/properties/a/items/minLength",
        ),
        (
            json!({"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 3, "maxLength": 2}}),
            "",
        ),
        (json!({"enum": []}), "#/properties/a/items/enum"),
        (json!({"enum": [1], "type": "string"}), "#/properties/a/items/enum"),
        (
            json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}),
            "#/properties/a/items",
        ),
        (json!({"oneOf": [{"type": "integer"}, {"type": "string"}]}), ""),
        (
            json!({"type": "object", "patternProperties": {"^a": {}, "a$": {}}}),
            "#/properties/a/items",
        ),
        (json!(7), "#/properties/a/items"),
        (json!({"type": "string", "format": "of-its-own"}), ""),
        (json!({"anyOf": []}), "#/properties/a/items/anyOf"),
        (json!({"minItems": -1}), "#/properties/a/items/minItems"),
    ] {
        match compile(schema(at(part.clone()))) {
            Ok(_) => assert_eq!(expected, "", "{part} was compiled"),
            Err(message) => {
                assert!(!expected.is_empty(), "{part}: {message}");
                assert!(message.contains(&format!("at {expected}:")), "{part}: {message}");
            }
        }
    }
    let overlapping = json!({"oneOf": [{"type": "integer"}, {"type": "number"}]});
    assert!(compile(schema(overlapping)).unwrap_err().contains("use anyOf"));
    assert!(compile(schema(json!(false))).is_err());
    assert!(compile(schema(json!(true))).is_ok());
    assert!(compile(schema(json!({}))).is_ok());
    assert!(compile(schema(json!([]))).is_err());
}

#[test]
fn regular_expressions_and_choices_match_the_whole() {
    let digits = GrammarKind::Regex(r"^\d{2,3}(/x)?$".into());
    assert!(accepts(&digits, "12") && accepts(&digits, "123/x"));
    assert!(!accepts(&digits, "1") && !accepts(&digits, "1234"));
    let choice = GrammarKind::Choice(vec!["yes".into(), "yes, but \"no\"\n".into(), "né".into()]);
    for text in ["yes", "yes, but \"no\"\n", "né"] {
        assert!(accepts(&choice, text), "{text}");
    }
    assert!(!accepts(&choice, "ye"));
    assert!(
        compile(GrammarKind::Regex("(".into()))
            .unwrap_err()
            .contains("regular expression")
    );
    assert!(compile(GrammarKind::Regex("a(?!b)".into())).is_err());
    assert!(compile(GrammarKind::Choice(vec![])).is_err());
}

#[test]
fn ebnf_is_translated() {
    let sums = GrammarKind::Grammar(
        "root ::= sum\nsum ::= term (\" + \" term)* # a comment\nterm ::= number | \"(\" sum \")\"\nnumber ::= [1-9] [0-9]{0,2}"
            .into(),
    );
    for text in ["1", "12 + (3 + 456)", "((7))"] {
        assert!(accepts(&sums, text), "{text}");
    }
    for text in ["0", "1 + ", "(1", "1+2", "1234"] {
        assert!(!accepts(&sums, text), "{text}");
    }
    let left = GrammarKind::Grammar("root ::= root \"a\" | \"b\"".into());
    assert!(accepts(&left, "baaa") && !accepts(&left, "ab"));
    let regular = GrammarKind::Grammar("root ::= word+ \"end\"\nword ::= [a-z\\]\\x2d] \" \"?".into());
    assert!(accepts(&regular, "]- enend"));
    let optional = GrammarKind::Grammar("root ::= \"(\" inner? \")\"\ninner ::= [ab]* root [ab]*".into());
    assert!(accepts(&optional, "(a()b)") && accepts(&optional, "(())"));
    for (text, expected) in [
        ("root ::= missing", "\"missing\""),
        ("start ::= \"a\"", "\"root\""),
        ("root ::= \"a", "line 1"),
        ("root ::= \"a\"\nroot ::= \"b\"", "twice"),
        ("root ::= (\"a\"", "`)`"),
        ("root ::= [z-a]", "backwards"),
        ("root ::= \"a\"{3,1}", "repetition"),
        ("root ::= \"a\"\n7", "line 2"),
    ] {
        let error = compile(GrammarKind::Grammar(text.into())).unwrap_err();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn lark_is_taken_as_it_is() {
    let lark = GrammarKind::Grammar("start: \"a\" item+\nitem: /[0-9]/ \",\" | %json {\"type\": \"null\"}".into());
    assert!(accepts(&lark, "a1,null2,"));
    let refused = compile(GrammarKind::Grammar("start: %json {\"not\": {}}".into())).unwrap_err();
    assert!(refused.contains("#/not"), "{refused}");
    for text in [
        "",
        "start: nothing",
        "start: (\"a\"",
        "nonsense",
        "start: \"a\"\nstart: \"b\"",
    ] {
        assert!(compile(GrammarKind::Grammar(text.into())).is_err(), "{text}");
    }
}

#[test]
fn structural_tags_constrain_parts() {
    let legacy = GrammarKind::StructuralTag(json!({
        "type": "structural_tag",
        "structures": [
            {"begin": "<f=a>", "schema": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}, "end": "</f>"},
            {"begin": "<f=b>", "schema": {"type": "null"}, "end": "</f>"}
        ],
        "triggers": ["<f="]
    }));
    for text in [
        "",
        "free text < f",
        "say <f=a>{\"x\":1}</f> and <f=b>null</f>",
        "<f=b>null</f><f=b>null</f>",
    ] {
        assert!(accepts(&legacy, text), "{text}");
    }
    for text in ["<f=", "<f=c>", "<f=a>{}</f>", "a <f=b>1", "<f=b>null"] {
        assert!(!accepts(&legacy, text), "{text}");
    }
    let new = GrammarKind::StructuralTag(
        json!({"type": "structural_tag", "format": {"type": "sequence", "elements": [
            {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"},
            {"type": "or", "elements": [
                {"type": "const_string", "value": "no"},
                {"type": "json_schema", "json_schema": {"type": "integer"}},
                {"type": "regex", "pattern": "x+"},
                {"type": "grammar", "grammar": "root ::= \"(\" root? \")\""}
            ]}
        ]}}),
    );
    for text in ["<t>any < thing</t>no", "<t></t>42", "<t>a</t>xx", "<t>b</t>(())"] {
        assert!(accepts(&new, text), "{text}");
    }
    assert!(!accepts(&new, "<t>a</t>y"));
    let separated = GrammarKind::StructuralTag(json!({"format": {"type": "tags_with_separator", "separator": ";",
        "tags": [{"begin": "<", "content": {"type": "regex", "pattern": "[a-z]+"}, "end": ">"}], "at_least_one": true}}));
    assert!(accepts(&separated, "<a>;<b>") && !accepts(&separated, "") && !accepts(&separated, "<a>;"));
    for (tag, expected) in [
        (json!({"format": {"type": "any_tokens"}}), "#/format"),
        (
            json!({"format": {"type": "json_schema", "json_schema": {"not": {}}}}),
            "#/not",
        ),
        (json!({"structures": [], "triggers": []}), "triggers"),
        (
            json!({"structures": [{"begin": "a", "schema": {}, "end": "b"}], "triggers": ["c"]}),
            "#/format/tags/0",
        ),
        (json!(3), "format"),
    ] {
        let error = compile(GrammarKind::StructuralTag(tag.clone())).unwrap_err();
        assert!(error.contains(expected), "{tag}: {error}");
    }
}

#[test]
fn markers_are_not_text() {
    let mut state = start(GrammarKind::Regex("[^x]*".into()));
    let mask = state.mask().unwrap();
    assert!(allows(&mask, u32::from(b'<')) && !allows(&mask, OPEN) && allows(&mask, EOS));
}

#[test]
fn reasoning_comes_first_where_there_is_some() {
    let grammar = compile(GrammarKind::Choice(vec!["ab".into()])).unwrap();
    let state = |start| {
        ConstraintState::new(&Constraint {
            grammar: grammar.clone(),
            start,
        })
    };
    let closed_by = |close: &[u32]| Reasoning {
        close: close.into(),
        ..Reasoning::default()
    };
    let mut after = state(Start::AfterReasoning(closed_by(&[CLOSE])));
    for token in [u32::from(b'z'), u32::from(b'q'), CLOSE] {
        assert!(allows(&after.mask().unwrap(), u32::from(b'z')));
        after.push(token).unwrap();
    }
    assert!(!allows(&after.mask().unwrap(), u32::from(b'z')) && allows(&after.mask().unwrap(), u32::from(b'a')));

    let may = || {
        state(Start::MayReason {
            open: OPEN,
            reasoning: closed_by(&[u32::from(b'<'), u32::from(b'/')]),
        })
    };
    let mut reasons = may();
    assert!(allows(&reasons.mask().unwrap(), OPEN) && allows(&reasons.mask().unwrap(), u32::from(b'a')));
    assert!(!allows(&reasons.mask().unwrap(), u32::from(b'z')));
    for token in [OPEN, u32::from(b'<'), u32::from(b'<'), u32::from(b'/')] {
        reasons.push(token).unwrap();
    }
    assert!(!allows(&reasons.mask().unwrap(), u32::from(b'z')));
    let mut answers = may();
    answers.push(u32::from(b'a')).unwrap();
    assert!(!allows(&answers.mask().unwrap(), OPEN) && allows(&answers.mask().unwrap(), u32::from(b'b')));
}

#[test]
fn reasoning_also_ends_with_the_turn_or_with_a_forced_call() {
    const CALL: u32 = b'!' as u32;
    let grammar = compile(GrammarKind::Choice(vec!["ab".into()])).unwrap();
    let state = |start: &Start, tokens: &[u32]| {
        let mut state = ConstraintState::new(&Constraint {
            grammar: grammar.clone(),
            start: start.clone(),
        });
        tokens.iter().for_each(|&token| state.push(token).unwrap());
        state
    };
    let begins = |mut state: ConstraintState| {
        let mask = state.mask().unwrap();
        !state.is_waiting() && allows(&mask, u32::from(b'a')) && !allows(&mask, u32::from(b'z'))
    };
    let reasoning = Reasoning {
        close: [CLOSE].into(),
        ..Reasoning::default()
    };
    let after = Start::AfterReasoning(reasoning.clone());
    assert!(state(&after, &[OPEN, CALL]).is_waiting());
    assert!(begins(state(&after, &[OPEN, CALL, EOS])));

    let forced = Reasoning {
        call: Some(CALL),
        ..reasoning.clone()
    };
    assert!(begins(state(&Start::AfterReasoning(forced.clone()), &[OPEN, CALL])));
    let may = Start::MayReason {
        open: OPEN,
        reasoning: forced,
    };
    assert!(allows(&state(&may, &[]).mask().unwrap(), CALL) && begins(state(&may, &[CALL])));
    assert!(begins(state(&may, &[OPEN, CALL])));

    let of_the_model = Start::AfterReasoning(Reasoning {
        call_end: Some(CALL),
        ..reasoning
    });
    assert!(begins(state(&of_the_model, &[OPEN, EOS])));
    assert!(state(&of_the_model, &[CALL, OPEN, EOS]).is_complete(), "it has called");
    assert!(begins(state(&of_the_model, &[CALL, CLOSE])));
}

#[test]
fn a_complete_grammar_leaves_eos_alone() {
    let mut state = start(GrammarKind::Choice(vec!["ab".into()]));
    state.push(u32::from(b'a')).unwrap();
    state.push(u32::from(b'b')).unwrap();
    let mask = state.mask().unwrap();
    assert_eq!(
        (0..=EOS).filter(|&token| allows(&mask, token)).collect::<Vec<_>>(),
        [EOS]
    );
    assert!(!state.is_complete());
    state.push(EOS).unwrap();
    assert!(state.is_complete());
}

#[test]
fn a_token_outside_the_mask_is_that_sequences_error() {
    let kind = GrammarKind::Choice(vec!["ab".into()]);
    let mut state = start(kind.clone());
    assert!(state.push(u32::from(b'z')).is_err());
    assert!(accepts(&kind, "ab"), "the grammar still serves others");
}

#[test]
fn numbers_and_strings_end() {
    let number = schema(json!({"type": "number"}));
    assert!(accepts(&number, &"1".repeat(30)));
    assert!(!accepts(&number, &"1".repeat(31)));
    assert!(accepts(&number, "1.5e12") && !accepts(&number, "1e123"));
    let string = schema(json!({"type": "string"}));
    let long = "a".repeat(guard::MAX_STRING_BYTES);
    assert!(accepts(&string, &format!("\"{long}\"")));
    assert!(!accepts(&string, &format!("\"{long}a\"")));
}

#[test]
fn grammars_are_remembered_and_the_oldest_forgotten() {
    let compiler = fresh_compiler();
    let spec = |i: usize| GrammarSpec::new(GrammarKind::Choice(vec![format!("text {i}")]));
    let first = compiler.compile(&spec(0)).unwrap();
    assert!(Arc::ptr_eq(&first, &compiler.compile(&spec(0)).unwrap()));
    for i in 1..600 {
        compiler.compile(&spec(i)).unwrap();
    }
    assert_eq!(compiler.num_cached(), 256);
    assert!(!Arc::ptr_eq(&first, &compiler.compile(&spec(0)).unwrap()));
    let compact = GrammarSpec {
        options: GrammarOptions {
            disable_any_whitespace: true,
            ..GrammarOptions::default()
        },
        ..spec(599)
    };
    let loose = compiler.compile(&spec(599)).unwrap();
    assert!(
        !Arc::ptr_eq(&loose, &compiler.compile(&compact).unwrap()),
        "options are part of the key"
    );
}

#[test]
fn a_grammar_that_hit_a_limit_is_compiled_anew() {
    let compiler = fresh_compiler();
    let spec = GrammarSpec::new(GrammarKind::JsonObject);
    let first = compiler.compile(&spec).unwrap();
    first.set_spent();
    assert!(!Arc::ptr_eq(&first, &compiler.compile(&spec).unwrap()));
}
