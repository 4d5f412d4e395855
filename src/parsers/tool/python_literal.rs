//! Python's call-list subset, `[f(a=1), g.h(b='x')]`, read character by character and written again as JSON.
//!
//! The model's text is read by one push-down machine, so a stream and a whole text share one grammar, every character
//! is looked at a bounded number of times, and nothing is parsed twice. There is no recursion and no regular
//! expression: nesting is an explicit stack of at most [`MAX_DEPTH`] levels.
//!
//! Read: keyword arguments with str (prefixes `r`, `u`, `f` without placeholders; triple quotes; adjacent literals), int,
//! float, `True`/`False`/`None`, `true`/`false`/`null`, list, tuple, set, dict with constant keys, signed numbers.
//! Positional arguments are read and dropped, `**value` becomes the key `null`. Written: `", "` and `": "` as separators,
//! non-ASCII kept, as Python's `json.dumps(ensure_ascii=False)` does.
//!
//! Three things that Python refuses are read anyway, because models write them: raw control characters inside strings,
//! ints with leading zeros, parameters named like Python keywords. They are no ambiguity, so they need no second pass.
//! Unescaped quotes inside a string do: see [`parse_requoted`].

use std::collections::HashMap;

use super::ToolCall;

/// Open brackets at one time; CPython's own limit is 200.
const MAX_DEPTH: usize = 100;
/// CPython refuses longer integers.
const MAX_NUMBER_CHARS: usize = 4300;
/// Closing quotes tried for a broken string; keeps the repair linear in the text.
const MAX_READINGS: usize = 64;

/// The machine. Feed it with [`push`](CallList::push); nothing it is fed makes it panic.
#[derive(Default)]
pub(super) struct CallList {
    lexer: Lexer,
    expect: Expect,
    levels: Vec<Level>,
    /// Levels that hide what is below them from the JSON output.
    mutes: usize,
    /// JSON text of the string value being read, without the closing quote.
    string: String,
    string_is_format: bool,
    calls: Vec<CallText>,
    values: Vec<Dict>,
    failed: bool,
    /// Bytes pushed so far.
    offset: usize,
    /// The literal that may have been closed by a quote of its own content.
    broken: Option<BrokenString>,
    last_string: Option<BrokenString>,
}

/// A call as far as it has been read.
pub(super) struct CallText {
    pub name: String,
    /// JSON text so far; the first of two equal keys stays.
    json: String,
    /// Bytes of `json` that no later text can change.
    settled: usize,
}

impl CallText {
    /// The part of the arguments that can be sent: grows, never changes.
    pub fn settled(&self) -> &str {
        &self.json[..self.settled]
    }
}

#[derive(Clone, Copy)]
struct BrokenString {
    /// Byte offset behind the opening quote.
    start: usize,
    quote: char,
}

#[derive(Default)]
enum Lexer {
    #[default]
    Between,
    Comment,
    /// A backslash outside strings: joins lines.
    LineJoin,
    Name(String),
    Number(String),
    /// One or two quotes that may begin a triple-quoted string.
    Quotes {
        prefix: Prefix,
        quote: char,
        count: u8,
    },
    Text(Text),
}

#[derive(Clone, Copy, Default)]
struct Prefix {
    raw: bool,
    format: bool,
}

/// The inside of a string literal.
struct Text {
    prefix: Prefix,
    quote: char,
    triple: bool,
    /// Quotes in a row inside a triple-quoted string.
    run: u8,
    escape: Escape,
    /// `{` or `}` of an f-string, waiting for its twin.
    brace: Option<char>,
    high_surrogate: Option<u32>,
}

enum Escape {
    No,
    Backslash,
    /// A backslash of a raw string: the next character is itself, a quote too.
    Raw,
    Hex {
        left: u8,
        value: u32,
    },
    Octal {
        left: u8,
        value: u32,
    },
}

#[derive(Default)]
enum Expect {
    /// The `[` of the call list.
    #[default]
    Open,
    /// A call or `]`.
    Call {
        may_close: bool,
    },
    /// `.` or `(`.
    CallDotOrParen(String),
    CallNamePart(String),
    /// `,` or `]`.
    AfterCall,
    Argument,
    /// A name in an argument's place: a keyword if `=` follows.
    AfterArgumentName(String),
    /// The second `*`.
    SecondStar,
    Value,
    /// A number after its sign.
    Signed {
        negative: bool,
    },
    /// A string literal ended; another one continues it.
    AfterString,
    AfterValue,
    /// Only white space.
    End,
}

