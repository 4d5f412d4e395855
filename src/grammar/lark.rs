//! Pieces of llguidance's Lark dialect.

use llguidance::derivre::RegexBuilder;
use llguidance::regex_to_lark;
use serde_json::Value;

use super::GrammarError;

/// A literal, as a rule or a terminal takes it.
pub(super) fn literal(text: &str) -> String {
    // The dialect's strings are JSON's, but DEL must be escaped too.
    Value::String(text.to_owned()).to_string().replace('\u{7f}', "\\u007f")
}

/// A regular expression, as a rule or a terminal takes it. Python's meaning: `.` is no newline, `\d` is Unicode's.
pub(super) fn regex(pattern: &str) -> String {
    if pattern.is_empty() {
        return literal("");
    }
    format!("/{}/", regex_to_lark(pattern, ""))
}

/// # Errors
/// It is malformed, too long, or uses what only a backtracking engine has (look-around, back-references).
pub(super) fn check_regex(pattern: &str) -> Result<(), GrammarError> {
    const MAX_BYTES: usize = 64 << 10;
    if pattern.len() > MAX_BYTES {
        return Err(GrammarError::invalid(format!(
            "the regular expression has more than {MAX_BYTES} bytes"
        )));
    }
    match RegexBuilder::new().mk_regex(&regex_to_lark(pattern, "")) {
        Ok(_) => Ok(()),
        Err(error) => Err(GrammarError::invalid(format!(
            "the regular expression cannot be used: {}",
            super::compiler::last_line(&error)
        ))),
    }
}

/// A regular expression that matches exactly `text`, for use inside a larger one.
pub(super) fn escaped(text: &str) -> String {
    text.chars().fold(String::new(), |mut pattern, c| {
        match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' => pattern.push(c),
            c => pattern.push_str(&format!("\\x{{{:x}}}", c as u32)),
        }
        pattern
    })
}

/// Anchors of a pattern that must match everything anyway.
pub(super) fn without_anchors(pattern: &str) -> &str {
    let inner = pattern.strip_prefix('^').unwrap_or(pattern);
    let escapes = inner
        .strip_suffix('$')
        .map_or(0, |head| head.bytes().rev().take_while(|&byte| byte == b'\\').count());
    // An anchor of one alternative is none of the whole.
    let has_alternatives = has_alternatives(inner);
    match inner.strip_suffix('$') {
        Some(head) if escapes.is_multiple_of(2) && !has_alternatives => head,
        _ if has_alternatives => pattern,
        _ => inner,
    }
}

/// Whether a `|` stands outside every group and class.
fn has_alternatives(pattern: &str) -> bool {
    let (mut depth, mut in_class, mut escaped) = (0_i32, false, false);
    for c in pattern.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ']' if in_class => in_class = false,
            _ if in_class => {}
            '[' => in_class = true,
            '(' => depth += 1,
            ')' => depth -= 1,
            '|' if depth == 0 => return true,
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_of_the_whole_are_dropped() {
        for (pattern, inner) in [
            ("^ab$", "ab"),
            ("ab", "ab"),
            (r"^a\$", r"a\$"),
            (r"^a\\$", r"a\\"),
            ("^(a|b)$", "(a|b)"),
            ("^[|]$", "[|]"),
            ("^a|b$", "^a|b$"),
        ] {
            assert_eq!(without_anchors(pattern), inner, "{pattern}");
        }
    }

    #[test]
    fn literals_are_escaped() {
        assert_eq!(literal("a\"\n\u{7f}"), r#""a\"\n\u007f""#);
        assert_eq!(escaped("a<é"), r"a\x{3c}\x{e9}");
        assert_eq!(regex("a/b"), r"/a\/b/");
    }
}
