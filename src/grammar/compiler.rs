//! From a specification to an automaton, under limits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::TokTrie;
use llguidance::{Matcher, ParserFactory, TokenParser};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::cache::{GrammarCache, Key};
use super::guard::{Guard, TokenClasses};
use super::vocabulary::Vocabulary;
use super::{GrammarError, GrammarKind, GrammarOptions, GrammarSpec, ebnf, lark, schema, structural_tag};

/// Largest specification, as JSON text.
const MAX_SPEC_BYTES: usize = 2 << 20;
/// Longest wait for a compilation, its turn included; vLLM's limit for regular expressions.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(5);
/// Compilations at a time. One that exceeds the timeout keeps its place until it ends; the text layer starts fewer.
const CONCURRENT_COMPILATIONS: usize = 4;
/// Schemas are walked recursively, by us to a depth of [`schema::MAX_DEPTH`] and by the automaton's compiler after us. Only
/// the pages that are used are real.
const COMPILE_STACK_BYTES: usize = 128 << 20;
/// Grammars kept, and what they may hold together.
const MAX_CACHED_GRAMMARS: usize = 256;
const MAX_CACHED_BYTES: usize = 256 << 20;
/// What a grammar holds beside its lexer: rules, and a copy of the tables.
const BASE_GRAMMAR_BYTES: usize = 64 << 10;

/// Lower than llguidance's defaults, which allow 500 MB and 16 ms a token for one grammar.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2_000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 100_000,
        step_max_items: 25_000,
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: true,
        verbose_errors: false,
    }
}

/// Compiles grammars for one vocabulary. Blocking: call it where blocking is allowed.
pub struct GrammarCompiler {
    shared: Arc<Shared>,
    cache: Mutex<GrammarCache>,
}

struct Shared {
    factory: ParserFactory,
    classes: Arc<TokenClasses>,
    anything: Arc<[u32]>,
    places: Places,
}

/// Counts compilations.
#[derive(Default)]
struct Places {
    taken: Mutex<usize>,
    freed: Condvar,
}

/// A compiled grammar. Sequences under it share its lexer, which remembers what it has seen and so gets faster.
pub struct Grammar {
    template: Mutex<Matcher>,
    /// Bytes of the lexer at the start; it grows in use.
    lexer: Mutex<TokenParser>,
    shared: Arc<Shared>,
    /// JSON from end to end.
    is_json: bool,
    /// A limit was reached under it.
    spent: AtomicBool,
}

impl GrammarCompiler {
    /// Takes tens of milliseconds for a vocabulary of 65,536.
    ///
    /// # Errors
    /// A vocabulary without EOS.
    pub fn new(vocabulary: &Vocabulary) -> Result<Self, GrammarError> {
        let env = vocabulary.token_env()?;
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| GrammarError::invalid(first_line(&error)))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        let words = vocabulary.words();
        let mut anything = vec![u32::MAX; words.len().div_ceil(32)];
        if let Some(last) = anything.last_mut()
            && !words.len().is_multiple_of(32)
        {
            *last = (1 << (words.len() % 32)) - 1;
        }
        Ok(Self {
            shared: Arc::new(Shared {
                factory,
                classes: Arc::new(TokenClasses::new(words)),
                anything: anything.into(),
                places: Places::default(),
            }),
            cache: Mutex::new(GrammarCache::new(MAX_CACHED_GRAMMARS, MAX_CACHED_BYTES)),
        })
    }

    /// The grammar of a specification, if it has been compiled.
    pub fn cached(&self, spec: &GrammarSpec) -> Option<Arc<Grammar>> {
        lock(&self.cache).get(&key_of(spec).ok()?)
    }

    /// The grammar of a specification, from the cache if it is there.
    ///
    /// # Errors
    /// It is invalid, unsupported or beyond the limits; or too many compile at once.
    pub fn compile(&self, spec: &GrammarSpec) -> Result<Arc<Grammar>, GrammarError> {
        let key = key_of(spec)?;
        if let Some(grammar) = lock(&self.cache).get(&key) {
            return Ok(grammar);
        }
        let deadline = Instant::now() + COMPILE_TIMEOUT;
        self.shared.places.take(deadline)?;
        let (sender, receiver) = sync_channel(1);
        let (shared, spec) = (self.shared.clone(), spec.clone());
        let place = PlaceGuard(self.shared.clone());
        let work = move || {
            let _place = place;
            // A caller that has given up does not hear it.
            let _ = sender.send(Grammar::new(&spec, &shared));
        };
        std::thread::Builder::new()
            .name("grammar".into())
            .stack_size(COMPILE_STACK_BYTES)
            .spawn(work)
            .map_err(|_| GrammarError::Busy)?;
        let grammar = match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(result) => Arc::new(result?),
            Err(RecvTimeoutError::Timeout) => {
                return Err(GrammarError::invalid(format!(
                    "the grammar is too complex: compiling it takes longer than {} s",
                    COMPILE_TIMEOUT.as_secs()
                )));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(GrammarError::invalid("the grammar is malformed: it cannot be compiled"));
            }
        };
        lock(&self.cache).insert(key, grammar.clone());
        Ok(grammar)
    }

    #[cfg(test)]
    pub fn num_cached(&self) -> usize {
        lock(&self.cache).len()
    }
}

