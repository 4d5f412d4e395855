//! EBNF as llama.cpp and xgrammar write it (`root ::= "a" | other+`), in llguidance's Lark.
//!
//! Lark splits text into terminals, greedily; EBNF works on characters. What does not recur becomes one terminal, a regular
//! expression, so that there is nothing to split; only what recurs becomes rules.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use super::{GrammarError, GrammarOptions, lark, schema};

/// Largest grammar in bytes and in rules, and its deepest nesting.
const MAX_BYTES: usize = 256 << 10;
const MAX_RULES: usize = 5_000;
const MAX_DEPTH: usize = 100;

/// A Lark grammar with a rule `start`. Text without `::=` is taken to be Lark already.
///
/// # Errors
/// Malformed, too large, or a rule that is missing.
pub(super) fn to_lark(text: &str, options: &GrammarOptions) -> Result<String, GrammarError> {
    if text.len() > MAX_BYTES {
        return Err(GrammarError::invalid(format!(
            "the grammar has {} bytes; at most {MAX_BYTES} are compiled",
            text.len()
        )));
    }
    if !text.contains("::=") {
        check_nesting(text)?;
        return prepare_schemas(text, options);
    }
    let rules = Parser::new(text).rules()?;
    Translation::new(&rules)?.lark()
}

/// Lark's own parser is recursive. Brackets inside strings, patterns and comments do not count.
fn check_nesting(text: &str) -> Result<(), GrammarError> {
    let mut depth = 0_usize;
    let mut bytes = text.bytes().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            b'#' => bytes.by_ref().take_while(|&byte| byte != b'\n').for_each(drop),
            b'/' if bytes.peek() == Some(&b'/') => bytes.by_ref().take_while(|&byte| byte != b'\n').for_each(drop),
            b'"' | b'/' => {
                while let Some(inner) = bytes.next() {
                    match inner {
                        b'\\' => drop(bytes.next()),
                        inner if inner == byte => break,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        if depth > MAX_DEPTH {
            return Err(GrammarError::invalid("the grammar is nested too deeply"));
        }
    }
    Ok(())
}

/// Schemas inside a Lark grammar go through the same checks as others.
fn prepare_schemas(text: &str, options: &GrammarOptions) -> Result<String, GrammarError> {
    const KEYWORD: &str = "%json";
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(KEYWORD) {
        let (before, after) = rest.split_at(at + KEYWORD.len());
        out.push_str(before);
        let mut values = serde_json::Deserializer::from_str(after).into_iter();
        let value = values
            .next()
            .and_then(Result::ok)
            .ok_or_else(|| GrammarError::invalid("%json must be followed by a JSON schema"))?;
        let _ = write!(out, " {}", schema::prepare(&value, options)?);
        rest = &after[values.byte_offset()..];
    }
    out.push_str(rest);
    Ok(out)
}

#[derive(Clone, Debug, PartialEq)]
enum Node {
    Literal(String),
    /// A regular expression of one character.
    Class(String),
    Rule(String),
    Sequence(Vec<Node>),
    Alternatives(Vec<Node>),
    Repeat(Box<Node>, u32, Option<u32>),
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, at: 0, depth: 0 }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn bump(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn error(&self, what: &str) -> GrammarError {
        let line = 1 + self.text[..self.at].matches('\n').count();
        GrammarError::invalid(format!("the grammar is malformed in line {line}: {what}"))
    }

    fn skip_blanks(&mut self) {
        loop {
            let rest = self.rest();
            let trimmed = rest.trim_start();
            self.at += rest.len() - trimmed.len();
            if !(trimmed.starts_with('#') || trimmed.starts_with("//")) {
                return;
            }
            self.at += trimmed.find('\n').unwrap_or(trimmed.len());
        }
    }

    fn name(&mut self) -> Option<&'a str> {
        let rest = self.rest();
        if !rest.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
            return None;
        }
        let len = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-')))
            .unwrap_or(rest.len());
        self.at += len;
        Some(&rest[..len])
    }

    fn rules(mut self) -> Result<Vec<(String, Node)>, GrammarError> {
        let mut rules = Vec::new();
        self.skip_blanks();
        while !self.rest().is_empty() {
            let name = self.name().ok_or_else(|| self.error("a rule's name is missing"))?;
            self.skip_blanks();
            if !self.eat("::=") {
                return Err(self.error("`::=` is missing"));
            }
            let body = self.alternatives()?;
            rules.push((name.to_owned(), body));
            if rules.len() > MAX_RULES {
                return Err(GrammarError::invalid(format!(
                    "the grammar has more than {MAX_RULES} rules"
                )));
            }
            self.skip_blanks();
        }
        Ok(rules)
    }

    fn alternatives(&mut self) -> Result<Node, GrammarError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.error("it is nested too deeply"));
        }
        let mut options = vec![self.sequence()?];
        while self.eat("|") {
            options.push(self.sequence()?);
        }
        self.depth -= 1;
        Ok(match options.len() {
            1 => options.remove(0),
            _ => Node::Alternatives(options),
        })
    }

    /// Stops before `|`, `)`, the end, and the name of the next rule.
    fn sequence(&mut self) -> Result<Node, GrammarError> {
        let mut parts = Vec::new();
        loop {
            self.skip_blanks();
            let start = self.at;
            let part = match self.peek() {
                None | Some('|' | ')') => break,
                Some(quote @ ('"' | '\'')) => Node::Literal(self.literal(quote)?),
                Some('[') => self.class()?,
                Some('.') => {
                    self.bump();
                    Node::Class("[^\\n]".into())
                }
                Some('(') => {
                    self.bump();
                    let inner = self.alternatives()?;
                    if !self.eat(")") {
                        return Err(self.error("`)` is missing"));
                    }
                    inner
                }
                Some(_) => {
                    let name = self.name().ok_or_else(|| self.error("an unexpected character"))?;
                    self.skip_blanks();
                    if self.rest().starts_with("::=") {
                        self.at = start;
                        break;
                    }
                    // Blanks before a repetition belong to nothing.
                    Node::Rule(name.to_owned())
                }
            };
            let part = self.repeated(part)?;
            parts.push(part);
        }
        Ok(match parts.len() {
            1 => parts.remove(0),
            _ => Node::Sequence(parts),
        })
    }

    fn repeated(&mut self, mut part: Node) -> Result<Node, GrammarError> {
        loop {
            let (min, max) = match self.peek() {
                Some('?') => (0, Some(1)),
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('{') => {
                    let (min, max) = self.range()?;
                    part = Node::Repeat(Box::new(part), min, max);
                    continue;
                }
                _ => return Ok(part),
            };
            self.bump();
            part = Node::Repeat(Box::new(part), min, max);
        }
    }

    /// `{n}`, `{n,}`, `{,m}` or `{n,m}`.
    fn range(&mut self) -> Result<(u32, Option<u32>), GrammarError> {
        const MAX_REPEATS: u32 = 10_000;
        let end = self.rest().find('}').ok_or_else(|| self.error("`}` is missing"))?;
        let inner = &self.rest()[1..end];
        let number = |text: &str| text.trim().parse::<u32>().ok().filter(|&n| n <= MAX_REPEATS);
        let range = match inner.split_once(',') {
            None => number(inner).map(|n| (n, Some(n))),
            Some((min, max)) => {
                let min = if min.trim().is_empty() { Some(0) } else { number(min) };
                let max = if max.trim().is_empty() {
                    Some(None)
                } else {
                    number(max).map(Some)
                };
                min.zip(max)
            }
        };
        let range = range
            .filter(|(min, max)| max.is_none_or(|max| max >= *min))
            .ok_or_else(|| self.error("a repetition needs one or two numbers up to 10000"))?;
        self.at += end + 1;
        Ok(range)
    }

    fn literal(&mut self, quote: char) -> Result<String, GrammarError> {
        self.bump();
        let mut text = String::new();
        loop {
            match self.bump() {
                None | Some('\n') => return Err(self.error("a string does not end")),
                Some(c) if c == quote => return Ok(text),
                Some('\\') => text.push(self.escape()?),
                Some(c) => text.push(c),
            }
        }
    }

    fn escape(&mut self) -> Result<char, GrammarError> {
        let digits = match self.bump() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(c) => return Ok(c),
            None => return Err(self.error("an escape does not end")),
        };
        let code = self
            .rest()
            .get(..digits)
            .and_then(|hex| u32::from_str_radix(hex, 16).ok())
            .and_then(char::from_u32)
            .ok_or_else(|| self.error("an escape that is no character"))?;
        self.at += digits;
        Ok(code)
    }

    fn class(&mut self) -> Result<Node, GrammarError> {
        self.bump();
        let mut class = String::from("[");
        if self.eat("^") {
            class.push('^');
        }
        let mut is_empty = true;
        loop {
            let low = match self.bump() {
                None => return Err(self.error("`]` is missing")),
                Some(']') => break,
                Some('\\') => self.escape()?,
                Some(c) => c,
            };
            is_empty = false;
            let is_range = self.rest().starts_with('-') && !self.rest().starts_with("-]");
            let high = if is_range {
                self.bump();
                match self.bump() {
                    None => return Err(self.error("`]` is missing")),
                    Some('\\') => self.escape()?,
                    Some(c) => c,
                }
            } else {
                low
            };
            if high < low {
                return Err(self.error("a range of characters runs backwards"));
            }
            let _ = write!(class, "\\x{{{:x}}}-\\x{{{:x}}}", low as u32, high as u32);
        }
        if is_empty {
            return Err(self.error("a class has no characters"));
        }
        class.push(']');
        Ok(Node::Class(class))
    }
}

