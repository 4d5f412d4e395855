//! Finding markers such as `</think>` in text that arrives in pieces.

/// The first thing of interest in a piece of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hit {
    /// `markers[which]` stands at byte `at`.
    Marker {
        which: usize,
        at: usize,
    },
    /// From byte `at` to the end the text is the beginning of a marker.
    Partial {
        at: usize,
    },
    Nothing,
}

/// Looks for the markers, all of which begin with `<`. Linear in the text.
pub(super) fn find(text: &str, markers: &[&str]) -> Hit {
    if markers.is_empty() {
        return Hit::Nothing;
    }
    let mut found = Hit::Nothing;
    for (at, _) in text.match_indices('<') {
        let rest = &text[at..];
        if let Some(which) = markers.iter().position(|marker| rest.starts_with(marker)) {
            found = Hit::Marker { which, at };
            break;
        }
        if markers.iter().any(|marker| marker.starts_with(rest)) {
            found = Hit::Partial { at };
            break;
        }
    }
    #[cfg(test)]
    SCANNED.with(|scanned| {
        let read = match found {
            Hit::Marker { which, at } => at + markers[which].len(),
            Hit::Partial { .. } | Hit::Nothing => text.len(),
        };
        scanned.set(scanned.get() + read);
    });
    found
}

#[cfg(test)]
thread_local! {
    /// Bytes looked at on this thread: the measure of the work done.
    pub(super) static SCANNED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_marker_wins_and_a_beginning_counts_only_at_the_end() {
        let markers = ["<think>", "</think>"];
        assert_eq!(find("a</think><think>", &markers), Hit::Marker { which: 1, at: 1 });
        assert_eq!(find("a < b </thi", &markers), Hit::Partial { at: 6 });
        assert_eq!(find("a </thin b", &markers), Hit::Nothing);
        assert_eq!(find("é<", &markers), Hit::Partial { at: 2 });
        assert_eq!(find("<think>", &[]), Hit::Nothing);
    }
}
