//! A step's arrays on the device, at addresses that never change: one region, filled by one copy from pinned memory, and
//! the block tables beside it.

use std::sync::Arc;

use super::driver::{Address, Arg, Device, Event, Memory, Pinned};
use super::{PIECE_TOKENS, SPLIT_TOKENS, need};
use crate::backend::{BatchLayout, Result};

/// Host regions in flight: one being read by the device, one being filled.
const RING: usize = 3;
/// Bit of an input id that stands for the token last sampled in the slot that the other bits name.
const LAST_SAMPLED: u32 = 1 << 31;
/// Arrays of a step, as many as `Pieces` of embed.cu has.
const PIECES: usize = 11;
/// Most bytes of a step's arrays that a kernel fetches; more are a copy engine's.
const KERNEL_COPY_BYTES: usize = 256 << 10;

/// Byte offsets of the arrays in the region, for the largest step.
struct Offsets {
    token_ids: usize,
    positions: usize,
    slot_mapping: usize,
    row_starts: usize,
    context_lens: usize,
    slots: usize,
    reset_conv: usize,
    logit_tokens: usize,
    piece_row: usize,
    piece_start: usize,
    block_tables: usize,
}

pub struct CudaBatch {
    memory: Memory,
    /// And where the device has read them; none = it reads nothing.
    staging: Vec<(Pinned, Option<Arc<Event>>)>,
    next: usize,
    at: Offsets,
    max_tokens: usize,
    max_rows: usize,
    max_blocks_per_row: usize,

    pub tokens: usize,
    pub rows: usize,
    pub pieces: usize,
    pub logit_rows: usize,
    /// Columns of the uploaded block tables, a power of two.
    pub max_blocks: usize,
    pub any_prefill: bool,
    pub any_decode: bool,
    pub any_feedback: bool,
    /// Splits of the longest decode row, rounded up to a power of two.
    pub max_splits: usize,
    /// Context tokens per split: `SPLIT_TOKENS`, doubled as often as it takes to fit the partial results' buffer.
    pub split_tokens: usize,
}

impl CudaBatch {
    pub fn new(
        device: &Arc<Device>,
        max_tokens: usize,
        max_rows: usize,
        max_blocks_per_row: usize,
    ) -> Result<CudaBatch> {
        let mut end = 0;
        let mut take = |bytes: usize| {
            let at = end;
            end += bytes.next_multiple_of(256);
            at
        };
        // Every row ends one piece early at worst.
        let max_pieces = max_tokens.div_ceil(PIECE_TOKENS) + max_rows;
        let at = Offsets {
            token_ids: take(max_tokens * 4),
            positions: take(max_tokens * 4),
            slot_mapping: take(max_tokens * 8),
            row_starts: take((max_rows + 1) * 4),
            context_lens: take(max_rows * 4),
            slots: take(max_rows * 4),
            reset_conv: take(max_rows),
            logit_tokens: take(max_tokens * 4),
            piece_row: take(max_pieces * 4),
            piece_start: take(max_pieces * 4),
            block_tables: take(max_rows * max_blocks_per_row.next_power_of_two() * 4),
        };
        let staging = (0..RING)
            .map(|_| Ok((Pinned::new(device, end)?, None)))
            .collect::<Result<_>>()?;
        Ok(CudaBatch {
            memory: Memory::new(device, end, "batch")?,
            staging,
            next: 0,
            at,
            max_tokens,
            max_rows,
            max_blocks_per_row,
            tokens: 0,
            rows: 0,
            pieces: 0,
            logit_rows: 0,
            max_blocks: 0,
            any_prefill: false,
            any_decode: false,
            any_feedback: false,
            max_splits: 1,
            split_tokens: SPLIT_TOKENS,
        })
    }