/// Rules on their way to Lark. Terminals are named `T…`, rules `r…`.
struct Translation<'a> {
    rules: &'a [(String, Node)],
    index: HashMap<&'a str, usize>,
    /// Rules that recur, or use one that does.
    recursive: HashSet<usize>,
    lines: Vec<String>,
    num_terminals: usize,
}

impl<'a> Translation<'a> {
    fn new(rules: &'a [(String, Node)]) -> Result<Self, GrammarError> {
        let mut index = HashMap::new();
        for (i, (name, _)) in rules.iter().enumerate() {
            if index.insert(name.as_str(), i).is_some() {
                return Err(GrammarError::invalid(format!(
                    "the grammar defines the rule {name:?} twice"
                )));
            }
        }
        if !index.contains_key("root") {
            return Err(GrammarError::invalid("the grammar has no rule \"root\""));
        }
        let mut uses: Vec<Vec<usize>> = Vec::with_capacity(rules.len());
        for (_, body) in rules {
            let mut names = Vec::new();
            body.names(&mut names);
            let mut used = Vec::with_capacity(names.len());
            for name in names {
                used.push(
                    *index
                        .get(name)
                        .ok_or_else(|| GrammarError::invalid(format!("the grammar has no rule {name:?}")))?,
                );
            }
            uses.push(used);
        }
        Ok(Self {
            rules,
            index,
            recursive: recursive_rules(&uses),
            lines: Vec::new(),
            num_terminals: rules.len(),
        })
    }