impl Grammar {
    fn new(spec: &GrammarSpec, shared: &Arc<Shared>) -> Result<Self, GrammarError> {
        let (lowered, is_json) = lower(&spec.kind, &spec.options)?;
        let invalid = |error: anyhow::Error| explain(&spec.kind, &spec.options, &error, shared);
        let parser = shared.factory.create_parser(lowered).map_err(invalid)?;
        let mut matcher = Matcher::new(Ok(parser.clone()));
        // The first mask builds the most states: a grammar that is too complex shows here.
        let mask = matcher
            .compute_mask_or_eos()
            .map_err(|error| match first_line(&error) {
                reason if reason.contains("NoExtension") => GrammarError::invalid("the grammar matches no text"),
                reason => GrammarError::invalid(format!("the grammar is too complex: {reason}")),
            })?;
        if mask.is_zero() {
            return Err(GrammarError::invalid("the grammar matches no text"));
        }
        Ok(Self {
            template: Mutex::new(matcher),
            lexer: Mutex::new(parser),
            shared: shared.clone(),
            is_json,
            spent: AtomicBool::new(false),
        })
    }

    /// A matcher at the start of the grammar.
    pub(super) fn matcher(&self) -> Matcher {
        lock(&self.template).clone()
    }

    pub(super) fn guard(&self) -> Option<Guard> {
        self.is_json.then(|| Guard::new(self.shared.classes.clone()))
    }

    pub(super) fn is_eos(&self, token: u32) -> bool {
        self.trie().eos_tokens().contains(&token)
    }

    pub(super) fn token_bytes(&self, token: u32) -> &[u8] {
        self.trie().token(token)
    }

    /// The mask that allows every token.
    pub(super) fn anything(&self) -> Arc<[u32]> {
        self.shared.anything.clone()
    }

    pub(super) fn set_spent(&self) {
        self.spent.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_spent(&self) -> bool {
        self.spent.load(Ordering::Relaxed)
    }

    /// Memory held, about.
    pub(super) fn bytes(&self) -> usize {
        // A spent one may have panicked with its lexer locked.
        let lexer_bytes = (!self.is_spent()).then(|| lock(&self.lexer).parser.lexer_stats().num_bytes);
        BASE_GRAMMAR_BYTES + lexer_bytes.unwrap_or(0)
    }

    fn trie(&self) -> &TokTrie {
        self.shared.factory.tok_env().tok_trie()
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar")
            .field("is_json", &self.is_json)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarCompiler").finish_non_exhaustive()
    }
}

impl Places {
    fn take(&self, deadline: Instant) -> Result<(), GrammarError> {
        let mut taken = lock(&self.taken);
        while *taken >= CONCURRENT_COMPILATIONS {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(GrammarError::Busy);
            }
            taken = self
                .freed
                .wait_timeout(taken, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(taken, _)| taken);
        }
        *taken += 1;
        Ok(())
    }
}

/// Gives the place back when the compilation ends, however it ends.
struct PlaceGuard(Arc<Shared>);

impl Drop for PlaceGuard {
    fn drop(&mut self) {
        *lock(&self.0.places.taken) -= 1;
        self.0.places.freed.notify_one();
    }
}

