//! Python's tokens, one character at a time, with strings opened up: their decoded characters are tokens of their own.

use super::value::MAX_NUMBER_CHARS;

/// What the lexer hands to the grammar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Name(String),
    /// As written.
    Number(String),
    Punct(char),
    StringOpen(StringOpen),
    /// A character of the string's value.
    StringChar(char),
    StringClose,
}

/// The opening of a string literal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StringOpen {
    /// An f-string; a placeholder in it is an error.
    pub format: bool,
    pub quote: char,
    pub triple: bool,
    /// Byte offset behind the opening quotes.
    pub start: usize,
}

/// The state between two characters.
#[derive(Default)]
pub(super) struct Lexer {
    state: State,
    /// Bytes pushed so far.
    offset: usize,
}

#[derive(Default)]
enum State {
    #[default]
    Between,
    Comment,
    /// A backslash outside strings: joins lines.
    LineJoin,
    /// A dot: of a name or of a number.
    Dot,
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
    /// The first half of a surrogate pair written as two escapes.
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

/// Where tokens go; it answers `None` when it cannot take one.
pub(super) trait Sink {
    fn token(&mut self, token: Token) -> Option<()>;
}

impl Lexer {
    /// True when every character pushed has become part of a token.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Between)
    }

    /// True inside a string literal.
    pub fn is_in_string(&self) -> bool {
        matches!(self.state, State::Text(_))
    }

    /// `None` when there is no such Python, or the sink refused a token.
    pub fn push(&mut self, c: char, sink: &mut impl Sink) -> Option<()> {
        self.offset += c.len_utf8();
        match std::mem::take(&mut self.state) {
            State::Between => self.between(c, sink)?,
            State::Comment if c == '\n' => {}
            State::Comment => self.state = State::Comment,
            State::LineJoin if c == '\n' => {}
            State::LineJoin => return None,
            State::Dot if c.is_ascii_digit() => self.state = State::Number(format!(".{c}")),
            State::Dot => {
                sink.token(Token::Punct('.'))?;
                self.between(c, sink)?;
            }
            State::Name(mut name) if is_name_char(c) => {
                name.push(c);
                self.state = State::Name(name);
            }
            State::Name(name) if matches!(c, '\'' | '"') => {
                let prefix = string_prefix(&name)?;
                self.state = State::Quotes {
                    prefix,
                    quote: c,
                    count: 1,
                };
            }
            State::Name(name) => {
                sink.token(Token::Name(name))?;
                self.between(c, sink)?;
            }
            State::Number(mut number) if continues_number(&number, c) => {
                number.push(c);
                if number.len() > MAX_NUMBER_CHARS {
                    return None;
                }
                self.state = State::Number(number);
            }
            State::Number(number) => {
                sink.token(Token::Number(number))?;
                self.between(c, sink)?;
            }
            State::Quotes { prefix, quote, count } => self.quotes(prefix, quote, count, c, sink)?,
            State::Text(mut text) => {
                if text.push(c, sink)? {
                    self.state = State::Text(text);
                }
            }
        }
        Some(())
    }

    fn between(&mut self, c: char, sink: &mut impl Sink) -> Option<()> {
        self.state = match c {
            c if c.is_whitespace() => return Some(()),
            '#' => State::Comment,
            '\\' => State::LineJoin,
            '.' => State::Dot,
            '\'' | '"' => State::Quotes {
                prefix: Prefix::default(),
                quote: c,
                count: 1,
            },
            c if c.is_ascii_digit() => State::Number(c.into()),
            c if is_name_char(c) => State::Name(c.into()),
            '[' | ']' | '(' | ')' | '{' | '}' | ',' | ':' | '=' | '+' | '-' | '*' => {
                return sink.token(Token::Punct(c));
            }
            _ => return None,
        };
        Some(())
    }

    /// After the first or the second quote: a string, a triple-quoted one, or an empty one that is over.
    fn quotes(&mut self, prefix: Prefix, quote: char, count: u8, c: char, sink: &mut impl Sink) -> Option<()> {
        let triple = count == 2 && c == quote;
        if count == 1 && c == quote {
            self.state = State::Quotes {
                prefix,
                quote,
                count: 2,
            };
            return Some(());
        }
        let start = match (count, triple) {
            (1, _) => self.offset - c.len_utf8(),
            (_, true) => self.offset,
            (_, false) => self.offset - c.len_utf8() - quote.len_utf8(),
        };
        sink.token(Token::StringOpen(StringOpen {
            format: prefix.format,
            quote,
            triple,
            start,
        }))?;
        if count == 2 && !triple {
            sink.token(Token::StringClose)?;
            return self.between(c, sink);
        }
        let mut text = Text {
            prefix,
            quote,
            triple,
            run: 0,
            escape: Escape::No,
            brace: None,
            high_surrogate: None,
        };
        if triple || text.push(c, sink)? {
            self.state = State::Text(text);
        }
        Some(())
    }
}

