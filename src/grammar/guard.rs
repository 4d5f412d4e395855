//! Cuts short JSON that could go on for ever: digits, blanks and string characters without end.
//!
//! A schema without bounds allows `1111…` and `"aaaa…`, and a model at a low temperature does loop in them. The guard
//! follows the text through JSON's tokens, outside the automaton, where a bound costs no states; when one is reached it takes
//! away the tokens that would go on, unless nothing else is allowed.

use std::sync::Arc;

/// Digits in a row, in a number's integer part or fraction. JSON readers keep 17.
const MAX_DIGITS: usize = 30;
/// Digits of an exponent: more would overflow a double.
const MAX_EXPONENT_DIGITS: usize = 2;
/// White space in a row; only a request's own `whitespace_pattern` gets here.
const MAX_BLANKS: usize = 64;
/// Bytes of one string.
pub(super) const MAX_STRING_BYTES: usize = 1 << 16;

/// Sets of tokens by how they begin, a bit per id.
pub(super) struct TokenClasses {
    /// `digits[k]`: more than k digits.
    digits: [Vec<u32>; MAX_EXPONENT_DIGITS + 1],
    blank: Vec<u32>,
    quote: Vec<u32>,
}

impl TokenClasses {
    pub fn new(words: &[Vec<u8>]) -> Self {
        let set = |of_class: &dyn Fn(&[u8]) -> bool| {
            let mut bits = vec![0; words.len().div_ceil(32)];
            for (id, word) in words.iter().enumerate().filter(|(_, word)| of_class(word)) {
                debug_assert!(!word.is_empty());
                bits[id / 32] |= 1 << (id % 32);
            }
            bits
        };
        let leading_digits = |word: &[u8]| word.iter().take_while(|byte| byte.is_ascii_digit()).count();
        Self {
            digits: std::array::from_fn(|k| set(&|word| leading_digits(word) > k)),
            blank: set(&|word| word.first().is_some_and(|&byte| is_blank(byte))),
            quote: set(&|word| word.first() == Some(&b'"')),
        }
    }
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

/// Where in JSON's tokens the text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Between values; with the white space in a row.
    Outside {
        blanks: usize,
    },
    String {
        bytes: usize,
        escaped: bool,
    },
    Number {
        digits: usize,
        exponent: bool,
    },
}

#[derive(Clone)]
pub(super) struct Guard {
    classes: Arc<TokenClasses>,
    place: Place,
}

impl Guard {
    pub fn new(classes: Arc<TokenClasses>) -> Self {
        Self {
            classes,
            place: Place::Outside { blanks: 0 },
        }
    }

    /// Follows valid JSON text.
    pub fn push(&mut self, text: &[u8]) {
        for &byte in text {
            self.place = self.place.after(byte);
        }
    }

    /// Takes from a mask what would go on beyond a bound.
    pub fn restrict(&self, mask: &mut [u32]) {
        let classes = &self.classes;
        match self.place {
            Place::Outside { blanks } if blanks >= MAX_BLANKS => remove(mask, &classes.blank),
            Place::String { bytes, escaped: false } if bytes >= MAX_STRING_BYTES => keep(mask, &classes.quote),
            Place::Number {
                digits,
                exponent: false,
            } if digits >= MAX_DIGITS => remove(mask, &classes.digits[0]),
            Place::Number { digits, exponent: true } => {
                remove(mask, &classes.digits[MAX_EXPONENT_DIGITS.saturating_sub(digits)]);
            }
            _ => {}
        }
    }
}