/// The automaton compiler's input, and whether the output is JSON from end to end.
fn lower(kind: &GrammarKind, options: &GrammarOptions) -> Result<(TopLevelGrammar, bool), GrammarError> {
    Ok(match kind {
        GrammarKind::JsonSchema(schema) => {
            let schema = schema::prepare(schema, options)?;
            (TopLevelGrammar::from_json_schema(schema), true)
        }
        GrammarKind::JsonObject => {
            let schema = schema::prepare(&json!({"type": "object"}), options)?;
            (TopLevelGrammar::from_json_schema(schema), true)
        }
        GrammarKind::Regex(pattern) => {
            let pattern = lark::without_anchors(pattern);
            lark::check_regex(pattern)?;
            (
                TopLevelGrammar::from_lark(format!("start: {}", lark::regex(pattern))),
                false,
            )
        }
        GrammarKind::Choice(choices) => {
            if choices.is_empty() {
                return Err(GrammarError::invalid("choice must have at least one text"));
            }
            let choices: Vec<String> = choices.iter().map(|choice| lark::literal(choice)).collect();
            let text = format!("start: CHOICE\nCHOICE: {}", choices.join(" | "));
            (TopLevelGrammar::from_lark(text), false)
        }
        GrammarKind::Grammar(text) => (TopLevelGrammar::from_lark(ebnf::to_lark(text, options)?), false),
        GrammarKind::StructuralTag(tag) => (
            TopLevelGrammar::from_lark(structural_tag::to_lark(tag, options)?),
            false,
        ),
    })
}

/// What is wrong, and in a schema where.
fn explain(kind: &GrammarKind, options: &GrammarOptions, error: &anyhow::Error, shared: &Shared) -> GrammarError {
    let mut reason = first_line(error);
    if reason.contains("coerce_one_of") {
        reason = "the options of a oneOf must exclude one another; use anyOf where they may overlap".to_owned();
    }
    match kind {
        GrammarKind::JsonSchema(schema) => {
            let path = schema::locate(schema, |part| {
                schema::prepare(part, options).is_ok_and(|part| {
                    let grammar = TopLevelGrammar::from_json_schema(part);
                    shared.factory.create_parser(grammar).is_ok()
                })
            });
            GrammarError::invalid(format!("the JSON schema cannot be used, at {path}: {reason}"))
        }
        GrammarKind::Regex(_) => GrammarError::invalid(format!("the regular expression cannot be used: {reason}")),
        _ => GrammarError::invalid(format!("the grammar cannot be used: {reason}")),
    }
}

/// Messages of the automaton's compiler go on with the grammar, or with a backtrace.
pub(super) fn first_line(error: &anyhow::Error) -> String {
    const MAX_CHARS: usize = 300;
    let text = error.to_string();
    let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    if line.starts_with("panic: ") {
        return "it is too complex or malformed".into();
    }
    line.chars().take(MAX_CHARS).collect()
}

/// Messages of the regular expression parser begin with a picture of the pattern.
pub(super) fn last_line(error: &anyhow::Error) -> String {
    const MAX_CHARS: usize = 300;
    let text = error.to_string();
    let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
    line.trim_start_matches("error: ").chars().take(MAX_CHARS).collect()
}

fn key_of(spec: &GrammarSpec) -> Result<Key, GrammarError> {
    let (tag, content) = match &spec.kind {
        GrammarKind::JsonSchema(schema) => ("json", schema.to_string()),
        GrammarKind::JsonObject => ("json_object", String::new()),
        GrammarKind::Regex(pattern) => ("regex", pattern.clone()),
        GrammarKind::Choice(choices) => ("choice", Value::from(choices.clone()).to_string()),
        GrammarKind::Grammar(text) => ("grammar", text.clone()),
        GrammarKind::StructuralTag(tag) => ("structural_tag", tag.to_string()),
    };
    if content.len() > MAX_SPEC_BYTES {
        return Err(GrammarError::invalid(format!(
            "the {tag} has {} bytes; at most {MAX_SPEC_BYTES} are compiled",
            content.len()
        )));
    }
    let mut hasher = Sha256::new();
    for part in [tag, content.as_str(), &format!("{:?}", spec.options)] {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    Ok(hasher.finalize().into())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