impl Text {
    /// False when the string is over.
    fn push(&mut self, c: char, sink: &mut impl Sink) -> Option<bool> {
        match std::mem::replace(&mut self.escape, Escape::No) {
            Escape::No => {}
            Escape::Raw => {
                self.send(c, sink)?;
                return Some(true);
            }
            Escape::Backslash => {
                self.escaped(c, sink)?;
                return Some(true);
            }
            Escape::Hex { left, value } => {
                let value = (value << 4) | c.to_digit(16)?;
                match left {
                    1 => self.code(value, sink)?,
                    _ => self.escape = Escape::Hex { left: left - 1, value },
                }
                return Some(true);
            }
            Escape::Octal { left, value } => {
                if let (1.., Some(digit)) = (left, c.to_digit(8)) {
                    self.escape = Escape::Octal {
                        left: left - 1,
                        value: (value << 3) | digit,
                    };
                    return Some(true);
                }
                self.code(value, sink)?;
            }
        }
        if let Some(brace) = self.brace.take() {
            if c != brace {
                return None; // A placeholder: its value is not known.
            }
            self.send(c, sink)?;
        } else if c == self.quote {
            self.run += 1;
            if !self.triple || self.run == 3 {
                self.flush_surrogate(sink)?;
                sink.token(Token::StringClose)?;
                return Some(false);
            }
        } else {
            for _ in 0..std::mem::take(&mut self.run) {
                self.send(self.quote, sink)?;
            }
            match c {
                '\\' if self.prefix.raw => {
                    self.send('\\', sink)?;
                    self.escape = Escape::Raw;
                }
                '\\' => self.escape = Escape::Backslash,
                '{' | '}' if self.prefix.format => self.brace = Some(c),
                _ => self.send(c, sink)?,
            }
        }
        Some(true)
    }

    /// The character behind a backslash. An escape that Python does not know stays as it is written.
    fn escaped(&mut self, c: char, sink: &mut impl Sink) -> Option<()> {
        let value = match c {
            '\n' => return Some(()),
            'a' => '\u{7}',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'v' => '\u{b}',
            '\\' | '\'' | '"' => c,
            // The table of Unicode names is not worth its size.
            'N' => return None,
            'x' | 'u' | 'U' => {
                let left = if c == 'x' { 2 } else { 4 << u8::from(c == 'U') };
                self.escape = Escape::Hex { left, value: 0 };
                return Some(());
            }
            '0'..='7' => {
                self.escape = Escape::Octal {
                    left: 2,
                    value: c.to_digit(8)?,
                };
                return Some(());
            }
            _ => {
                self.send('\\', sink)?;
                c
            }
        };
        self.send(value, sink)
    }

    /// A code point written as an escape; surrogate pairs become one character.
    fn code(&mut self, code: u32, sink: &mut impl Sink) -> Option<()> {
        match code {
            0xd800..0xdc00 => {
                self.flush_surrogate(sink)?;
                self.high_surrogate = Some(code);
                Some(())
            }
            0xdc00..0xe000 => {
                let high = self.high_surrogate.take();
                let joined = high.and_then(|high| char::from_u32(0x10000 + ((high - 0xd800) << 10) + (code - 0xdc00)));
                self.send(joined.unwrap_or(char::REPLACEMENT_CHARACTER), sink)
            }
            _ => self.send(char::from_u32(code)?, sink),
        }
    }

    fn send(&mut self, c: char, sink: &mut impl Sink) -> Option<()> {
        self.flush_surrogate(sink)?;
        sink.token(Token::StringChar(c))
    }

    /// Half a pair is no character.
    fn flush_surrogate(&mut self, sink: &mut impl Sink) -> Option<()> {
        match self.high_surrogate.take() {
            Some(_) => sink.token(Token::StringChar(char::REPLACEMENT_CHARACTER)),
            None => Some(()),
        }
    }
}

fn is_name_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn continues_number(number: &str, c: char) -> bool {
    let hexadecimal = number.starts_with("0x") || number.starts_with("0X");
    let exponent_sign = matches!(c, '+' | '-') && number.ends_with(['e', 'E']) && !hexadecimal;
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.') || exponent_sign
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
