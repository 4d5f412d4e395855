//! A step's plan becomes the arrays that a backend uploads. Pure: no device.

use crate::backend::BatchLayout;
use crate::step::{Capacity, RowTokens, StepPlan, StepRow};

/// A plan breaks the step contract: a bug in the engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid step plan: {0}")]
pub struct PlanError(pub String);

/// Builds layouts, reusing its vectors from step to step.
pub struct BatchBuilder {
    capacity: Capacity,
    /// Longest sequence in tokens.
    max_context: usize,
    layout: BatchLayout,
    /// Step in which a slot was last named by a row.
    slot_steps: Vec<u64>,
    /// Step in which a block was last written, and by which row.
    block_writers: Vec<(u64, u32)>,
    step: u64,
}

impl BatchBuilder {
    pub fn new(capacity: Capacity, max_context: usize) -> Self {
        Self {
            slot_steps: vec![0; capacity.max_num_seqs],
            block_writers: vec![(0, 0); capacity.num_blocks],
            capacity,
            max_context,
            layout: BatchLayout::default(),
            step: 0,
        }
    }

    /// Pads a decode step to `rows` rows; the plan's rows stay the first.
    pub fn pad_rows(&mut self, rows: usize) {
        self.layout.pad_rows(rows);
    }

    /// The layout of the last plan.
    pub fn layout(&self) -> &BatchLayout {
        &self.layout
    }

    /// Replaces the tokens whose logits are wanted.
    pub fn set_logit_tokens(&mut self, tokens: impl IntoIterator<Item = u32>) {
        self.layout.logit_tokens.clear();
        self.layout.logit_tokens.extend(tokens);
    }

    /// Checks the plan against the capacity and lays it out. `logit_tokens` are the last tokens of the sampling rows.
    ///
    /// # Errors
    /// Whatever would make a backend read or write outside its arrays, or let two rows write one place; the layout is then
    /// unspecified.
    pub fn build(&mut self, plan: &StepPlan) -> Result<&BatchLayout, PlanError> {
        self.step += 1;
        let capacity = &self.capacity;
        let tokens: usize = plan.rows.iter().map(|row| row.tokens.len()).sum();
        if tokens > capacity.max_num_batched_tokens {
            let max = capacity.max_num_batched_tokens;
            return Err(PlanError(format!("{tokens} tokens, the step holds {max}")));
        }
        let layout = &mut self.layout;
        layout.token_ids.clear();
        layout.positions.clear();
        layout.slot_mapping.clear();
        layout.row_starts.clear();
        layout.context_lens.clear();
        layout.block_tables.clear();
        layout.slots.clear();
        layout.reset_conv.clear();
        layout.feedback.clear();
        layout.logit_tokens.clear();
        layout.row_starts.push(0);

        let block_size = capacity.block_size;
        layout.max_blocks = 0;
        for (index, row) in plan.rows.iter().enumerate() {
            let fail = |message: String| PlanError(format!("row {index}: {message}"));
            let end = check_row(row, capacity, self.max_context).map_err(fail)?;
            let slot = row.slot as usize;
            if std::mem::replace(&mut self.slot_steps[slot], self.step) == self.step {
                return Err(fail(format!("slot {slot} has a row already")));
            }
            let used = end.div_ceil(block_size);
            let first_written = row.start + row.replay;
            if first_written < end {
                for &block in &row.block_table[first_written / block_size..used] {
                    let writer = &mut self.block_writers[block as usize];
                    if writer.0 == self.step {
                        return Err(fail(format!("block {block} is written by row {} too", writer.1)));
                    }
                    *writer = (self.step, index as u32);
                }
            }
            layout.max_blocks = layout.max_blocks.max(used);
        }

        for row in &plan.rows {
            let end = row.start + row.tokens.len();
            match &row.tokens {
                RowTokens::Known(ids) => layout.token_ids.extend_from_slice(ids),
                RowTokens::LastSampled => layout.token_ids.push(0),
            }
            for position in row.start..end {
                layout.positions.push(position as u32);
                layout.slot_mapping.push(if position < row.start + row.replay {
                    -1
                } else {
                    let block = row.block_table[position / block_size] as usize;
                    (block * block_size + position % block_size) as i64
                });
            }
            layout.row_starts.push(layout.token_ids.len() as u32);
            layout.context_lens.push(end as u32);
            let used = end.div_ceil(block_size);
            layout.block_tables.extend_from_slice(&row.block_table[..used]);
            let padded = layout.block_tables.len() + layout.max_blocks - used;
            layout.block_tables.resize(padded, 0);
            layout.slots.push(row.slot);
            layout.reset_conv.push(row.reset_conv);
            layout.feedback.push(row.tokens == RowTokens::LastSampled);
            if row.sample.is_some() {
                layout.logit_tokens.push(layout.token_ids.len() as u32 - 1);
            }
        }
        Ok(layout)
    }
}

