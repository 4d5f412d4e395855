//! A template's source, tag by tag: the rewriting and the questions that a Jinja parser does not offer.

use std::ops::Range;

/// What stands between `{%` and `%}`, without the signs of whitespace control.
struct Tag<'a> {
    /// Its first word.
    keyword: &'a str,
    keyword_range: Range<usize>,
    /// What follows the word, trimmed.
    rest: &'a str,
    rest_range: Range<usize>,
}

/// All block tags outside comments, expressions and `raw` blocks. An unterminated one ends the list: the parser will say
/// what is wrong.
fn tags(source: &str) -> Vec<Tag<'_>> {
    let mut tags = Vec::new();
    let mut at = 0;
    while let Some(open) = source[at..].find('{').map(|offset| at + offset) {
        let Some(end) = (match source.as_bytes().get(open + 1) {
            Some(b'#') => source[open + 2..].find("#}").map(|offset| open + 2 + offset + 2),
            Some(b'{') => code_end(source, open + 2, "}}"),
            Some(b'%') => code_end(source, open + 2, "%}"),
            _ => Some(open + 1),
        }) else {
            break;
        };
        at = end;
        if source[open..].starts_with("{%") {
            let tag = tag(source, open + 2..end - 2);
            if tag.keyword == "raw" {
                let Some(after) = end_of_raw(source, end) else { break };
                at = after;
            } else {
                tags.push(tag);
            }
        }
    }
    tags
}

fn tag(source: &str, mut inside: Range<usize>) -> Tag<'_> {
    if source[inside.clone()].starts_with(['-', '+']) {
        inside.start += 1;
    }
    if source[inside.clone()].ends_with(['-', '+']) {
        inside.end -= 1;
    }
    let text = &source[inside.clone()];
    let start = inside.start + (text.len() - text.trim_start().len());
    let text = text.trim();
    let len = text
        .find(|c: char| !(c.is_alphanumeric() || c == '_'))
        .unwrap_or(text.len());
    let rest = text[len..].trim();
    let rest_start = start + text.len() - rest.len();
    Tag {
        keyword: &text[..len],
        keyword_range: start..start + len,
        rest,
        rest_range: rest_start..rest_start + rest.len(),
    }
}

