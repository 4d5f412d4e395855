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

mod lexer;
#[cfg(test)]
mod tests;
mod value;

use lexer::{Lexer, Sink, StringOpen, Token};
use value::{Dict, Key, Kind, Literal, parse_number};

use super::ToolCall;

/// Open brackets at one time; CPython's own limit is 200.
const MAX_DEPTH: usize = 100;
/// Closing quotes tried for a broken string; keeps the repair linear in the text.
const MAX_READINGS: usize = 64;

/// The machine. Feed it with [`push`](CallList::push); nothing it is fed makes it panic.
#[derive(Default)]
pub(super) struct CallList {
    lexer: Lexer,
    grammar: Grammar,
    failed: bool,
}

/// Takes the lexer's tokens, writes JSON.
#[derive(Default)]
struct Grammar {
    expect: Expect,
    levels: Vec<Level>,
    /// Levels that hide what is below them from the JSON output.
    mutes: usize,
    /// JSON text of the string value being read, without the closing quote.
    string: String,
    string_is_format: bool,
    /// More than one literal in a row.
    string_is_joined: bool,
    /// Bytes of the open call's JSON that no later text can change, trailing spaces of an open string excluded.
    certain: usize,
    calls: Vec<CallText>,
    /// The arguments of the finished calls.
    values: Vec<Dict>,
    /// The literal that may have been closed by a quote of its own content. All behind it may yet be read otherwise: nothing more settles.
    broken: Option<StringOpen>,
    last_string: Option<StringOpen>,
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

/// A call of a whole list.
pub(super) struct ReadCall {
    pub call: ToolCall,
    /// Its arguments as a stream writes them: what is settled before the end is a prefix. Of two equal keys the first counts here, the
    /// second in `call`.
    pub streamed: String,
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
    InString,
    /// A string literal ended; another one continues it.
    AfterString,
    AfterValue,
    /// Only white space.
    End,
}

struct Level {
    frame: Frame,
    /// This level has one of [`Grammar::mutes`].
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

/// Reads `text` with the string that opens at `broken.start` closed at a later quote, the quotes between escaped.
///
/// A closing quote is plausible when `,`, `)`, `]`, `}` or `:` follows. Exactly one plausible quote must make the rest
/// read as a call list: with two readings the intent is unclear and there is no call.
fn parse_requoted(text: &str, broken: StringOpen) -> Option<Vec<ReadCall>> {
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
        &self.grammar.calls
    }

    /// The block has ended and `text` is everything that was pushed: its calls.
    pub fn finish(&self, text: &str) -> Option<Vec<ReadCall>> {
        self.complete().or_else(|| parse_requoted(text, self.grammar.broken?))
    }

    fn complete(&self) -> Option<Vec<ReadCall>> {
        let Grammar {
            expect, calls, values, ..
        } = &self.grammar;
        if self.failed || !self.lexer.is_idle() || !matches!(expect, Expect::End) {
            return None;
        }
        let to_call = |(call, arguments): (&CallText, &Dict)| {
            let mut json = String::with_capacity(call.json.len());
            arguments.write(&mut json);
            ReadCall {
                call: ToolCall {
                    name: call.name.clone(),
                    arguments: json,
                },
                streamed: call.json.clone(),
            }
        };
        Some(calls.iter().zip(values).map(to_call).collect())
    }

    /// Lets the part of an open string that has been read be sent. Call it when a piece of text has been pushed.
    ///
    /// Only the inside of a string goes out early: what follows a closing quote decides whether it was one, and
    /// trailing spaces wait with it.
    pub fn settle(&mut self) {
        if !self.failed
            && self.lexer.is_in_string()
            && let Some(call) = self.grammar.calls.last_mut()
        {
            call.settled = call.settled.max(self.grammar.certain);
        }
    }

