//! Ends a sequence that repeats itself: vLLM's `repetition_detection`.

use crate::step::TokenId;

/// When an output counts as repeating: its end is the same `size` tokens, `min_count` times, for a size in the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RepetitionDetection {
    /// At least 1, at most `max_pattern_size`.
    pub min_pattern_size: usize,
    pub max_pattern_size: usize,
    /// At least 2.
    pub min_count: usize,
}

/// Follows one output. A token costs one comparison per pattern size, however often the pattern must repeat.
#[derive(Clone, Debug)]
pub(super) struct RepetitionTracker {
    rule: RepetitionDetection,
    /// By size, from the smallest: how many of the last tokens equal the one `size` before them.
    runs: Vec<usize>,
}

impl RepetitionTracker {
    pub fn new(rule: RepetitionDetection) -> Self {
        let num_sizes = (rule.min_pattern_size..=rule.max_pattern_size).count();
        Self {
            rule,
            runs: vec![0; num_sizes],
        }
    }

    /// The output has got its last token.
    pub fn note(&mut self, output: &[TokenId]) {
        let Some((last, before)) = output.split_last() else {
            return;
        };
        for (run, size) in self.runs.iter_mut().zip(self.rule.min_pattern_size..) {
            let repeats = before.len() >= size && before[before.len() - size] == *last;
            *run = if repeats { *run + 1 } else { 0 };
        }
    }

    /// The output ends with a pattern that has come often enough.
    pub fn found(&self) -> bool {
        self.runs
            .iter()
            .zip(self.rule.min_pattern_size..)
            .any(|(run, size)| *run >= size * (self.rule.min_count - 1))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Tokens until the rule fires.
    fn fires_after(rule: RepetitionDetection, output: &[TokenId]) -> Option<usize> {
        let mut tracker = RepetitionTracker::new(rule);
        (1..=output.len()).find(|&len| {
            tracker.note(&output[..len]);
            tracker.found()
        })
    }

    const RULE: RepetitionDetection = RepetitionDetection {
        min_pattern_size: 2,
        max_pattern_size: 3,
        min_count: 3,
    };

    #[test]
    fn a_pattern_fires_when_it_has_come_often_enough() {
        assert_eq!(fires_after(RULE, &[9, 1, 2, 1, 2, 1, 2, 1]), Some(7));
        assert_eq!(fires_after(RULE, &[1, 2, 3, 1, 2, 3, 1, 2, 3]), Some(9));
        assert_eq!(fires_after(RULE, &[1, 2, 1, 2, 9, 1, 2]), None);
        // One token over and over is also a pattern of two.
        assert_eq!(fires_after(RULE, &[5; 9]), Some(6));
    }

    proptest! {
        #[test]
        fn agrees_with_comparing_whole_patterns(
            output in prop::collection::vec(0u32..3, 0..60),
            min in 1usize..4,
            more in 0usize..4,
            min_count in 2usize..5,
        ) {
            let rule = RepetitionDetection { min_pattern_size: min, max_pattern_size: min + more, min_count };
            let plain = (1..=output.len()).find(|&len| {
                (min..=min + more).any(|size| {
                    let window = size * min_count;
                    len >= window && output[len - window..len].chunks(size).all(|part| part == &output[len - size..len])
                })
            });
            prop_assert_eq!(fires_after(rule, &output), plain);
        }
    }
}