    fn lark(mut self) -> Result<String, GrammarError> {
        for (i, (_, body)) in self.rules.iter().enumerate() {
            let line = if self.recursive.contains(&i) {
                format!("r{i}: {}", self.rule(body))
            } else {
                format!("T{i}: {}", self.terminal(body))
            };
            self.lines.push(line);
        }
        let root = self.index["root"];
        let start = if self.recursive.contains(&root) {
            format!("start: r{root}\n")
        } else {
            format!("start: T{root}\n")
        };
        Ok(start + &self.lines.join("\n"))
    }

    fn is_terminal(&self, node: &Node) -> bool {
        let mut names = Vec::new();
        node.names(&mut names);
        names
            .iter()
            .all(|name| self.index.get(name).is_some_and(|i| !self.recursive.contains(i)))
    }

    /// An expression of terminals alone.
    fn terminal(&self, node: &Node) -> String {
        match node {
            Node::Literal(text) => lark::literal(text),
            Node::Class(class) => format!("/{class}/"),
            Node::Rule(name) => format!("T{}", self.index[name.as_str()]),
            Node::Sequence(parts) if parts.is_empty() => lark::literal(""),
            Node::Sequence(parts) => format!("({})", self.each(parts, " ", Self::terminal)),
            Node::Alternatives(options) => format!("({})", self.each(options, " | ", Self::terminal)),
            Node::Repeat(inner, min, max) => repeat(&format!("({})", self.terminal(inner)), *min, *max),
        }
    }

    fn each(&self, nodes: &[Node], separator: &str, text: impl Fn(&Self, &Node) -> String) -> String {
        nodes
            .iter()
            .map(|node| text(self, node))
            .collect::<Vec<_>>()
            .join(separator)
    }

