//! Schemas, regexes and grammars from requests: any text is refused or gives a grammar that can be walked to its end.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use rvllm::grammar::{Constraint, ConstraintState, GrammarCompiler, GrammarKind, GrammarSpec, Start, Vocabulary};

/// Every byte is a token; the last token is EOS.
const EOS: u32 = 256;
/// Tokens that one input may cost.
const MAX_TOKENS: usize = 64;

fuzz_target!(|data: &[u8]| {
    static COMPILER: OnceLock<GrammarCompiler> = OnceLock::new();
    let compiler = COMPILER.get_or_init(|| {
        let bytes: Vec<u8> = (0..=255).collect();
        let vocabulary = Vocabulary::new(EOS as usize + 1, &[EOS], |id| match id {
            EOS => (&b"<|im_end|>"[..], true),
            _ => (&bytes[id as usize..][..1], false),
        });
        GrammarCompiler::new(&vocabulary).expect("a good vocabulary")
    });
    let [which, text @ ..] = data else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let kind = match which % 4 {
        0 => match serde_json::from_str(text) {
            Ok(schema) => GrammarKind::JsonSchema(schema),
            Err(_) => return,
        },
        1 => GrammarKind::Regex(text.to_owned()),
        2 => GrammarKind::Grammar(text.to_owned()),
        _ => match serde_json::from_str(text) {
            Ok(tag) => GrammarKind::StructuralTag(tag),
            Err(_) => return,
        },
    };
    let Ok(grammar) = compiler.compile(&GrammarSpec::new(kind)) else { return };
    let mut state = ConstraintState::new(&Constraint { grammar, start: Start::Now });
    for step in 0..MAX_TOKENS {
        // A limit that is hit ends the request, nothing else.
        let Ok(mask) = state.mask() else { return };
        let allowed: Vec<u32> = (0..=EOS).filter(|&id| mask[id as usize / 32] & 1 << (id % 32) != 0).collect();
        assert!(!allowed.is_empty(), "nothing may follow, not even the end");
        let token = allowed[usize::from(data[step % data.len()]) % allowed.len()];
        if token == EOS {
            return;
        }
        if state.push(token).is_err() {
            return;
        }
    }
});
