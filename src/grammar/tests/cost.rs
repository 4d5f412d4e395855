//! What masks cost on a vocabulary of LFM2's size.

use super::*;

/// As large as LFM2's, made of letters, digits and JSON's punctuation as byte-pair merges make them.
fn large_vocabulary() -> Vocabulary {
    let mut words: Vec<Vec<u8>> = (0..=255_u8).map(|byte| vec![byte]).collect();
    words.extend((0..1_100).map(|n| n.to_string().into_bytes()));
    for text in [
        "{\"", "\":", "\": ", "\",", "\"}", "},", "\": \"", "\", \"", "[{", "}]", "],", "\n\n", "\n  ", "    ",
    ] {
        words.push(text.into());
    }
    let mut random = 1_u64;
    while words.len() < (1 << 16) - 1 {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let mut bits = random >> 16;
        let mut word = if bits & 1 == 0 { b" ".to_vec() } else { Vec::new() };
        for _ in 0..2 + (bits >> 1) % 7 {
            bits = bits.rotate_right(7).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.push(b"etaoinshrdlucmfwypvbgkjqxzETAS"[(bits >> 33) as usize % 30]);
        }
        words.push(word);
    }
    words.push(b"<|im_end|>".to_vec());
    let eos = words.len() as u32 - 1;
    Vocabulary::new(words.len(), &[eos], |id| (&words[id as usize], id == eos))
}

/// Prints what a mask costs: `cargo test --release --lib mask_cost -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn mask_cost() {
    let before = std::time::Instant::now();
    let compiler = GrammarCompiler::new(&large_vocabulary()).unwrap();
    println!("tables of 65,536 tokens: {:.0?}", before.elapsed());
    let string = json!({"type": "string"});
    let item = json!({"type": "object", "properties": {
        "id": {"type": "integer"}, "title": string, "price": {"type": "number"}, "kind": {"enum": ["book", "film", "game"]},
        "tags": {"type": "array", "items": string, "maxItems": 8}
    }, "required": ["id", "title", "price", "kind", "tags"]});
    let limited = json!({"type": "object", "properties": {"code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        "note": {"type": "string", "maxLength": 200}}, "required": ["code", "note"]});
    println!(
        "{:<24} {:>10} {:>9} {:>9} {:>9}",
        "", "compile", "p50 µs", "p99 µs", "max µs"
    );
    for (name, kind) in [
        ("json_object", GrammarKind::JsonObject),
        (
            "list of records",
            schema(json!({"type": "array", "items": item, "minItems": 4, "maxItems": 8})),
        ),
        (
            "pattern, maxLength",
            schema(json!({"type": "array", "items": limited, "minItems": 4, "maxItems": 8})),
        ),
        ("regex", GrammarKind::Regex("([a-z ]+: [0-9]{1,5}\\n){20,60}".into())),
        (
            "choice of 500",
            GrammarKind::Choice((0..500).map(|i| format!("option number {i}")).collect()),
        ),
        (
            "EBNF",
            GrammarKind::Grammar(
                "root ::= (sum \"\\n\"){8,20}\nsum ::= term (\" + \" term)*\nterm ::= [0-9]+ | \"(\" sum \")\"".into(),
            ),
        ),
    ] {
        let before = std::time::Instant::now();
        let grammar = compiler.compile(&GrammarSpec::new(kind)).unwrap();
        let compile = before.elapsed();
        let (mut times, mut random) = (Vec::new(), 7_u64);
        // The first sequences build the lexer's states; later ones find them.
        for sequence in 0..24 {
            let mut state = ConstraintState::new(&Constraint {
                grammar: grammar.clone(),
                start: Start::Now,
            });
            for _ in 0..300 {
                let before = std::time::Instant::now();
                let Ok(mask) = state.mask() else { break };
                if sequence >= 4 {
                    times.push(before.elapsed());
                }
                let allowed: Vec<u32> = (0..mask.len() as u32 * 32).filter(|&id| allows(&mask, id)).collect();
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                // What closes is as likely as what goes on, so that records end.
                let token = match (random >> 40) % 3 {
                    0 => allowed[0],
                    _ => allowed[(random >> 33) as usize % allowed.len()],
                };
                if state.push(token).is_err() || state.is_complete() {
                    break;
                }
            }
        }
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1e6;
        println!(
            "{name:<24} {compile:>10.1?} {:>9.0} {:>9.0} {:>9.0}",
            at(50),
            at(99),
            at(100)
        );
    }
}