impl Place {
    fn after(self, byte: u8) -> Self {
        match (self, byte) {
            (Place::String { bytes, escaped: true }, _) => Place::String {
                bytes: bytes + 1,
                escaped: false,
            },
            (Place::String { .. }, b'"') => Place::Outside { blanks: 0 },
            (Place::String { bytes, .. }, byte) => Place::String {
                bytes: bytes + 1,
                escaped: byte == b'\\',
            },
            (_, b'"') => Place::String {
                bytes: 0,
                escaped: false,
            },
            (Place::Number { digits, exponent }, b'0'..=b'9') => Place::Number {
                digits: digits + 1,
                exponent,
            },
            (Place::Number { exponent, .. }, b'.') => Place::Number { digits: 0, exponent },
            (Place::Number { .. }, b'e' | b'E') => Place::Number {
                digits: 0,
                exponent: true,
            },
            (Place::Number { digits, exponent: true }, b'+' | b'-') => Place::Number { digits, exponent: true },
            (_, b'0'..=b'9') => Place::Number {
                digits: 1,
                exponent: false,
            },
            (Place::Outside { blanks }, byte) if is_blank(byte) => Place::Outside { blanks: blanks + 1 },
            (_, byte) => Place::Outside {
                blanks: usize::from(is_blank(byte)),
            },
        }
    }
}

/// `mask & !set`, unless that leaves nothing.
fn remove(mask: &mut [u32], set: &[u32]) {
    if mask.iter().zip(set).any(|(bits, out)| bits & !out != 0) {
        mask.iter_mut().zip(set).for_each(|(bits, out)| *bits &= !out);
    }
}

/// `mask & set`, unless that leaves nothing.
fn keep(mask: &mut [u32], set: &[u32]) {
    if mask.iter().zip(set).any(|(bits, within)| bits & within != 0) {
        mask.iter_mut().zip(set).for_each(|(bits, within)| *bits &= within);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words 0..: `"`, `a`, `1`, `12`, `123`, `,`, ` `, `.`.
    fn guard(text: &str) -> Guard {
        let words = ["\"", "a", "1", "12", "123", ",", " ", "."].map(|word| word.as_bytes().to_vec());
        let mut guard = Guard::new(Arc::new(TokenClasses::new(&words)));
        guard.push(text.as_bytes());
        guard
    }

    fn allowed(text: &str, mask: u32) -> u32 {
        let mut mask = [mask];
        guard(text).restrict(&mut mask);
        mask[0]
    }

    #[test]
    fn short_texts_are_left_alone() {
        for text in ["", "[1", "{\"a\": \"b\\\"c", "[1.5, 2e", "-12.25"] {
            let all = if text.ends_with('e') { 0b1110_1111 } else { 0b1111_1111 };
            assert_eq!(allowed(text, 0b1111_1111), all, "{text}");
        }
    }

    #[test]
    fn digits_end() {
        let digits = "1".repeat(MAX_DIGITS);
        assert_eq!(allowed(&digits, 0b1111_1111), 0b1110_0011);
        assert_eq!(allowed(&format!("1.{digits}"), 0b1111_1111), 0b1110_0011);
        assert_eq!(allowed(&format!("{digits}."), 0b1111_1111), 0b1111_1111);
        // Inside a string they are text.
        assert_eq!(allowed(&format!("\"{digits}"), 0b1111_1111), 0b1111_1111);
        // Nothing else is allowed: the schema wins.
        assert_eq!(allowed(&digits, 0b0000_0100), 0b0000_0100);
    }

    #[test]
    fn exponents_have_two_digits() {
        assert_eq!(allowed("1e", 0b0001_1100), 0b0000_1100);
        assert_eq!(allowed("1e-", 0b0001_1100), 0b0000_1100);
        assert_eq!(allowed("1e1", 0b0001_1100), 0b0000_0100);
        assert_eq!(allowed("1E+12", 0b0011_1100), 0b0010_0000);
    }

    #[test]
    fn strings_end_but_not_inside_an_escape() {
        let long = format!("\"{}", "a".repeat(MAX_STRING_BYTES));
        assert_eq!(allowed(&long, 0b0000_0011), 0b0000_0001);
        assert_eq!(allowed(&long, 0b0000_0010), 0b0000_0010);
        assert_eq!(allowed(&format!("{long}\\"), 0b0000_0011), 0b0000_0011);
        assert_eq!(allowed(&format!("{long}\""), 0b0000_0011), 0b0000_0011);
    }

    #[test]
    fn blanks_end() {
        let blanks = format!("[1,{}", " ".repeat(MAX_BLANKS));
        assert_eq!(allowed(&blanks, 0b0100_0100), 0b0000_0100);
    }
}