    pub fn set(&mut self, device: &Device, layout: &BatchLayout, split_room: usize) -> Result<()> {
        let (tokens, rows) = (layout.num_tokens(), layout.num_rows());
        need(
            "set_batch",
            tokens <= self.max_tokens && rows <= self.max_rows && layout.max_blocks <= self.max_blocks_per_row,
            || {
                format!(
                    "{tokens} tokens, {rows} rows, {} blocks a row; the batch holds {}, {}, {}",
                    layout.max_blocks, self.max_tokens, self.max_rows, self.max_blocks_per_row
                )
            },
        )?;
        let consistent = [layout.positions.len(), layout.slot_mapping.len()]
            .iter()
            .all(|n| *n == tokens)
            && [
                layout.context_lens.len(),
                layout.reset_conv.len(),
                layout.feedback.len(),
            ]
            .iter()
            .all(|n| *n == rows)
            && layout.row_starts.len() == rows + 1
            && layout.row_starts.windows(2).all(|w| w[0] < w[1])
            && layout.row_starts.last().is_none_or(|end| *end as usize == tokens)
            && layout.block_tables.len() == rows * layout.max_blocks
            && layout.logit_tokens.iter().all(|t| (*t as usize) < tokens);
        need("set_batch", consistent, || "the arrays' lengths do not agree".into())?;
        // The region before this one was sent last, by what the stream has got to.
        self.staging[(self.next + RING - 1) % RING].1 = Some(device.mark()?);
        let (staging, read) = &mut self.staging[self.next % RING];
        if let Some(read) = read {
            read.wait("set_batch")?;
        }
        let bytes = staging.bytes_mut();
        let at = &self.at;
        fill(bytes, at.token_ids, &layout.token_ids, u32::to_le_bytes);
        for row in (0..rows).filter(|&row| layout.feedback[row]) {
            let id = LAST_SAMPLED | layout.slots[row];
            let token = layout.row_starts[row] as usize;
            fill(bytes, at.token_ids + token * 4, &[id], u32::to_le_bytes);
        }
        fill(bytes, at.positions, &layout.positions, u32::to_le_bytes);
        fill(bytes, at.slot_mapping, &layout.slot_mapping, i64::to_le_bytes);
        fill(bytes, at.row_starts, &layout.row_starts, u32::to_le_bytes);
        fill(bytes, at.context_lens, &layout.context_lens, u32::to_le_bytes);
        fill(bytes, at.slots, &layout.slots, u32::to_le_bytes);
        fill(bytes, at.reset_conv, &layout.reset_conv, |b| [u8::from(b)]);
        fill(bytes, at.logit_tokens, &layout.logit_tokens, u32::to_le_bytes);
        // Sizes that kernels are launched with come in powers of two, so that few records of a step serve every context.
        self.max_blocks = layout.max_blocks.max(1).next_power_of_two();
        for row in 0..rows {
            let table = &layout.block_tables[row * layout.max_blocks..][..layout.max_blocks];
            fill(
                bytes,
                at.block_tables + row * self.max_blocks * 4,
                table,
                u32::to_le_bytes,
            );
        }

        let (mut pieces, mut longest) = (0, 1);
        self.any_prefill = false;
        self.any_decode = false;
        for row in 0..rows {
            let (from, to) = (layout.row_starts[row] as usize, layout.row_starts[row + 1] as usize);
            if to - from == 1 {
                self.any_decode = true;
                // Padding rows have a context of one token.
                longest = longest.max(layout.context_lens[row] as usize);
            } else {
                self.any_prefill = true;
            }
            for start in (from..to).step_by(PIECE_TOKENS) {
                fill(bytes, at.piece_row + pieces * 4, &[row as u32], u32::to_le_bytes);
                fill(bytes, at.piece_start + pieces * 4, &[start as u32], u32::to_le_bytes);
                pieces += 1;
            }
        }
        self.split_tokens = SPLIT_TOKENS;
        loop {
            self.max_splits = longest.div_ceil(self.split_tokens).next_power_of_two();
            if rows * self.max_splits <= split_room.max(rows) {
                break;
            }
            self.split_tokens *= 2;
        }
        self.any_feedback = layout.feedback.contains(&true);
        self.tokens = tokens;
        self.rows = rows;
        self.pieces = pieces;
        self.logit_rows = layout.logit_tokens.len();
        let pieces_used = [
            (at.token_ids, tokens * 4),
            (at.positions, tokens * 4),
            (at.slot_mapping, tokens * 8),
            (at.row_starts, (rows + 1) * 4),
            (at.context_lens, rows * 4),
            (at.slots, rows * 4),
            (at.reset_conv, rows),
            (at.logit_tokens, self.logit_rows * 4),
            (at.piece_row, pieces * 4),
            (at.piece_start, pieces * 4),
            (at.block_tables, rows * self.max_blocks * 4),
        ];
        let bytes: usize = pieces_used.iter().map(|(_, bytes)| bytes).sum();
        if bytes <= KERNEL_COPY_BYTES {
            let cells: [u64; PIECES] =
                pieces_used.map(|(offset, bytes)| (offset / 16) as u64 | (bytes.div_ceil(16) as u64) << 32);
            let args = [&[staging.address().arg(), self.memory.address.arg()][..], &cells].concat();
            device.launch(device.function("upload", 0)?, [PIECES, 1, 1], 128, 0, &args)?;
        } else {
            let used = at.block_tables + rows * self.max_blocks * 4;
            staging.send(used, self.memory.address, "set_batch")?;
        }
        self.next += 1;
        Ok(())
    }

    fn address(&self, offset: usize) -> Address {
        self.memory.address + offset as u64
    }

    pub fn token_ids(&self) -> Address {
        self.address(self.at.token_ids)
    }
    pub fn positions(&self) -> Address {
        self.address(self.at.positions)
    }
    pub fn slot_mapping(&self) -> Address {
        self.address(self.at.slot_mapping)
    }
    pub fn row_starts(&self) -> Address {
        self.address(self.at.row_starts)
    }
    pub fn context_lens(&self) -> Address {
        self.address(self.at.context_lens)
    }
    pub fn slots(&self) -> Address {
        self.address(self.at.slots)
    }
    pub fn reset_conv(&self) -> Address {
        self.address(self.at.reset_conv)
    }
    pub fn logit_tokens(&self) -> Address {
        self.address(self.at.logit_tokens)
    }
    pub fn piece_row(&self) -> Address {
        self.address(self.at.piece_row)
    }
    pub fn piece_start(&self) -> Address {
        self.address(self.at.piece_start)
    }
    pub fn block_tables(&self) -> Address {
        self.address(self.at.block_tables)
    }
}

fn fill<T: Copy, const N: usize>(bytes: &mut [u8], at: usize, values: &[T], encode: impl Fn(T) -> [u8; N]) {
    for (to, value) in bytes[at..at + values.len() * N].chunks_exact_mut(N).zip(values) {
        to.copy_from_slice(&encode(*value));
    }
}