struct Level {
    frame: Frame,
    /// This level has one of [`CallList::mutes`].
    muted: bool,
}

enum Frame {
    Call {
        arguments: Dict,
        pending: Pending,
    },
    List(Vec<Literal>),
    /// `(`: a tuple once there is a comma.
    Paren {
        items: Vec<Literal>,
        tuple: bool,
    },
    /// `{`: a set or a dict once its first element is read.
    Brace(Option<Literal>),
    Set(Vec<Literal>),
    Dict {
        entries: Dict,
        key: KeyState,
    },
}

enum Pending {
    Nothing,
    /// Read and dropped.
    Positional,
    Keyword(Key),
}

enum KeyState {
    Wanted,
    Read(Literal),
    Done(Key),
}

#[derive(Clone)]
struct Key {
    /// Equal for keys that are equal in Python: `1`, `1.0` and `True`.
    canonical: String,
    /// Quoted JSON text.
    json: String,
}

/// Insertion order; a later equal key replaces the value, as in Python.
#[derive(Default)]
struct Dict {
    entries: Vec<(String, Literal)>,
    positions: HashMap<String, usize>,
}

impl Dict {
    fn contains(&self, key: &Key) -> bool {
        self.positions.contains_key(&key.canonical)
    }

    fn insert(&mut self, key: Key, value: Literal) {
        match self.positions.get(&key.canonical) {
            Some(&at) => self.entries[at].1 = value,
            None => {
                self.positions.insert(key.canonical, self.entries.len());
                self.entries.push((key.json, value));
            }
        }
    }

    fn write(&self, out: &mut String) {
        out.push('{');
        for (i, (key, value)) in self.entries.iter().enumerate() {
            if i > 0 {
                out.push_str(", ");
            }
            out.push_str(key);
            out.push_str(": ");
            value.write(out);
        }
        out.push('}');
    }
}

enum Literal {
    Scalar { json: String, kind: Kind },
    List(Vec<Literal>),
    Dict(Dict),
}

enum Kind {
    Text,
    Int,
    Float(f64),
    Bool(bool),
    None,
    /// Readable as a value, no constant in Python: f-strings, signed numbers, `null`/`true`/`false`.
    NotConstant,
}

impl Literal {
    /// Depth is bounded by [`MAX_DEPTH`].
    fn write(&self, out: &mut String) {
        match self {
            Literal::Scalar { json, .. } => out.push_str(json),
            Literal::List(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    item.write(out);
                }
                out.push(']');
            }
            Literal::Dict(dict) => dict.write(out),
        }
    }

    fn json(&self) -> String {
        let mut out = String::new();
        self.write(&mut out);
        out
    }

    fn key(&self) -> Option<Key> {
        let Literal::Scalar { json, kind } = self else {
            return None;
        };
        let canonical = match kind {
            Kind::Text => {
                return Some(Key {
                    canonical: json.clone(),
                    json: json.clone(),
                });
            }
            Kind::Int | Kind::None => json.clone(),
            Kind::Bool(value) => u8::from(*value).to_string(),
            Kind::Float(value) if value.fract() == 0.0 && value.abs() < 1e15 => format!("{value:.0}"),
            Kind::Float(_) => json.clone(),
            Kind::NotConstant => return None,
        };
        Some(Key {
            canonical,
            json: format!("\"{json}\""),
        })
    }
}

/// What the lexer hands to the grammar.
enum Token {
    Name(String),
    Number(String),
    Punct(char),
}

/// Reads `text` with the string that opens at `broken.start` closed at a later quote, the quotes between escaped.
///
/// A closing quote is plausible when `,`, `)`, `]`, `}` or `:` follows. Exactly one plausible quote must make the rest
/// read as a call list: with two readings the intent is unclear and there is no call.
fn parse_requoted(text: &str, broken: BrokenString) -> Option<Vec<ToolCall>> {
    let tail = text.get(broken.start..)?;
    let mut quotes = Vec::new();
    let mut escaped = false;
    for (at, c) in tail.char_indices() {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if c == broken.quote {
            quotes.push(broken.start + at);
        }
    }
    let plausible = |at: usize| text[at + 1..].trim_start().starts_with([',', ')', ']', '}', ':']);
    let mut found = None;
    let mut tried = 0;
    for (nth, &close) in quotes.iter().enumerate() {
        if nth == 0 || !plausible(close) {
            continue;
        }
        tried += 1;
        if tried > MAX_READINGS {
            return None;
        }
        let mut list = CallList::default();
        let mut from = 0;
        for &inner in &quotes[..nth] {
            text[from..inner].chars().for_each(|c| list.push(c));
            list.push('\\');
            from = inner;
        }
        for c in text[from..].chars() {
            if list.failed {
                break;
            }
            list.push(c);
        }
        if let Some(calls) = list.complete() {
            if found.is_some() {
                return None;
            }
            found = Some(calls);
        }
    }
    found
}

