//! Specifications that are meant to hurt.

use super::*;

#[test]
fn bombs_are_refused_or_compiled_but_never_stall() {
    let chain: serde_json::Map<String, Value> = (0..3_000)
        .map(|i| {
            (
                format!("d{i}"),
                json!({"type": "object", "properties": {"n": {"$ref": format!("#/$defs/d{}", i + 1)}}}),
            )
        })
        .chain([("d3000".to_owned(), json!({"type": "null"}))])
        .collect();
    let doubling: serde_json::Map<String, Value> = (0..40)
        .map(|i| {
            let next = json!({"type": "object", "$ref": format!("#/$defs/d{}", i + 1)});
            (
                format!("d{i}"),
                json!({"type": "object", "properties": {"a": next, "b": next}}),
            )
        })
        .chain([("d40".to_owned(), json!({"type": "object"}))])
        .collect();
    let mut deep = json!({"type": "integer"});
    for _ in 0..120 {
        deep = json!({"type": "array", "items": deep});
    }
    let any = |n: usize, at: usize| -> Vec<Value> { (0..n).map(|i| json!({"minimum": at * n + i})).collect() };
    let many = |n: usize| -> Vec<String> { (0..n).map(|i| format!("value number {i}")).collect() };
    let wide: serde_json::Map<String, Value> = (0..12_000)
        .map(|i| (format!("p{i}"), json!({"type": "string"})))
        .collect();
    let brackets = "(".repeat(100_000);
    let loops = json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}});
    let siblings = json!({"$ref": "#", "type": "object", "properties": {"a": {"$ref": "#"}}});
    for (name, kind) in [
        (
            "chain of references",
            schema(json!({"$ref": "#/$defs/d0", "$defs": chain})),
        ),
        (
            "doubling references",
            schema(json!({"$ref": "#/$defs/d0", "$defs": doubling})),
        ),
        ("deep", schema(deep)),
        (
            "product",
            schema(json!({"allOf": (0..8).map(|i| json!({"anyOf": any(9, i)})).collect::<Vec<_>>()})),
        ),
        ("reference loop", schema(loops)),
        ("reference to itself", schema(siblings)),
        ("enum", schema(json!({"enum": many(100_000)}))),
        ("large enum", schema(json!({"enum": many(10_000)}))),
        ("oneOf", schema(json!({"oneOf": any(5_000, 0)}))),
        ("wide", schema(json!({"type": "object", "properties": wide}))),
        ("4 MB", schema(json!({"description": "x".repeat(4 << 20)}))),
        (
            "repeats",
            schema(json!({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"})),
        ),
        ("backtracking", schema(json!({"type": "string", "pattern": "^(a+)+b$"}))),
        (
            "pattern and minLength",
            schema(json!({"type": "string", "pattern": "^(ab|a)*$", "minLength": 8000})),
        ),
        (
            "multiple",
            schema(json!({"type": "number", "multipleOf": 0.000123, "minimum": -1e14})),
        ),
        (
            "array",
            schema(json!({"type": "array", "minItems": 4000, "items": {"type": "array", "minItems": 4000}})),
        ),
        ("regex nesting", GrammarKind::Regex(brackets.clone())),
        (
            "regex repeats",
            GrammarKind::Regex("((((a{100}){100}){100}){100}){100}".into()),
        ),
        ("regex alternatives", GrammarKind::Regex("(x|xx|xxx)*".repeat(500))),
        ("choices", GrammarKind::Choice(many(50_000))),
        ("ebnf nesting", GrammarKind::Grammar(format!("root ::= {brackets}"))),
        ("lark nesting", GrammarKind::Grammar(format!("start: {brackets}"))),
        (
            "ebnf chain",
            GrammarKind::Grammar(
                (0..4_000).fold("root ::= r0".to_owned(), |text, i| {
                    format!("{text}\nr{i} ::= r{}", i + 1)
                }) + "\nr4000 ::= \"a\"",
            ),
        ),
        (
            "lark chain",
            GrammarKind::Grammar(
                (0..9_000).fold("start: A0".to_owned(), |text, i| format!("{text}\nA{i}: A{}", i + 1))
                    + "\nA9000: \"a\"",
            ),
        ),
        (
            "ambiguous",
            GrammarKind::Grammar("root ::= root root | root root root | \"a\" | \"\"".into()),
        ),
    ] {
        let before = std::time::Instant::now();
        match compile(kind) {
            // A few tokens of it, too.
            Ok(grammar) => {
                let mut state = ConstraintState::new(&Constraint {
                    grammar,
                    start: Start::Now,
                });
                for _ in 0..40 {
                    let Ok(mask) = state.mask() else { break };
                    let Some(token) = (0..EOS).find(|&token| allows(&mask, token)) else {
                        break;
                    };
                    if state.push(token).is_err() {
                        break;
                    }
                }
                eprintln!("{name}: compiled, {:?}", before.elapsed());
            }
            Err(error) => {
                assert!(error.len() < 700 && !error.contains("backtrace"), "{name}: {error}");
                eprintln!("{name}: {error}, {:?}", before.elapsed());
            }
        }
    }
}
