//! How fast this machine reads memory now.

use std::time::Instant;

use super::pool::Pool;

const BYTES: usize = 1 << 30;
const TASK_WORDS: usize = 1 << 17;
const PASSES: usize = 3;

/// Bytes per second of the fastest of a few passes over 1 GiB, on all of the pool's threads.
pub fn read_bandwidth(pool: &mut Pool) -> f64 {
    // Not zero: a zeroed allocation would be one shared page.
    let buffer = vec![1u64; BYTES / 8];
    let tasks = buffer.len() / TASK_WORDS;
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        pool.run(tasks, |task, _| {
            let words = &buffer[task * TASK_WORDS..(task + 1) * TASK_WORDS];
            // Independent sums, so that loads and not one chain of additions set the pace.
            let mut sums = [0u64; 16];
            for chunk in words.chunks_exact(16) {
                for (sum, word) in sums.iter_mut().zip(chunk) {
                    *sum = sum.wrapping_add(*word);
                }
            }
            std::hint::black_box(sums);
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    BYTES as f64 / best
}