impl CallList {
    /// The calls so far, in order; the last one may be open.
    pub fn calls(&self) -> &[CallText] {
        &self.calls
    }

    /// The block has ended and `text` is everything that was pushed: its calls.
    pub fn finish(&self, text: &str) -> Option<Vec<ToolCall>> {
        self.complete().or_else(|| parse_requoted(text, self.broken?))
    }

    /// Nothing that follows can make the text a call list without a repair.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    fn complete(&self) -> Option<Vec<ToolCall>> {
        if self.failed || !matches!(self.expect, Expect::End) || self.values.is_empty() {
            return None;
        }
        let to_call = |(call, arguments): (&CallText, &Dict)| {
            let mut json = String::with_capacity(call.json.len());
            arguments.write(&mut json);
            ToolCall {
                name: call.name.clone(),
                arguments: json,
            }
        };
        Some(self.calls.iter().zip(&self.values).map(to_call).collect())
    }

    /// Lets the part of an open string that has been read be sent. Call it when a piece of text has been pushed.
    ///
    /// Only the inside of a string goes out early: what follows a closing quote decides whether it was one, and
    /// trailing spaces wait with it.
    pub fn settle(&mut self) {
        let first_literal = !matches!(self.expect, Expect::AfterString);
        if self.failed || self.mutes > 0 || !matches!(self.lexer, Lexer::Text(_)) || !first_literal {
            return;
        }
        if let Some(call) = self.calls.last_mut() {
            call.settled = call.settled.max(call.json.trim_end_matches(' ').len());
        }
    }

    /// The next character of the text between the sentinels.
    pub fn push(&mut self, c: char) {
        #[cfg(test)]
        STEPS.with(|steps| steps.set(steps.get() + 1));
        self.offset += c.len_utf8();
        if !self.failed && self.step(c).is_none() {
            if matches!(self.expect, Expect::AfterString) {
                self.broken = self.broken.or(self.last_string);
            }
            self.failed = true;
        }
    }

    /// `None` when the text is no call list.
    fn step(&mut self, c: char) -> Option<()> {
        match std::mem::take(&mut self.lexer) {
            Lexer::Between => self.between(c),
            Lexer::Comment => {
                self.lexer = if c == '\n' { Lexer::Between } else { Lexer::Comment };
                Some(())
            }
            Lexer::LineJoin => (c == '\n').then_some(()),
            Lexer::Name(mut name) => {
                if c.is_alphanumeric() || c == '_' {
                    name.push(c);
                    self.lexer = Lexer::Name(name);
                    return Some(());
                }
                if matches!(c, '\'' | '"') {
                    let prefix = string_prefix(&name)?;
                    self.lexer = Lexer::Quotes {
                        prefix,
                        quote: c,
                        count: 1,
                    };
                    return Some(());
                }
                self.token(Token::Name(name))?;
                self.between(c)
            }
            Lexer::Number(mut number) => {
                let exponent_sign = matches!(c, '+' | '-')
                    && number.ends_with(['e', 'E'])
                    && !number.starts_with("0x")
                    && !number.starts_with("0X");
                if c.is_ascii_alphanumeric() || matches!(c, '_' | '.') || exponent_sign {
                    number.push(c);
                    self.lexer = Lexer::Number(number);
                    return Some(());
                }
                self.token(Token::Number(number))?;
                self.between(c)
            }
            Lexer::Quotes { prefix, quote, count } => match (count, c == quote) {
                (1, true) => {
                    self.lexer = Lexer::Quotes {
                        prefix,
                        quote,
                        count: 2,
                    };
                    Some(())
                }
                (1, false) => {
                    self.open_string(prefix, quote, self.offset - c.len_utf8())?;
                    self.text(Text::new(prefix, quote, false), c)
                }
                (_, true) => {
                    self.open_string(prefix, quote, self.offset)?;
                    self.last_string = None;
                    self.lexer = Lexer::Text(Text::new(prefix, quote, true));
                    Some(())
                }
                (_, false) => {
                    self.open_string(prefix, quote, self.offset - c.len_utf8() - quote.len_utf8())?;
                    self.expect = Expect::AfterString;
                    self.between(c)
                }
            },
            Lexer::Text(text) => self.text(text, c),
        }
    }

    fn between(&mut self, c: char) -> Option<()> {
        match c {
            c if c.is_whitespace() => Some(()),
            _ if matches!(self.expect, Expect::End) => None,
            '#' => {
                self.lexer = Lexer::Comment;
                Some(())
            }
            '\\' => {
                self.lexer = Lexer::LineJoin;
                Some(())
            }
            '\'' | '"' => {
                self.lexer = Lexer::Quotes {
                    prefix: Prefix::default(),
                    quote: c,
                    count: 1,
                };
                Some(())
            }
            '.' if !matches!(self.expect, Expect::CallDotOrParen(_)) => {
                self.lexer = Lexer::Number(".".into());
                Some(())
            }
            c if c.is_ascii_digit() => {
                self.lexer = Lexer::Number(c.into());
                Some(())
            }
            c if c.is_alphabetic() || c == '_' => {
                self.lexer = Lexer::Name(c.into());
                Some(())
            }
            '[' | ']' | '(' | ')' | '{' | '}' | ',' | ':' | '=' | '+' | '-' | '*' | '.' => self.token(Token::Punct(c)),
            _ => None,
        }
    }

    // ---- strings

    fn open_string(&mut self, prefix: Prefix, quote: char, start: usize) -> Option<()> {
        match self.expect {
            Expect::AfterString => {
                // Two adjacent literals are one string, or one string with quotes inside.
                self.broken = self.broken.or(self.last_string);
                self.string_is_format |= prefix.format;
            }
            _ => {
                self.begin_value()?;
                self.emit("\"");
                self.string = String::from("\"");
                self.string_is_format = prefix.format;
            }
        }
        self.last_string = Some(BrokenString { start, quote });
        Some(())
    }

    /// One character inside a string literal.
    fn text(&mut self, mut text: Text, c: char) -> Option<()> {
        match text.escape {
            Escape::No => {}
            Escape::Backslash => {
                text.escape = Escape::No;
                match c {
                    '\n' => {}
                    'a' => self.text_char(&mut text, '\u{7}'),
                    'b' => self.text_char(&mut text, '\u{8}'),
                    'f' => self.text_char(&mut text, '\u{c}'),
                    'n' => self.text_char(&mut text, '\n'),
                    'r' => self.text_char(&mut text, '\r'),
                    't' => self.text_char(&mut text, '\t'),
                    'v' => self.text_char(&mut text, '\u{b}'),
                    '\\' | '\'' | '"' => self.text_char(&mut text, c),
                    'x' => text.escape = Escape::Hex { left: 2, value: 0 },
                    'u' => text.escape = Escape::Hex { left: 4, value: 0 },
                    'U' => text.escape = Escape::Hex { left: 8, value: 0 },
                    // The table of Unicode names is not worth its size.
                    'N' => return None,
                    '0'..='7' => {
                        text.escape = Escape::Octal {
                            left: 2,
                            value: c.to_digit(8)?,
                        }
                    }
                    _ => {
                        self.text_char(&mut text, '\\');
                        self.text_char(&mut text, c);
                    }
                }
                self.lexer = Lexer::Text(text);
                return Some(());
            }
            Escape::Raw => {
                text.escape = Escape::No;
                self.text_char(&mut text, c);
                self.lexer = Lexer::Text(text);
                return Some(());
            }
            Escape::Hex { left, value } => {
                let value = (value << 4) | c.to_digit(16)?;
                text.escape = Escape::Hex { left: left - 1, value };
                if left == 1 {
                    text.escape = Escape::No;
                    self.text_code(&mut text, value)?;
                }
                self.lexer = Lexer::Text(text);
                return Some(());
            }
            Escape::Octal { left, value } => {
                if let (1.., Some(digit)) = (left, c.to_digit(8)) {
                    text.escape = Escape::Octal {
                        left: left - 1,
                        value: (value << 3) | digit,
                    };
                    self.lexer = Lexer::Text(text);
                    return Some(());
                }
                text.escape = Escape::No;
                self.text_code(&mut text, value)?;
            }
        }
        if let Some(brace) = text.brace.take() {
            if c != brace {
                return None; // A placeholder: its value is not known.
            }
            self.text_char(&mut text, c);
        } else if c == text.quote {
            if !text.triple {
                self.flush_surrogate(&mut text);
                self.expect = Expect::AfterString;
                return Some(());
            }
            text.run += 1;
            if text.run == 3 {
                self.flush_surrogate(&mut text);
                self.expect = Expect::AfterString;
                return Some(());
            }
        } else {
            for _ in 0..std::mem::take(&mut text.run) {
                let quote = text.quote;
                self.text_char(&mut text, quote);
            }
            match c {
                '\\' if text.prefix.raw => {
                    self.text_char(&mut text, '\\');
                    text.escape = Escape::Raw;
                }
                '\\' => text.escape = Escape::Backslash,
                '{' | '}' if text.prefix.format => text.brace = Some(c),
                _ => self.text_char(&mut text, c),
            }
        }
        self.lexer = Lexer::Text(text);
        Some(())
    }

    /// A code point written as an escape; surrogate pairs become one character.
    fn text_code(&mut self, text: &mut Text, code: u32) -> Option<()> {
        match code {
            0xd800..0xdc00 => {
                self.flush_surrogate(text);
                text.high_surrogate = Some(code);
            }
            0xdc00..0xe000 => {
                let joined = text
                    .high_surrogate
                    .take()
                    .map(|high| 0x10000 + ((high - 0xd800) << 10) + (code - 0xdc00));
                self.text_char(
                    text,
                    joined.and_then(char::from_u32).unwrap_or(char::REPLACEMENT_CHARACTER),
                );
            }
            _ => self.text_char(text, char::from_u32(code)?),
        }
        Some(())
    }

    fn flush_surrogate(&mut self, text: &mut Text) {
        if text.high_surrogate.take().is_some() {
            self.write_char(char::REPLACEMENT_CHARACTER);
        }
    }

    fn text_char(&mut self, text: &mut Text, c: char) {
        self.flush_surrogate(text);
        self.write_char(c);
    }

    fn write_char(&mut self, c: char) {
        let mut buffer = [0; 4];
        let escaped = match c {
            '"' => "\\\"",
            '\\' => "\\\\",
            '\n' => "\\n",
            '\r' => "\\r",
            '\t' => "\\t",
            '\u{8}' => "\\b",
            '\u{c}' => "\\f",
            c if c < ' ' => &format!("\\u{:04x}", u32::from(c)),
            c => c.encode_utf8(&mut buffer),
        };
        self.string.push_str(escaped);
        self.emit(escaped);
    }

    /// The string literal, or the row of them, is over.
    fn close_string(&mut self) -> Option<()> {
        self.emit("\"");
        let mut json = std::mem::take(&mut self.string);
        json.push('"');
        let kind = if self.string_is_format {
            Kind::NotConstant
        } else {
            Kind::Text
        };
        self.attach(Literal::Scalar { json, kind })
    }

    // ---- grammar

    fn token(&mut self, token: Token) -> Option<()> {
        if matches!(self.expect, Expect::AfterString) {
            if !matches!(token, Token::Punct(',' | ')' | ']' | '}' | ':')) {
                return None; // Marked as broken by `push`.
            }
            self.close_string()?;
        }
        match (std::mem::take(&mut self.expect), token) {
            (Expect::Open, Token::Punct('[')) => self.expect = Expect::Call { may_close: false },
            (Expect::Call { .. }, Token::Name(name)) => self.expect = Expect::CallDotOrParen(name),
            (Expect::Call { may_close: true } | Expect::AfterCall, Token::Punct(']')) => self.expect = Expect::End,
            (Expect::AfterCall, Token::Punct(',')) => self.expect = Expect::Call { may_close: true },
            (Expect::CallDotOrParen(name), Token::Punct('.')) => self.expect = Expect::CallNamePart(name + "."),
            (Expect::CallNamePart(name), Token::Name(part)) => self.expect = Expect::CallDotOrParen(name + &part),
            (Expect::CallDotOrParen(name), Token::Punct('(')) => {
                self.calls.push(CallText {
                    name,
                    json: String::new(),
                    settled: 0,
                });
                self.open(Frame::Call {
                    arguments: Dict::default(),
                    pending: Pending::Nothing,
                })?;
                self.expect = Expect::Argument;
            }
            (Expect::Argument, Token::Name(name)) => self.expect = Expect::AfterArgumentName(name),
            (Expect::Argument, Token::Punct('*')) => self.expect = Expect::SecondStar,
            (Expect::SecondStar, Token::Punct('*')) => self.keyword(Key {
                canonical: "**".into(),
                json: "\"null\"".into(),
            })?,
            (Expect::Argument, Token::Punct(')')) => self.close_call()?,
            (Expect::AfterArgumentName(name), Token::Punct('=')) => {
                let json = format!("\"{name}\"");
                self.keyword(Key {
                    canonical: json.clone(),
                    json,
                })?;
            }
            (Expect::AfterArgumentName(_), Token::Punct(c @ (',' | ')'))) => {
                self.positional()?;
                self.attach(Literal::List(Vec::new()))?;
                self.after_value(c)?;
            }
            (Expect::Value | Expect::Argument, Token::Punct(c @ ('[' | '(' | '{'))) => {
                self.expect = Expect::Value;
                let positional = matches!(
                    self.top()?,
                    Frame::Call {
                        pending: Pending::Nothing,
                        ..
                    }
                );
                self.begin_value_at(positional)?;
                self.open_value(c)?;
            }
            (expect @ (Expect::Value | Expect::Argument), Token::Punct(sign @ ('+' | '-'))) => {
                if matches!(expect, Expect::Argument) {
                    self.positional()?;
                }
                self.expect = Expect::Signed { negative: sign == '-' };
            }
            (Expect::Value, Token::Punct(c)) => self.close_value(c)?,
            (Expect::Value, Token::Name(name)) => {
                let (json, kind) = match name.as_str() {
                    "True" => ("true", Kind::Bool(true)),
                    "False" => ("false", Kind::Bool(false)),
                    "None" => ("null", Kind::None),
                    "true" | "false" | "null" => (name.as_str(), Kind::NotConstant),
                    _ => return None,
                };
                self.expect = Expect::Value;
                self.scalar(json.into(), kind)?;
            }
            (expect @ (Expect::Value | Expect::Argument), Token::Number(number)) => {
                let (json, kind) = parse_number(&number)?;
                self.expect = expect;
                self.scalar(json, kind)?;
            }
            (Expect::Signed { negative }, Token::Number(number)) => {
                let (json, _) = parse_number(&number)?;
                let json = if negative && json != "0" {
                    format!("-{json}")
                } else {
                    json
                };
                self.expect = Expect::Value;
                self.scalar(json, Kind::NotConstant)?;
            }
            (Expect::AfterValue, Token::Punct(c)) => self.after_value(c)?,
            _ => return None,
        }
        Some(())
    }

    fn top(&mut self) -> Option<&mut Frame> {
        self.levels.last_mut().map(|level| &mut level.frame)
    }

    fn open(&mut self, frame: Frame) -> Option<()> {
        if self.levels.len() >= MAX_DEPTH {
            return None;
        }
        self.levels.push(Level { frame, muted: false });
        Some(())
    }

    /// Hides the output below the top level until [`unmute`](Self::unmute).
    fn mute(&mut self) {
        if let Some(level) = self.levels.last_mut()
            && !level.muted
        {
            level.muted = true;
            self.mutes += 1;
        }
    }

    fn unmute(&mut self) {
        if let Some(level) = self.levels.last_mut()
            && std::mem::take(&mut level.muted)
        {
            self.mutes -= 1;
        }
    }

    fn emit(&mut self, json: &str) {
        if self.mutes == 0
            && let Some(call) = self.calls.last_mut()
        {
            call.json.push_str(json);
        }
    }

    fn keyword(&mut self, key: Key) -> Option<()> {
        let Frame::Call { arguments, pending } = self.top()? else {
            return None;
        };
        let repeated = arguments.contains(&key);
        let separator = if arguments.entries.is_empty() { "{" } else { ", " };
        let text = format!("{separator}{}: ", key.json);
        *pending = Pending::Keyword(key);
        if repeated {
            self.mute();
        } else {
            self.emit(&text);
        }
        self.expect = Expect::Value;
        Some(())
    }

    fn positional(&mut self) -> Option<()> {
        let Frame::Call { arguments, pending } = self.top()? else {
            return None;
        };
        if !arguments.entries.is_empty() {
            return None; // Python: a positional argument follows a keyword argument.
        }
        *pending = Pending::Positional;
        self.mute();
        Some(())
    }

    fn begin_value(&mut self) -> Option<()> {
        match self.expect {
            Expect::Value => self.begin_value_at(false),
            Expect::Argument => self.begin_value_at(true),
            _ => None,
        }
    }

    /// A value starts here: a positional argument, or the separator before an element.
    fn begin_value_at(&mut self, positional: bool) -> Option<()> {
        if positional {
            return self.positional();
        }
        let separate = match self.top()? {
            Frame::List(items) | Frame::Set(items) | Frame::Paren { items, tuple: true } => !items.is_empty(),
            _ => false,
        };
        if separate {
            self.emit(", ");
        }
        Some(())
    }

    fn scalar(&mut self, json: String, kind: Kind) -> Option<()> {
        self.begin_value()?;
        self.emit(&json);
        self.attach(Literal::Scalar { json, kind })
    }

    fn open_value(&mut self, bracket: char) -> Option<()> {
        match bracket {
            '[' => {
                self.emit("[");
                self.open(Frame::List(Vec::new()))
            }
            '(' => {
                self.open(Frame::Paren {
                    items: Vec::new(),
                    tuple: false,
                })?;
                self.mute();
                Some(())
            }
            _ => {
                self.open(Frame::Brace(None))?;
                self.mute();
                Some(())
            }
        }
    }

    /// A value is complete and has been written: it goes into the level it stands in.
    fn attach(&mut self, value: Literal) -> Option<()> {
        match self.top()? {
            Frame::Call { arguments, pending } => {
                if let Pending::Keyword(key) = std::mem::replace(pending, Pending::Nothing) {
                    arguments.insert(key, value);
                }
                self.unmute();
            }
            Frame::List(items) | Frame::Set(items) | Frame::Paren { items, .. } => items.push(value),
            Frame::Brace(first) => *first = Some(value),
            Frame::Dict { entries, key } => match std::mem::replace(key, KeyState::Wanted) {
                KeyState::Wanted => *key = KeyState::Read(value),
                KeyState::Done(done) => {
                    entries.insert(done, value);
                    // The next thing is a key, written when its colon comes.
                    self.mute();
                }
                KeyState::Read(_) => return None,
            },
        }
        self.expect = Expect::AfterValue;
        Some(())
    }

    fn after_value(&mut self, c: char) -> Option<()> {
        match c {
            ',' => self.comma(),
            ':' => self.colon(),
            _ => self.close_value(c),
        }
    }

    fn comma(&mut self) -> Option<()> {
        self.expect = Expect::Value;
        match self.top()? {
            Frame::Call { .. } => self.expect = Expect::Argument,
            Frame::List(_) | Frame::Set(_) | Frame::Paren { tuple: true, .. } => {}
            Frame::Paren { items, tuple } => {
                *tuple = true;
                let first = items.first()?.json();
                self.unmute();
                self.emit("[");
                self.emit(&first);
            }
            Frame::Brace(first) => {
                let first = first.take()?;
                let json = first.json();
                *self.top()? = Frame::Set(vec![first]);
                self.unmute();
                self.emit("[");
                self.emit(&json);
            }
            Frame::Dict {
                key: KeyState::Wanted, ..
            } => {}
            Frame::Dict { .. } => return None,
        }
        Some(())
    }

    fn colon(&mut self) -> Option<()> {
        let (key, repeated, first) = match self.top()? {
            Frame::Brace(first) => (first.take()?.key()?, false, true),
            Frame::Dict { entries, key } => {
                let KeyState::Read(read) = std::mem::replace(key, KeyState::Wanted) else {
                    return None;
                };
                let key = read.key()?;
                let repeated = entries.contains(&key);
                (key, repeated, false)
            }
            _ => return None,
        };
        let text = format!("{}{}: ", if first { "{" } else { ", " }, key.json);
        match self.top()? {
            Frame::Dict { key: state, .. } => *state = KeyState::Done(key),
            frame => {
                *frame = Frame::Dict {
                    entries: Dict::default(),
                    key: KeyState::Done(key),
                }
            }
        }
        if !repeated {
            self.unmute();
            self.emit(&text);
        }
        self.expect = Expect::Value;
        Some(())
    }

    /// A closing bracket where a value could stand or after one.
    fn close_value(&mut self, c: char) -> Option<()> {
        match (self.top()?, c) {
            (
                Frame::Call {
                    pending: Pending::Nothing,
                    ..
                },
                ')',
            ) => return self.close_call(),
            (Frame::List(_), ']') | (Frame::Set(_), '}') | (Frame::Paren { .. } | Frame::Brace(_), _) => {}
            (
                Frame::Dict {
                    key: KeyState::Wanted, ..
                },
                '}',
            ) => {}
            _ => return None,
        }
        self.unmute();
        let level = self.levels.pop()?;
        let (literal, text) = match (level.frame, c) {
            (Frame::List(items), ']') | (Frame::Set(items), '}') | (Frame::Paren { items, tuple: true }, ')') => {
                (Literal::List(items), "]".to_owned())
            }
            (
                Frame::Paren {
                    mut items,
                    tuple: false,
                },
                ')',
            ) => match items.pop() {
                Some(item) => {
                    let json = item.json();
                    (item, json)
                }
                None => (Literal::List(Vec::new()), "[]".to_owned()),
            },
            (Frame::Brace(Some(first)), '}') => {
                let json = format!("[{}]", first.json());
                (Literal::List(vec![first]), json)
            }
            (Frame::Brace(None), '}') => (Literal::Dict(Dict::default()), "{}".to_owned()),
            (Frame::Dict { entries, .. }, '}') => (Literal::Dict(entries), "}".to_owned()),
            _ => return None,
        };
        self.emit(&text);
        self.attach(literal)
    }

    fn close_call(&mut self) -> Option<()> {
        self.unmute();
        let Frame::Call { arguments, .. } = self.levels.pop()?.frame else {
            return None;
        };
        self.emit(if arguments.entries.is_empty() { "{}" } else { "}" });
        self.values.push(arguments);
        if let Some(call) = self.calls.last_mut() {
            call.settled = call.json.len();
        }
        self.expect = Expect::AfterCall;
        Some(())
    }
}