    /// The next character of the text between the sentinels.
    pub fn push(&mut self, c: char) {
        #[cfg(test)]
        STEPS.with(|steps| steps.set(steps.get() + 1));
        if !self.failed && self.lexer.push(c, &mut self.grammar).is_none() {
            if matches!(self.grammar.expect, Expect::AfterString) {
                self.grammar.mark_broken();
            }
            self.failed = true;
        }
    }
}

impl Sink for Grammar {
    fn token(&mut self, token: Token) -> Option<()> {
        match (&self.expect, &token) {
            (Expect::InString, Token::StringChar(c)) => {
                self.write_char(*c);
                return Some(());
            }
            (Expect::InString, Token::StringClose) => {
                self.expect = Expect::AfterString;
                return Some(());
            }
            (Expect::AfterString, Token::StringOpen(open)) => {
                // Adjacent literals are one string, or one string with quotes inside.
                self.mark_broken();
                self.string_is_format |= open.format;
                self.string_is_joined = true;
                self.expect = Expect::InString;
                return Some(());
            }
            (Expect::AfterString, Token::Punct(',' | ')' | ']' | '}' | ':')) => self.close_string()?,
            (Expect::AfterString, _) => return None,
            _ => {}
        }
        self.grammar_token(token)
    }
}

impl Grammar {
    fn mark_broken(&mut self) {
        self.broken = self.broken.or(self.last_string.filter(|open| !open.triple));
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
        if c != ' ' && self.mutes == 0 && !self.string_is_joined && self.broken.is_none() {
            self.certain = self.calls.last().map_or(0, |call| call.json.len());
        }
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

    fn grammar_token(&mut self, token: Token) -> Option<()> {
        match (std::mem::take(&mut self.expect), token) {
            (Expect::Open, Token::Punct('[')) => self.expect = Expect::Call { may_close: false },
            (Expect::Call { .. }, Token::Name(name)) => self.expect = Expect::CallDotOrParen(name),
            (Expect::Call { may_close: true } | Expect::AfterCall, Token::Punct(']')) => self.expect = Expect::End,
            (Expect::AfterCall, Token::Punct(',')) => self.expect = Expect::Call { may_close: true },
            (Expect::CallDotOrParen(name), Token::Punct('.')) => self.expect = Expect::CallNamePart(name + "."),
            (Expect::CallNamePart(name), Token::Name(part)) => self.expect = Expect::CallDotOrParen(name + &part),
            (Expect::CallDotOrParen(name), Token::Punct('(')) => {
                self.certain = 0;
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
            (expect @ (Expect::Value | Expect::Argument), Token::StringOpen(open)) => {
                self.expect = expect;
                self.begin_value()?;
                self.emit("\"");
                self.string = String::from("\"");
                self.string_is_format = open.format;
                self.string_is_joined = false;
                self.last_string = Some(open);
                self.expect = Expect::InString;
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

    /// Hidden levels write nothing, so nested ones are written once in all.
    fn emit_literal(&mut self, literal: &Literal) {
        if self.mutes == 0
            && let Some(call) = self.calls.last_mut()
        {
            literal.write(&mut call.json);
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
                let first = items.pop()?;
                self.begin_sequence(&first);
                let Frame::Paren { items, .. } = self.top()? else {
                    return None;
                };
                items.push(first);
            }
            Frame::Brace(first) => {
                let first = first.take()?;
                self.begin_sequence(&first);
                *self.top()? = Frame::Set(vec![first]);
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

    /// A bracket turned out to hold a tuple or a set: what was hidden until now is written.
    fn begin_sequence(&mut self, first: &Literal) {
        self.unmute();
        self.emit("[");
        self.emit_literal(first);
    }

    /// A closing bracket where a value could stand or after one.
    fn close_value(&mut self, c: char) -> Option<()> {
        if let (
            Frame::Call {
                pending: Pending::Nothing,
                ..
            },
            ')',
        ) = (self.top()?, c)
        {
            return self.close_call();
        }
        self.unmute();
        let literal = match (self.levels.pop()?.frame, c) {
            (Frame::List(items), ']') | (Frame::Set(items), '}') | (Frame::Paren { items, tuple: true }, ')') => {
                self.emit("]");
                Literal::List(items)
            }
            (Frame::Paren { mut items, .. }, ')') => match items.pop() {
                Some(item) => {
                    self.emit_literal(&item);
                    item
                }
                None => {
                    self.emit("[]");
                    Literal::List(items)
                }
            },
            (Frame::Brace(Some(first)), '}') => {
                self.emit("[");
                self.emit_literal(&first);
                self.emit("]");
                Literal::List(vec![first])
            }
            (Frame::Brace(None), '}') => {
                self.emit("{}");
                Literal::Dict(Dict::default())
            }
            (
                Frame::Dict {
                    entries,
                    key: KeyState::Wanted,
                },
                '}',
            ) => {
                self.emit("}");
                Literal::Dict(entries)
            }
            _ => return None,
        };
        self.attach(literal)
    }

    fn close_call(&mut self) -> Option<()> {
        self.unmute();
        let Frame::Call { arguments, .. } = self.levels.pop()?.frame else {
            return None;
        };
        self.emit(if arguments.entries.is_empty() { "{}" } else { "}" });
        self.values.push(arguments);
        if let Some(call) = self.calls.last_mut()
            && self.broken.is_none()
        {
            call.settled = call.json.len();
        }
        self.expect = Expect::AfterCall;
        Some(())
    }
}

#[cfg(test)]
thread_local! {
    /// Characters looked at by every machine of this thread: the measure of the work done.
    pub(super) static STEPS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}