/// The offset after `close`, strings and braces skipped.
fn code_end(source: &str, from: usize, close: &str) -> Option<usize> {
    let bytes = source.as_bytes();
    let (mut at, mut braces) = (from, 0usize);
    while at < bytes.len() {
        match bytes[at] {
            _ if braces == 0 && bytes[at..].starts_with(close.as_bytes()) => return Some(at + close.len()),
            quote @ (b'"' | b'\'') => {
                at += 1;
                while *bytes.get(at)? != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            b'{' => braces += 1,
            b'}' => braces = braces.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    None
}

fn end_of_raw(source: &str, mut at: usize) -> Option<usize> {
    loop {
        let open = at + source[at..].find("{%")?;
        let close = open + 2 + source[open + 2..].find("%}")?;
        if tag(source, open + 2..close).keyword == "endraw" {
            return Some(close + 2);
        }
        at = open + 2;
    }
}

/// The filter that [`as_minijinja`] puts on what a loop runs over.
pub const LOOP_CHECK: &str = "checked_iterable";

/// The source as minijinja takes it. transformers' `{% generation %}` … `{% endgeneration %}`, which only marks assistant
/// tokens for training, becomes an empty scope: `{% with %}` … `{% endwith %}`. `{% for x in e %}` becomes
/// `{% for x in (e)|checked_iterable %}`. Whitespace control stays as it is.
pub fn as_minijinja(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut copied = 0;
    for tag in tags(source) {
        let (range, replacement) = match (tag.keyword, tag.rest) {
            ("generation", "") => (tag.keyword_range, "with".to_owned()),
            ("endgeneration", "") => (tag.keyword_range, "endwith".to_owned()),
            ("for", rest) => {
                let Some(iterated) = iterated(rest) else { continue };
                let at = tag.rest_range.start;
                let text = format!("({})|{LOOP_CHECK}", &rest[iterated.clone()]);
                (at + iterated.start..at + iterated.end, text)
            }
            _ => continue,
        };
        out.push_str(&source[copied..range.start]);
        out.push_str(&replacement);
        copied = range.end;
    }
    out.push_str(&source[copied..]);
    out
}

/// Where `e` stands in `x, y in e if c recursive`.
fn iterated(rest: &str) -> Option<Range<usize>> {
    let start = outer_word(rest, 0, &["in"])? + "in".len();
    let end = outer_word(rest, start, &["if", "recursive"]).unwrap_or(rest.len());
    let text = rest[start..end].trim();
    let start = start + (rest[start..end].len() - rest[start..end].trim_start().len());
    (!text.is_empty()).then_some(start..start + text.len())
}

/// The first of `words` that stands outside strings and brackets.
fn outer_word(text: &str, from: usize, words: &[&str]) -> Option<usize> {
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (from, 0usize);
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while *bytes.get(at)? != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            byte if byte.is_ascii_alphabetic() || byte == b'_' => {
                let is_word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
                let end = at + bytes[at..].iter().take_while(|b| is_word(b)).count();
                let attribute = at > 0 && bytes[at - 1] == b'.';
                if depth == 0 && !attribute && words.contains(&&text[at..end]) {
                    return Some(at);
                }
                at = end;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// True when the template loops over a message's content, so that it wants a list of parts ("openai" format); false when
/// it wants a string. As vLLM detects it: `for part in message.content` with `message` from a loop over `messages`.
pub fn iterates_content(source: &str) -> bool {
    let (mut lists, mut messages, mut loops) = (vec!["messages"], Vec::new(), Vec::new());
    for tag in tags(source) {
        match tag.keyword {
            "set" => {
                if let Some((name, value)) = tag.rest.split_once('=') {
                    let base = base_of(value);
                    if lists.iter().any(|list| is_element_of(base, list)) {
                        // `set messages = messages[1:]` and `set first = messages[0]` look alike.
                        lists.push(name.trim());
                        messages.push(name.trim());
                    }
                }
            }
            "for" => {
                if let Some((name, iterated)) = tag.rest.split_once(" in ") {
                    let base = base_of(iterated);
                    if lists.iter().any(|list| is_element_of(base, list)) {
                        messages.push(name.trim());
                    }
                    loops.push(base);
                }
            }
            _ => {}
        }
    }
    loops.iter().any(|base| {
        messages.iter().any(|message| {
            base.strip_prefix(message).is_some_and(|access| {
                let access = access.split_once("[:").map_or(access, |(access, _)| access);
                [".content", "['content']", "[\"content\"]"].contains(&access.trim_end())
            })
        })
    })
}

/// An expression without its filters, loop condition and `recursive`.
fn base_of(expression: &str) -> &str {
    let end = ["|", " if ", " recursive"]
        .iter()
        .filter_map(|end| expression.find(end))
        .min();
    expression[..end.unwrap_or(expression.len())].trim()
}

/// `name`, or an element or slice of it.
fn is_element_of(expression: &str, name: &str) -> bool {
    expression
        .strip_prefix(name)
        .is_some_and(|access| access.is_empty() || access.starts_with('['))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_become_scopes_with_their_whitespace_control() {
        let source = "{%- generation -%}x{%+endgeneration+%}{%generation%}{% endgeneration %}{%-  generation\n-%}";
        let expected = "{%- with -%}x{%+endwith+%}{%with%}{% endwith %}{%-  with\n-%}";
        assert_eq!(as_minijinja(source), expected);
    }

    #[test]
    fn loops_check_what_they_run_over() {
        for (source, expected) in [
            ("{% for x in a %}", "{% for x in (a)|checked_iterable %}"),
            (
                "{%- for k, v in m.items() | sort if v in k recursive -%}",
                "{%- for k, v in (m.items() | sort)|checked_iterable if v in k recursive -%}",
            ),
            (
                "{% for x in f(a if b else ' if ') + [1] %}",
                "{% for x in (f(a if b else ' if ') + [1])|checked_iterable %}",
            ),
            ("{% for x in o.if %}", "{% for x in (o.if)|checked_iterable %}"),
        ] {
            assert_eq!(as_minijinja(source), expected);
        }
        for source in [
            "{% raw %}{%}{% for x in a %}",
            "{% raw %}{%-%}{% endraw %}{%%}",
            "{%}",
            "{% for %}",
            "{% for x in %}",
            "{% for x %}",
            "{% for x in 'a %}",
        ] {
            assert_eq!(as_minijinja(source), source);
        }
    }

    #[test]
    fn other_places_of_the_word_stay() {
        for source in [
            "generation {# {% generation %} #} {{ '{% generation %}' }} {{ {'a': {}}['{%'] }}",
            "{% raw %}{% generation %}{%- endraw %}",
            "{% set generation = 1 %}{% if generation %}{% endif %}{{ \"\\\"{% generation %}\" }}",
            "{% set x = '%} {% generation %}' %}",
            "{% generation",
            "{{ 'open",
            "{",
            "{%",
            "{%}",
            "{%-%}",
            "{{}}",
        ] {
            assert_eq!(as_minijinja(source), source);
        }
    }

    #[test]
    fn content_loops_mean_parts() {
        for source in [
            "{% for message in messages %}{% for c in message['content'] %}{% endfor %}{% endfor %}",
            "{%- for m in messages[1:] -%}{%- for c in m.content | selectattr('type') -%}{% endfor %}{% endfor %}",
            "{% set loop_messages = messages[1:] %}{% for m in loop_messages %}{% for c in m[\"content\"] if c %}{% endfor %}{% endfor %}",
            "{% set first = messages[0] %}{% for c in first.content %}{% endfor %}",
        ] {
            assert!(iterates_content(source), "{source}");
        }
        for source in [
            "{% for message in messages %}{{ message.content }}{% endfor %}",
            "{% for message in messages %}{% for c in message.tool_calls %}{% endfor %}{% endfor %}",
            "{% macro m(content) %}{% for c in content %}{% endfor %}{% endmacro %}{% for x in messages %}{{ m(x.content) }}{% endfor %}",
        ] {
            assert!(!iterates_content(source), "{source}");
        }
    }
}