impl Text {
    fn new(prefix: Prefix, quote: char, triple: bool) -> Self {
        Text {
            prefix,
            quote,
            triple,
            run: 0,
            escape: Escape::No,
            brace: None,
            high_surrogate: None,
        }
    }
}

/// `None` for bytes and for names that are no prefix.
fn string_prefix(name: &str) -> Option<Prefix> {
    match name.to_ascii_lowercase().as_str() {
        "r" => Some(Prefix {
            raw: true,
            format: false,
        }),
        "f" => Some(Prefix {
            raw: false,
            format: true,
        }),
        "u" => Some(Prefix::default()),
        "rf" | "fr" => Some(Prefix {
            raw: true,
            format: true,
        }),
        _ => None,
    }
}

/// A Python number as JSON.
fn parse_number(text: &str) -> Option<(String, Kind)> {
    if text.len() > MAX_NUMBER_CHARS || text.contains("__") || text.ends_with('_') || text.starts_with('_') {
        return None;
    }
    let digits = text.replace('_', "");
    let lower = digits.to_ascii_lowercase();
    for (prefix, radix) in [("0x", 16), ("0o", 8), ("0b", 2)] {
        if let Some(rest) = lower.strip_prefix(prefix) {
            return Some((u128::from_str_radix(rest, radix).ok()?.to_string(), Kind::Int));
        }
    }
    if digits.bytes().all(|b| b.is_ascii_digit()) {
        let significant = digits.trim_start_matches('0');
        let json = if significant.is_empty() { "0" } else { significant };
        return Some((json.to_owned(), Kind::Int));
    }
    if !digits
        .bytes()
        .all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'+' | b'-'))
    {
        return None;
    }
    let value: f64 = digits.parse().ok()?;
    Some((float_repr(value), Kind::Float(value)))
}

/// Python's `repr` of a float that is not negative.
///
/// Differs from vLLM for infinity: `1e999` is JSON and reads as infinity, `Infinity` is no JSON.
fn float_repr(value: f64) -> String {
    if value.is_infinite() {
        return "1e999".to_owned();
    }
    let scientific = format!("{value:e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let Ok(exponent) = exponent.parse::<i32>() else {
        return scientific;
    };
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
thread_local! {
    /// Characters looked at by every machine of this thread: the measure of the work done.
    pub(super) static STEPS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}
