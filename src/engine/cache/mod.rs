//! The logical KV cache: which blocks a sequence holds and which prefixes can be shared. No pointer, no device.

mod block_pool;
mod prefix;

use std::sync::Arc;

pub use block_pool::BlockPool;
pub use prefix::{BlockHash, BlockHasher};

use crate::step::BlockId;

/// The blocks of one sequence, in order.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
    /// The first blocks, which other sequences may find by their hashes.
    num_published: usize,
    /// `blocks` as the last step's row got it; none once it has grown.
    shared: Option<Arc<[BlockId]>>,
}

impl BlockTable {
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The blocks for a step's row. Steps that do not grow the table share one copy.
    pub fn share(&mut self) -> Arc<[BlockId]> {
        self.shared.get_or_insert_with(|| self.blocks.as_slice().into()).clone()
    }
}

/// Block accounting of all sequences.
#[derive(Debug)]
pub struct KvCache {
    pool: BlockPool,
    block_size: usize,
    prefix_caching: bool,
}

impl KvCache {
    pub fn new(num_blocks: usize, block_size: usize, prefix_caching: bool) -> Self {
        Self {
            pool: BlockPool::new(num_blocks),
            block_size,
            prefix_caching,
        }
    }

    pub fn prefix_caching(&self) -> bool {
        self.prefix_caching
    }

    pub fn num_free_blocks(&self) -> usize {
        self.pool.num_free()
    }

    pub fn num_used_blocks(&self) -> usize {
        self.pool.num_used()
    }

    /// Share of the blocks that sequences hold, 0..=1. Free blocks with cached content count as free.
    pub fn usage(&self) -> f64 {
        1.0 - self.pool.num_free() as f64 / self.pool.num_blocks().max(1) as f64
    }

    /// The cached blocks of the longest known prefix that leaves at least one of `num_tokens` to compute.
    pub fn find_prefix(&self, hashes: &[BlockHash], num_tokens: usize) -> Vec<BlockId> {
        if !self.prefix_caching {
            return Vec::new();
        }
        let max_blocks = num_tokens.saturating_sub(1) / self.block_size;
        hashes
            .iter()
            .take(max_blocks)
            .map_while(|hash| self.pool.find(hash))
            .collect()
    }

    /// Whether a sequence of `num_tokens` that starts with the cached blocks `hit` could have all its blocks now.
    pub fn can_hold(&self, hit: &[BlockId], num_tokens: usize) -> bool {
        let hit_but_free = hit.iter().filter(|&&block| self.pool.is_free(block)).count();
        num_tokens.div_ceil(self.block_size) - hit.len() + hit_but_free <= self.pool.num_free()
    }

    /// Begins a table with cached blocks.
    pub fn attach(&mut self, hit: Vec<BlockId>) -> BlockTable {
        for &block in &hit {
            self.pool.acquire(block);
        }
        BlockTable {
            num_published: hit.len(),
            blocks: hit,
            shared: None,
        }
    }

    /// Adds blocks until the table covers positions `0..end`. False when the pool runs out; what was added stays.
    #[must_use]
    pub fn grow(&mut self, table: &mut BlockTable, end: usize) -> bool {
        while table.blocks.len() * self.block_size < end {
            let Some(block) = self.pool.allocate() else {
                return false;
            };
            table.blocks.push(block);
            table.shared = None;
        }
        true
    }

    /// Lets other sequences find the table's first `hashes.len()` blocks. Their content must be written by steps that run
    /// before any step planned from now on.
    pub fn publish(&mut self, table: &mut BlockTable, hashes: &[BlockHash]) {
        if !self.prefix_caching {
            return;
        }
        for (&block, &hash) in table.blocks.iter().zip(hashes).skip(table.num_published) {
            self.pool.register(block, hash);
        }
        table.num_published = table.num_published.max(hashes.len().min(table.blocks.len()));
    }

    /// Gives the table's blocks back, the last first: a prefix outlives what follows it.
    pub fn release(&mut self, table: &mut BlockTable) {
        let table = std::mem::take(table);
        for block in table.blocks.into_iter().rev() {
            self.pool.release(block);
        }
    }

    /// Makes every cached prefix unfindable; sequences keep their blocks.
    pub fn forget_prefixes(&mut self) {
        self.pool.forget_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::TokenId;

    fn cached(cache: &mut KvCache, hasher: &BlockHasher, tokens: &[TokenId]) -> Vec<BlockHash> {
        let mut hashes = Vec::new();
        hasher.extend(&hasher.root(None), &mut hashes, tokens);
        let mut table = cache.attach(Vec::new());
        assert!(cache.grow(&mut table, tokens.len()));
        cache.publish(&mut table, &hashes);
        cache.release(&mut table);
        hashes
    }

    #[test]
    fn a_hit_leaves_the_last_token_to_compute() {
        let (mut cache, hasher) = (KvCache::new(8, 4, true), BlockHasher::new(4));
        let hashes = cached(&mut cache, &hasher, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(cache.find_prefix(&hashes, 9).len(), 2);
        assert_eq!(cache.find_prefix(&hashes, 8).len(), 1);
        assert_eq!(cache.find_prefix(&hashes, 1).len(), 0);
    }

    #[test]
    fn a_free_hit_counts_against_the_room_it_takes() {
        let (mut cache, hasher) = (KvCache::new(3, 4, true), BlockHasher::new(4));
        let hashes = cached(&mut cache, &hasher, &[1, 2, 3, 4, 5, 6, 7, 8]);
        let hit = cache.find_prefix(&hashes, 12);
        assert_eq!(hit.len(), 2);
        assert!(cache.can_hold(&hit, 12), "two hits and one fresh block");
        assert!(!cache.can_hold(&hit, 13));
        let mut table = cache.attach(hit);
        assert_eq!(cache.num_free_blocks(), 1);
        assert!(cache.grow(&mut table, 12) && !cache.grow(&mut table, 13));
    }

    #[test]
    fn the_end_of_a_sequence_is_evicted_before_its_start() {
        let (mut cache, hasher) = (KvCache::new(3, 2, true), BlockHasher::new(2));
        let hashes = cached(&mut cache, &hasher, &[1, 2, 3, 4, 5, 6]);
        let mut other = cache.attach(Vec::new());
        assert!(cache.grow(&mut other, 2));
        assert_eq!(cache.find_prefix(&hashes, 7).len(), 2);
    }

    #[test]
    fn without_prefix_caching_nothing_is_found() {
        let (mut cache, hasher) = (KvCache::new(3, 2, false), BlockHasher::new(2));
        let hashes = cached(&mut cache, &hasher, &[1, 2, 3, 4]);
        assert!(cache.find_prefix(&hashes, 5).is_empty());
    }
}
