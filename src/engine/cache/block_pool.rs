//! Which KV blocks are used, by how many sequences, and which free ones still hold a known prefix.

use std::collections::HashMap;

use super::prefix::BlockHash;
use crate::step::BlockId;

/// Reference-counted block numbers.
///
/// Invariants: `num_free + num_used = num_blocks`; a block is in the free list exactly when its reference count is 0; a
/// hash names at most one block. A free block keeps its hash, and so stays a possible hit, until it is allocated again.
#[derive(Debug)]
pub struct BlockPool {
    ref_counts: Vec<u32>,
    hashes: Vec<Option<BlockHash>>,
    by_hash: HashMap<BlockHash, BlockId>,
    free: FreeList,
}

impl BlockPool {
    pub fn new(num_blocks: usize) -> Self {
        Self {
            ref_counts: vec![0; num_blocks],
            hashes: vec![None; num_blocks],
            by_hash: HashMap::new(),
            free: FreeList::full(num_blocks),
        }
    }

    pub fn num_blocks(&self) -> usize {
        self.ref_counts.len()
    }

    pub fn num_free(&self) -> usize {
        self.free.len
    }

    pub fn num_used(&self) -> usize {
        self.ref_counts.iter().filter(|&&count| count > 0).count()
    }

    pub fn is_free(&self, block: BlockId) -> bool {
        self.ref_counts[block as usize] == 0
    }

    /// Takes the free block that is the least likely to be hit again; its hash is forgotten.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop_front()?;
        self.forget(block);
        self.ref_counts[block as usize] = 1;
        Some(block)
    }

    /// The block that holds this hash, used or free.
    pub fn find(&self, hash: &BlockHash) -> Option<BlockId> {
        self.by_hash.get(hash).copied()
    }

    /// One more sequence uses a block that [`find`](Self::find) returned.
    pub fn acquire(&mut self, block: BlockId) {
        let count = &mut self.ref_counts[block as usize];
        if *count == 0 {
            self.free.remove(block);
        }
        *count += 1;
    }

    /// One sequence fewer uses the block. A free block with a hash is evicted after all that became free before it, one
    /// without a hash is the next to be allocated.
    pub fn release(&mut self, block: BlockId) {
        let count = &mut self.ref_counts[block as usize];
        debug_assert!(*count > 0, "block {block} released twice");
        *count -= 1;
        if *count == 0 {
            match self.hashes[block as usize] {
                Some(_) => self.free.push_back(block),
                None => self.free.push_front(block),
            }
        }
    }

    /// Names the content of a used block. Where another block holds the same content already, that one keeps the name.
    pub fn register(&mut self, block: BlockId, hash: BlockHash) {
        if let std::collections::hash_map::Entry::Vacant(entry) = self.by_hash.entry(hash) {
            entry.insert(block);
            self.hashes[block as usize] = Some(hash);
        }
    }

    /// Forgets every hash; who uses which block does not change.
    pub fn forget_all(&mut self) {
        self.by_hash.clear();
        self.hashes.fill(None);
    }

    fn forget(&mut self, block: BlockId) {
        if let Some(hash) = self.hashes[block as usize].take() {
            self.by_hash.remove(&hash);
        }
    }
}

/// A doubly linked list of block numbers in two arrays: taking any member out is O(1).
#[derive(Debug)]
struct FreeList {
    /// Index `num_blocks` is the list's head and tail.
    next: Vec<u32>,
    prev: Vec<u32>,
    len: usize,
}

impl FreeList {
    /// All blocks, 0 first.
    fn full(num_blocks: usize) -> Self {
        let n = num_blocks as u32;
        Self {
            next: (0..=n).map(|i| if i == n { 0 } else { i + 1 }).collect(),
            prev: (0..=n).map(|i| if i == 0 { n } else { i - 1 }).collect(),
            len: num_blocks,
        }
    }

    fn end(&self) -> u32 {
        self.next.len() as u32 - 1
    }

    fn pop_front(&mut self) -> Option<BlockId> {
        let first = self.next[self.end() as usize];
        (first != self.end()).then(|| {
            self.remove(first);
            first
        })
    }

