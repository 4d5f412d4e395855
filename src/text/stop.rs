//! Stop strings across token borders, with vLLM's hold-back.

/// Text of one choice on its way out: looks for stop strings and holds text back while one may begin in it.
///
/// As vLLM: the longest stop string's characters minus one are always held back until the end (nothing with
/// `include_stop_str_in_output`), and of several stop strings that are there after a token the first of the list wins,
/// not the first in the text.
#[derive(Clone, Debug)]
pub struct StopBuffer {
    stop: Vec<String>,
    include_stop: bool,
    /// Characters that stay back.
    hold_back_chars: usize,
    /// Bytes before unsearched text in which a stop string may begin.
    longest_stop_bytes: usize,
    /// The end of the text: what is not out yet, after enough of what is out to find a stop string across the border.
    window: String,
    /// Bytes of `window` that are out.
    sent: usize,
    /// Bytes of `window` that have been searched (or are exempt because of `min_tokens`).
    searched: usize,
}

impl StopBuffer {
    pub fn new(stop: Vec<String>, include_stop: bool) -> Self {
        let longest_chars = stop.iter().map(|stop| stop.chars().count()).max().unwrap_or(0);
        let longest_stop_bytes = stop.iter().map(String::len).max().unwrap_or(0);
        let hold_back_chars = if include_stop {
            0
        } else {
            longest_chars.saturating_sub(1)
        };
        Self {
            stop,
            include_stop,
            hold_back_chars,
            longest_stop_bytes,
            window: String::new(),
            sent: 0,
            searched: 0,
        }
    }

    /// Where new text goes; follow with [`find_stop`](Self::find_stop) or [`exempt`](Self::exempt).
    pub fn text(&mut self) -> &mut String {
        &mut self.window
    }

    /// The text so far may hold stop strings without ending the choice (`min_tokens`); one that begins in it and ends
    /// later still counts.
    pub fn exempt(&mut self) {
        self.searched = self.window.len();
    }

    /// Looks for a stop string that ends in the text added since the last call. A hit cuts the text.
    pub fn find_stop(&mut self) -> Option<String> {
        if self.searched == self.window.len() {
            return None;
        }
        let new = self.searched;
        self.searched = self.window.len();
        for stop in &self.stop {
            // A match that ends in the new text starts after `new - len`.
            let from = ceil_char_boundary(&self.window, (new + 1).saturating_sub(stop.len()));
            if let Some(at) = self.window[from..].find(stop.as_str()) {
                let start = from + at;
                let end = if self.include_stop { start + stop.len() } else { start };
                self.window.truncate(end.max(self.sent));
                return Some(stop.clone());
            }
        }
        None
    }

    /// Appends to `out` what may go out now.
    pub fn release(&mut self, out: &mut String) {
        let mut end = self.window.len();
        if self.hold_back_chars > 0 {
            end = self.window[self.sent..]
                .char_indices()
                .rev()
                .nth(self.hold_back_chars - 1)
                .map_or(self.sent, |(at, _)| self.sent + at);
        }
        self.release_to(end, out);
    }

    /// Appends all that is left.
    pub fn finish(&mut self, out: &mut String) {
        self.release_to(self.window.len(), out);
    }

    fn release_to(&mut self, end: usize, out: &mut String) {
        out.push_str(&self.window[self.sent..end]);
        self.sent = end;
        // Forget what no stop string can reach back to; only when it is much, so that the cost is linear.
        let keep_from = self.sent.min(self.searched.saturating_sub(self.longest_stop_bytes));
        if keep_from > 256 + self.longest_stop_bytes {
            let cut = ceil_char_boundary(&self.window, keep_from).min(self.sent);
            self.window.drain(..cut);
            self.sent -= cut;
            self.searched = self.searched.saturating_sub(cut);
        }
    }
}

fn ceil_char_boundary(text: &str, mut at: usize) -> usize {
    while at < text.len() && !text.is_char_boundary(at) {
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The pieces that go out, and the stop string that ended it.
    fn run(stop: &[&str], include: bool, exempt: usize, pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let mut buffer = StopBuffer::new(stop.iter().map(|&stop| stop.to_owned()).collect(), include);
        let (mut outs, mut found) = (Vec::new(), None);
        for (index, piece) in pieces.iter().enumerate() {
            buffer.text().push_str(piece);
            if index < exempt {
                buffer.exempt();
            } else {
                found = buffer.find_stop();
            }
            let mut out = String::new();
            if found.is_some() || index + 1 == pieces.len() {
                buffer.finish(&mut out);
                outs.push(out);
                break;
            }
            buffer.release(&mut out);
            outs.push(out);
        }
        (outs, found)
    }

    #[test]
    fn holds_back_longest_minus_one_characters() {
        assert_eq!(run(&["xyz"], false, 0, &["aé", "ü", "b"]).0, ["", "a", "éüb"]);
        assert_eq!(run(&["x"], false, 0, &["aé", "ü"]).0, ["aé", "ü"]);
        assert_eq!(run(&["xyz"], true, 0, &["ab", "c"]).0, ["ab", "c"]);
    }

    #[test]
    fn finds_a_stop_string_across_pieces() {
        let (outs, found) = run(&["END"], false, 0, &["ab E", "N", "D tail", "never"]);
        assert_eq!((outs.concat().as_str(), found.as_deref()), ("ab ", Some("END")));
        let (outs, found) = run(&["END"], true, 0, &["ab E", "N", "D tail"]);
        assert_eq!((outs.concat().as_str(), found.as_deref()), ("ab END", Some("END")));
    }

    #[test]
    fn the_first_of_the_list_wins() {
        let (outs, found) = run(&["later", "first"], false, 0, &["a first b later"]);
        assert_eq!(
            (outs.concat().as_str(), found.as_deref()),
            ("a first b ", Some("later"))
        );
    }

    #[test]
    fn exempt_text_does_not_stop_but_may_begin_a_match() {
        let (outs, found) = run(&["ab"], false, 2, &["ab", "a", "b", "c"]);
        assert_eq!((outs.concat().as_str(), found.as_deref()), ("ab", Some("ab")));
        let (outs, found) = run(&["ab"], false, 2, &["ab", "ab", "c"]);
        assert_eq!((outs.concat().as_str(), found), ("ababc", None));
    }

    proptest! {
        #[test]
        fn agrees_with_searching_the_whole_text(
            pieces in prop::collection::vec("[abé]{0,6}", 1..200),
            stop in prop::collection::vec("[abé]{3,8}", 0..3),
            include in any::<bool>(),
        ) {
            let mut whole = String::new();
            let mut expected = None;
            for piece in &pieces {
                whole.push_str(piece);
                if let Some((stop, at)) = stop.iter().find_map(|stop| Some((stop, whole.find(stop.as_str())?))) {
                    whole.truncate(if include { at + stop.len() } else { at });
                    expected = Some(stop.clone());
                    break;
                }
            }
            let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (outs, found) = run(&stop, include, 0, &pieces);
            prop_assert_eq!(outs.concat(), whole);
            prop_assert_eq!(found, expected);
        }
    }
}
