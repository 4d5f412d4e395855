//! Names for the content of full KV blocks: a block's hash covers every token from the sequence's start to its end.

use sha2::{Digest, Sha256};

use crate::step::TokenId;

/// Names the content of a full block, and through its parent all that stands before it.
pub type BlockHash = [u8; 32];

/// SHA-256 with a key that is random per process: nobody can compute a collision, or learn from timing alone which
/// prompt a hash belongs to (CVE-2025-25183 class).
#[derive(Clone, Debug)]
pub struct BlockHasher {
    key: [u8; 32],
    block_size: usize,
}

impl BlockHasher {
    pub fn new(block_size: usize) -> Self {
        let mut key = [0; 32];
        key[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
        key[16..].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
        Self { key, block_size }
    }

    /// The parent of a sequence's first block. Sequences with different salts never share a block.
    pub fn root(&self, cache_salt: Option<&str>) -> BlockHash {
        let mut sha = Sha256::new_with_prefix(self.key);
        if let Some(salt) = cache_salt {
            sha.update([1]);
            sha.update(salt.as_bytes());
        }
        sha.finalize().into()
    }

    /// Appends the hashes of the full blocks of `tokens` that `hashes` does not have yet.
    pub fn extend(&self, root: &BlockHash, hashes: &mut Vec<BlockHash>, tokens: &[TokenId]) {
        for block in tokens.chunks_exact(self.block_size).skip(hashes.len()) {
            let mut sha = Sha256::new_with_prefix(self.key);
            sha.update(hashes.last().unwrap_or(root));
            for token in block {
                sha.update(token.to_le_bytes());
            }
            hashes.push(sha.finalize().into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(hasher: &BlockHasher, salt: Option<&str>, tokens: &[TokenId]) -> Vec<BlockHash> {
        let mut out = Vec::new();
        hasher.extend(&hasher.root(salt), &mut out, tokens);
        out
    }

    #[test]
    fn a_hash_covers_everything_before_its_block() {
        let hasher = BlockHasher::new(4);
        let a = hashes(&hasher, None, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let b = hashes(&hasher, None, &[0, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(a.len(), 2, "the unfinished block has no name");
        assert_ne!(a[1], b[1], "same tokens, other past");
        assert_ne!(hashes(&hasher, None, &[7; 8])[0], hashes(&hasher, None, &[7; 8])[1]);
    }

    #[test]
    fn extending_in_pieces_gives_the_same_names() {
        let hasher = BlockHasher::new(3);
        let tokens: Vec<TokenId> = (0..20).collect();
        let root = hasher.root(None);
        let mut pieces = Vec::new();
        for end in [2, 3, 10, 11, 20] {
            hasher.extend(&root, &mut pieces, &tokens[..end]);
        }
        assert_eq!(pieces, hashes(&hasher, None, &tokens));
    }

    #[test]
    fn salts_and_processes_are_apart() {
        let hasher = BlockHasher::new(2);
        let tokens = [1, 2];
        let all = [
            hashes(&hasher, None, &tokens),
            hashes(&hasher, Some(""), &tokens),
            hashes(&hasher, Some("tenant"), &tokens),
            hashes(&BlockHasher::new(2), None, &tokens),
        ];
        for i in 0..all.len() {
            for j in 0..i {
                assert_ne!(all[i], all[j], "{i} and {j}");
            }
        }
    }
}