/// Checks what one row names; returns its end position.
fn check_row(row: &StepRow, capacity: &Capacity, max_context: usize) -> Result<usize, String> {
    if row.slot as usize >= capacity.max_num_seqs {
        return Err(format!("slot {} of {}", row.slot, capacity.max_num_seqs));
    }
    let len = row.tokens.len();
    if len == 0 {
        return Err("no tokens".into());
    }
    let end = match row.start.checked_add(len) {
        Some(end) if end <= max_context => end,
        _ => {
            return Err(format!(
                "{len} tokens from position {}, a sequence holds {max_context}",
                row.start
            ));
        }
    };
    if row.replay > len || (row.replay > 0 && row.tokens == RowTokens::LastSampled) {
        return Err(format!("replays {} of {len} tokens", row.replay));
    }
    if let RowTokens::Known(ids) = &row.tokens
        && let Some(id) = ids.iter().find(|&&id| id as usize >= capacity.vocab_size)
    {
        return Err(format!(
            "token {id} is outside the vocabulary of {}",
            capacity.vocab_size
        ));
    }
    let used = end.div_ceil(capacity.block_size);
    let Some(blocks) = row.block_table.get(..used) else {
        return Err(format!(
            "{} blocks for {end} tokens of {} each",
            row.block_table.len(),
            capacity.block_size
        ));
    };
    match blocks.iter().find(|&&block| block as usize >= capacity.num_blocks) {
        Some(block) => Err(format!("block {block} of {}", capacity.num_blocks)),
        None => Ok(end),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::step::SampleRow;

    fn capacity() -> Capacity {
        Capacity {
            num_blocks: 10,
            block_size: 4,
            max_num_seqs: 3,
            max_num_batched_tokens: 16,
            conv_replay_tokens: 2,
            vocab_size: 100,
            max_in_flight: 1,
        }
    }

    fn row(slot: u32, start: usize, ids: &[u32], blocks: &[u32]) -> StepRow {
        StepRow {
            slot,
            start,
            tokens: RowTokens::Known(ids.to_vec()),
            replay: 0,
            reset_conv: start == 0,
            block_table: Arc::from(blocks),
            sample: None,
            hidden: None,
        }
    }

    fn sampling(mut row: StepRow) -> StepRow {
        row.sample = Some(SampleRow {
            output_index: 0,
            needs_mask: false,
        });
        row
    }

    fn plan(rows: Vec<StepRow>) -> StepPlan {
        StepPlan {
            started: Vec::new(),
            rows,
        }
    }

    #[test]
    fn a_mixed_step() {
        let mut decode = sampling(row(2, 9, &[0], &[7, 8, 9, 3]));
        decode.tokens = RowTokens::LastSampled;
        let mut replayed = sampling(row(0, 2, &[12, 13, 14, 15], &[7, 5]));
        replayed.replay = 2;
        replayed.reset_conv = true;
        let mut builder = BatchBuilder::new(capacity(), 32);
        let layout = builder
            .build(&plan(vec![row(1, 0, &[21, 22, 23], &[1]), decode, replayed]))
            .unwrap();
        assert_eq!(layout.token_ids, [21, 22, 23, 0, 12, 13, 14, 15]);
        assert_eq!(layout.positions, [0, 1, 2, 9, 2, 3, 4, 5]);
        assert_eq!(layout.slot_mapping, [4, 5, 6, 37, -1, -1, 20, 21]);
        assert_eq!(layout.row_starts, [0, 3, 4, 8]);
        assert_eq!(layout.context_lens, [3, 10, 6]);
        assert_eq!(layout.max_blocks, 3);
        assert_eq!(layout.block_tables, [1, 0, 0, 7, 8, 9, 7, 5, 0]);
        assert_eq!(layout.slots, [1, 2, 0]);
        assert_eq!(layout.reset_conv, [true, false, true]);
        assert_eq!(layout.feedback, [false, true, false]);
        assert_eq!(layout.logit_tokens, [3, 7]);
    }

    #[test]
    fn broken_plans_are_errors() {
        let mut replay = row(0, 0, &[1], &[1]);
        replay.replay = 2;
        let mut replayed_feedback = row(0, 4, &[1], &[1, 2]);
        replayed_feedback.tokens = RowTokens::LastSampled;
        replayed_feedback.replay = 1;
        let cases = [
            ("17 tokens", vec![row(0, 0, &[1; 17], &[0, 1, 2, 3, 4])]),
            ("slot 3 of 3", vec![row(3, 0, &[1], &[0])]),
            (
                "slot 0 has a row already",
                vec![row(0, 0, &[1], &[0]), row(0, 1, &[1], &[1])],
            ),
            ("no tokens", vec![row(0, 0, &[], &[0])]),
            ("a sequence holds 32", vec![row(0, 32, &[1], &[0; 9])]),
            ("a sequence holds 32", vec![row(0, usize::MAX, &[1], &[0; 9])]),
            ("token 100 is outside", vec![row(0, 0, &[1, 100], &[0])]),
            ("1 blocks for 5 tokens", vec![row(0, 4, &[1], &[0])]),
            ("block 10 of 10", vec![row(0, 0, &[1], &[10])]),
            (
                "block 2 is written by row 0 too",
                vec![row(0, 0, &[1], &[2]), row(1, 4, &[1], &[0, 2])],
            ),
            ("replays 2 of 1", vec![replay]),
            ("replays 1 of 1", vec![replayed_feedback]),
        ];
        let mut builder = BatchBuilder::new(capacity(), 32);
        for (message, rows) in cases {
            let error = builder.build(&plan(rows)).expect_err(message);
            assert!(error.0.contains(message), "{error}");
        }
        // An error leaves nothing behind that spoils the next step.
        assert!(builder.build(&plan(vec![row(0, 0, &[1], &[2])])).is_ok());
    }

    #[test]
    fn shared_blocks_that_nobody_writes_are_fine() {
        let mut hit = row(1, 2, &[1, 2, 3], &[2, 3]);
        hit.replay = 2;
        let rows = vec![row(0, 4, &[1], &[2, 4]), hit];
        assert!(BatchBuilder::new(capacity(), 32).build(&plan(rows)).is_ok());
    }

    proptest! {
        /// Whatever a plan says, a layout that comes out stays inside the capacity.
        #[test]
        fn layouts_stay_inside_the_capacity(
            rows in prop::collection::vec(
                (0u32..4, 0usize..40, prop::collection::vec(0u32..110, 0..9), 0usize..10,
                 prop::collection::vec(0u32..12, 0..10), any::<bool>()), 0..4),
        ) {
            let rows = rows.into_iter().map(|(slot, start, ids, replay, blocks, sample)| {
                let mut row = row(slot, start, &ids, &blocks);
                row.replay = replay;
                if sample { sampling(row) } else { row }
            }).collect();
            let limits = capacity();
            let mut builder = BatchBuilder::new(limits.clone(), 32);
            if let Ok(layout) = builder.build(&plan(rows)) {
                let tokens = layout.num_tokens();
                prop_assert!(tokens <= limits.max_num_batched_tokens);
                prop_assert_eq!(layout.positions.len(), tokens);
                prop_assert_eq!(layout.slot_mapping.len(), tokens);
                prop_assert_eq!(layout.row_starts.last().copied(), Some(tokens as u32));
                prop_assert_eq!(layout.block_tables.len(), layout.num_rows() * layout.max_blocks);
                let places = (limits.num_blocks * limits.block_size) as i64;
                prop_assert!(layout.slot_mapping.iter().all(|&place| (-1..places).contains(&place)));
                let mut written: Vec<i64> = layout.slot_mapping.iter().copied().filter(|&place| place >= 0).collect();
                written.sort_unstable();
                prop_assert!(written.windows(2).all(|pair| pair[0] != pair[1]), "one place is written twice");
                prop_assert!(layout.slots.iter().all(|&slot| (slot as usize) < limits.max_num_seqs));
                prop_assert!(layout.logit_tokens.iter().all(|&t| (t as usize) < tokens));
                prop_assert!(layout.block_tables.iter().all(|&b| (b as usize) < limits.num_blocks));
            }
        }
    }
}
