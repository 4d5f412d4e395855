//! Server-sent events out of the pieces that a connection delivers.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Cuts a byte stream into events. A piece that holds whole events, which is the rule, is not copied.
#[derive(Debug, Default)]
pub struct EventParser {
    /// What came after the last whole event.
    rest: BytesMut,
    ready: VecDeque<Bytes>,
}

impl EventParser {
    /// Takes the next piece of the stream.
    pub fn push(&mut self, piece: Bytes) {
        if self.rest.is_empty() {
            let used = self.cut(&piece);
            self.rest.extend_from_slice(&piece[used..]);
        } else {
            self.rest.extend_from_slice(&piece);
            let all = std::mem::take(&mut self.rest).freeze();
            let used = self.cut(&all);
            self.rest.extend_from_slice(&all[used..]);
        }
    }

    /// The data of the next event that is complete.
    pub fn next_event(&mut self) -> Option<Bytes> {
        self.ready.pop_front()
    }

    /// Takes the whole events of `bytes`; returns how many bytes they have.
    fn cut(&mut self, bytes: &Bytes) -> usize {
        let mut used = 0;
        let mut line_start = 0;
        let mut data: Option<Bytes> = None;
        while let Some(length) = bytes[line_start..].iter().position(|&byte| byte == b'\n') {
            let end = line_start + length;
            let line = bytes.slice(line_start..end);
            let line = line
                .strip_suffix(b"\r")
                .map_or(line.clone(), |short| line.slice_ref(short));
            line_start = end + 1;
            if line.is_empty() {
                self.ready.extend(data.take());
                used = line_start;
            } else if let Some(value) = line.strip_prefix(b"data:") {
                let value = line.slice_ref(value.strip_prefix(b" ").unwrap_or(value));
                data = Some(match data {
                    None => value,
                    Some(earlier) => [&earlier[..], b"\n", &value[..]].concat().into(),
                });
            }
        }
        used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(pieces: &[&[u8]]) -> Vec<String> {
        let mut parser = EventParser::default();
        let mut out = Vec::new();
        for piece in pieces {
            parser.push(Bytes::copy_from_slice(piece));
            out.extend(
                std::iter::from_fn(|| parser.next_event()).map(|data| String::from_utf8(data.to_vec()).unwrap()),
            );
        }
        out
    }

    #[test]
    fn the_cuts_of_the_stream_do_not_matter() {
        let stream = b": ping\n\ndata: {\"a\": 1}\n\nevent: x\r\ndata:two\r\ndata: lines\r\n\r\ndata: [DONE]\n\ndata: unfinished";
        let expected = ["{\"a\": 1}", "two\nlines", "[DONE]"];
        assert_eq!(events(&[stream]), expected);
        for cut in 0..stream.len() {
            assert_eq!(events(&[&stream[..cut], &stream[cut..]]), expected, "cut at {cut}");
        }
        let single: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(events(&single), expected);
    }
}