    /// An expression of rules, with the runs of terminals between them as one terminal each.
    fn rule(&mut self, node: &Node) -> String {
        if self.is_terminal(node) {
            return self.named_terminal(node);
        }
        match node {
            Node::Rule(name) => format!("r{}", self.index[name.as_str()]),
            Node::Sequence(parts) => {
                let mut out = Vec::new();
                let mut run: Vec<Node> = Vec::new();
                for part in parts {
                    if self.is_terminal(part) {
                        run.push(part.clone());
                        continue;
                    }
                    if !run.is_empty() {
                        let run = Node::Sequence(std::mem::take(&mut run));
                        out.push(self.named_terminal(&run));
                    }
                    out.push(self.rule(part));
                }
                if !run.is_empty() {
                    out.push(self.named_terminal(&Node::Sequence(run)));
                }
                format!("({})", out.join(" "))
            }
            Node::Alternatives(options) => {
                let options: Vec<String> = options.iter().map(|option| self.rule(option)).collect();
                format!("({})", options.join(" | "))
            }
            Node::Repeat(inner, min, max) => {
                let inner = format!("({})", self.rule(inner));
                repeat(&inner, *min, *max)
            }
            Node::Literal(_) | Node::Class(_) => self.named_terminal(node),
        }
    }

    /// A terminal of its own. In a rule one that matches nothing is left out instead.
    fn named_terminal(&mut self, node: &Node) -> String {
        let expression = self.terminal(node);
        let id = self.num_terminals;
        self.num_terminals += 1;
        let name = format!("T{id}");
        self.lines.push(if self.may_be_empty(node, &mut HashMap::new()) {
            format!("{name}: ({expression}) & /(?s:.+)/")
        } else {
            format!("{name}: {expression}")
        });
        if self.may_be_empty(node, &mut HashMap::new()) {
            format!("({name})?")
        } else {
            name
        }
    }

    /// Of terminals; `known` holds what has been found for rules.
    fn may_be_empty(&self, node: &Node, known: &mut HashMap<usize, bool>) -> bool {
        match node {
            Node::Literal(text) => text.is_empty(),
            Node::Class(_) => false,
            Node::Rule(name) => {
                let i = self.index[name.as_str()];
                if let Some(&known) = known.get(&i) {
                    return known;
                }
                let empty = self.may_be_empty(&self.rules[i].1, known);
                known.insert(i, empty);
                empty
            }
            Node::Sequence(parts) => parts.iter().all(|part| self.may_be_empty(part, known)),
            Node::Alternatives(options) => options.iter().any(|option| self.may_be_empty(option, known)),
            Node::Repeat(inner, min, _) => *min == 0 || self.may_be_empty(inner, known),
        }
    }
}

impl Node {
    fn names<'n>(&'n self, out: &mut Vec<&'n str>) {
        match self {
            Node::Rule(name) => out.push(name),
            Node::Sequence(nodes) | Node::Alternatives(nodes) => nodes.iter().for_each(|node| node.names(out)),
            Node::Repeat(inner, ..) => inner.names(out),
            Node::Literal(_) | Node::Class(_) => {}
        }
    }
}

fn repeat(inner: &str, min: u32, max: Option<u32>) -> String {
    match (min, max) {
        (0, None) => format!("{inner}*"),
        (1, None) => format!("{inner}+"),
        (0, Some(1)) => format!("{inner}?"),
        (min, None) => format!("{inner}{{{min},}}"),
        (min, Some(max)) => format!("{inner}{{{min},{max}}}"),
    }
}

/// Rules on a cycle of uses, and those from which one is reached.
fn recursive_rules(uses: &[Vec<usize>]) -> HashSet<usize> {
    // A rule is finite when all that it uses is: peel those off, and what is left recurs.
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); uses.len()];
    let mut open: Vec<usize> = uses.iter().map(Vec::len).collect();
    for (user, used) in uses.iter().enumerate() {
        for &i in used {
            users[i].push(user);
        }
    }
    let mut finite: Vec<usize> = (0..uses.len()).filter(|&i| open[i] == 0).collect();
    let mut recursive: HashSet<usize> = (0..uses.len()).collect();
    while let Some(i) = finite.pop() {
        recursive.remove(&i);
        for &user in &users[i] {
            open[user] -= 1;
            if open[user] == 0 {
                finite.push(user);
            }
        }
    }
    recursive
}