    fn push_front(&mut self, block: BlockId) {
        self.insert_after(self.end(), block);
    }

    fn push_back(&mut self, block: BlockId) {
        self.insert_after(self.prev[self.end() as usize], block);
    }

    fn insert_after(&mut self, at: u32, block: BlockId) {
        let after = self.next[at as usize];
        self.next[at as usize] = block;
        self.prev[block as usize] = at;
        self.next[block as usize] = after;
        self.prev[after as usize] = block;
        self.len += 1;
    }

    fn remove(&mut self, block: BlockId) {
        let (before, after) = (self.prev[block as usize], self.next[block as usize]);
        self.next[before as usize] = after;
        self.prev[after as usize] = before;
        self.len -= 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hash(byte: u8) -> BlockHash {
        [byte; 32]
    }

    #[test]
    fn a_freed_block_is_hit_until_it_is_allocated_again() {
        let mut pool = BlockPool::new(2);
        let a = pool.allocate().unwrap();
        pool.register(a, hash(1));
        pool.release(a);
        assert_eq!(pool.find(&hash(1)), Some(a));
        let b = pool.allocate().unwrap();
        assert_ne!(a, b, "the block without content goes first");
        assert_eq!(pool.allocate(), Some(a));
        assert_eq!(pool.find(&hash(1)), None);
        assert_eq!(pool.allocate(), None);
    }

    #[test]
    fn cached_blocks_are_evicted_in_the_order_they_became_free() {
        let mut pool = BlockPool::new(3);
        let blocks: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        for (i, &block) in blocks.iter().enumerate() {
            pool.register(block, hash(i as u8));
        }
        for i in [1, 2, 0] {
            pool.release(blocks[i]);
        }
        pool.acquire(blocks[1]);
        pool.release(blocks[1]);
        let evicted: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        assert_eq!(evicted, [blocks[2], blocks[0], blocks[1]]);
    }

    #[test]
    fn equal_content_keeps_its_first_block() {
        let mut pool = BlockPool::new(2);
        let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        pool.register(a, hash(7));
        pool.register(b, hash(7));
        assert_eq!(pool.find(&hash(7)), Some(a));
        pool.release(b);
        assert_eq!(pool.allocate(), Some(b));
        assert_eq!(pool.find(&hash(7)), Some(a), "evicting the double leaves the first");
    }

    #[derive(Clone, Debug)]
    enum Op {
        Allocate,
        AcquireHash(u8),
        Release(usize),
        Register(usize, u8),
        ForgetAll,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => Just(Op::Allocate),
            2 => (0u8..8).prop_map(Op::AcquireHash),
            4 => any::<usize>().prop_map(Op::Release),
            3 => (any::<usize>(), 0u8..8).prop_map(|(i, h)| Op::Register(i, h)),
            1 => Just(Op::ForgetAll),
        ]
    }

    proptest! {
        #[test]
        fn free_plus_used_is_total(num_blocks in 1usize..12, ops in proptest::collection::vec(op(), 0..200)) {
            let mut pool = BlockPool::new(num_blocks);
            let mut held: Vec<BlockId> = Vec::new();
            for op in ops {
                match op {
                    Op::Allocate => match pool.allocate() {
                        Some(block) => {
                            prop_assert!(!held.contains(&block));
                            held.push(block);
                        }
                        None => prop_assert_eq!(pool.num_free(), 0),
                    },
                    Op::AcquireHash(h) => if let Some(block) = pool.find(&hash(h)) {
                        pool.acquire(block);
                        held.push(block);
                    },
                    Op::Release(i) => if !held.is_empty() {
                        pool.release(held.swap_remove(i % held.len()));
                    },
                    Op::Register(i, h) => if !held.is_empty() {
                        pool.register(held[i % held.len()], hash(h));
                    },
                    Op::ForgetAll => pool.forget_all(),
                }
                let mut distinct = held.clone();
                distinct.sort_unstable();
                distinct.dedup();
                prop_assert_eq!(pool.num_used(), distinct.len());
                prop_assert_eq!(pool.num_free() + pool.num_used(), num_blocks);
            }
        }
    }
}
