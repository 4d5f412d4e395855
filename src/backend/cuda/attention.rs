//! Attention: the KV cache, what writes it, and which kernel reads it.

use super::driver::{Arg, Memory, TensorMap};
use super::{ATTENTION_COUNTERS, CudaBackend, CudaBatch, CudaTensor, CudaWeight, PIECE_TOKENS, SPLIT_TOKENS, need};
use crate::backend::{AttentionShape, DType, MAX_SPLITS, Result, SPLIT_BYTES};

/// `[blocks, block size, KV heads, D]` of a layer, K and V.
pub struct CudaKvCache {
    pub(super) k: Memory,
    pub(super) v: Memory,
    pub(super) inverse_frequency: Memory,
    pub(super) block_size: usize,
}

impl CudaBackend {
    /// `kv_cache`.
    pub(super) fn new_kv_cache(
        &mut self,
        num_blocks: usize,
        block_size: usize,
        shape: &AttentionShape,
        dtype: DType,
    ) -> Result<CudaKvCache> {
        need(
            "kv_cache",
            shape.head_dim == 64 && block_size.is_multiple_of(16),
            || {
                format!(
                    "head_dim {} (64 is built) and block size {block_size} (a multiple of 16)",
                    shape.head_dim
                )
            },
        )?;
        let group = shape.num_q_heads / shape.num_kv_heads.max(1);
        need(
            "kv_cache",
            group * shape.num_kv_heads == shape.num_q_heads && group <= 4,
            || {
                format!(
                    "{} query heads over {} KV heads (groups of 1 to 4 are built)",
                    shape.num_q_heads, shape.num_kv_heads
                )
            },
        )?;
        need("kv_cache", dtype == self.dtype, || {
            format!("KV in {dtype} with {} activations is not built", self.dtype)
        })?;
        let bytes = num_blocks * block_size * shape.num_kv_heads * shape.head_dim * dtype.size_bytes();
        if self.attention_partial.is_none() {
            self.attention_splits = (num_blocks * block_size / SPLIT_TOKENS + 4096).min(MAX_SPLITS);
            let partial = self.attention_splits * shape.num_q_heads * SPLIT_BYTES;
            self.attention_partial = Some(Memory::new(&self.device, partial, "workspace")?);
        }
        Ok(CudaKvCache {
            k: Memory::new(&self.device, bytes, "kv_cache")?,
            v: Memory::new(&self.device, bytes, "kv_cache")?,
            inverse_frequency: self.inverse_frequency(shape)?,
            block_size,
        })
    }

    /// `qk_norm_rope_kv`.
    pub(super) fn write_kv(
        &mut self,
        qkv: &mut CudaTensor,
        (q_norm, k_norm): (&CudaWeight, &CudaWeight),
        shape: &AttentionShape,
        batch: &CudaBatch,
        kv: &mut CudaKvCache,
    ) -> Result<()> {
        let heads = shape.num_q_heads + 2 * shape.num_kv_heads;
        self.qkv_shape(qkv, q_norm, k_norm, shape)?;
        let args = [
            qkv.address().arg(),
            q_norm.memory.address.arg(),
            k_norm.memory.address.arg(),
            kv.inverse_frequency.address.arg(),
            batch.positions().arg(),
            batch.slot_mapping().arg(),
            kv.k.address.arg(),
            kv.v.address.arg(),
            shape.num_q_heads.arg(),
            shape.num_kv_heads.arg(),
            kv.block_size.arg(),
            shape.norm_eps.arg(),
        ];
        self.device.launch(
            self.kernel("qk_norm_rope_kv", 0)?,
            [batch.tokens, heads.div_ceil(8), 1],
            256,
            0,
            &args,
        )
    }

    /// `attention`.
    pub(super) fn attend(
        &mut self,
        qkv: &CudaTensor,
        shape: &AttentionShape,
        batch: &CudaBatch,
        kv: &CudaKvCache,
        out: &mut CudaTensor,
    ) -> Result<()> {
        out.store();
        let group = shape.num_q_heads / shape.num_kv_heads;
        need("attention", group * PIECE_TOKENS <= 128, || {
            format!("groups of {group} query heads")
        })?;
        if batch.any_prefill {
            let args = [
                qkv.address().arg(),
                kv.k.address.arg(),
                kv.v.address.arg(),
                batch.block_tables().arg(),
                batch.piece_row().arg(),
                batch.piece_start().arg(),
                batch.row_starts().arg(),
                batch.context_lens().arg(),
                out.address().arg(),
                shape.num_q_heads.arg(),
                shape.num_kv_heads.arg(),
                kv.block_size.arg(),
                batch.max_blocks.arg(),
                shape.scale.arg(),
                PIECE_TOKENS.arg(),
            ];
            if self.has_wgmma {
                /// QUERY_ROWS of Q, KV_STAGES tiles of K and V, barriers, and room to align them.
                const SHARED_BYTES: usize = 16_384 + 4 * 16_384 + 64 + 1024;
                let function = self.kernel("attention_prefill_wgmma", SHARED_BYTES)?;
                let cache = |memory: &Memory| TensorMap::matrix(memory.address, memory.bytes / 128, 64, 16);
                let maps = [cache(&kv.k)?, cache(&kv.v)?];
                let args = [&args[..1], &args[3..]].concat();
                let grid = [shape.num_kv_heads, batch.pieces, 1];
                self.device
                    .launch_mapped(function, grid, 256, SHARED_BYTES, &maps, &args)?;
            } else {
                let function = self.kernel("attention_prefill", 0)?;
                let grid = [batch.pieces, shape.num_kv_heads, 1];
                self.device.launch(function, grid, 256, 0, &args)?;
            }
        }
        if batch.any_decode {
            self.attend_decode_rows("attention_decode", qkv, shape, batch, kv, out, &[])?;
        }
        Ok(())
    }

    /// `qk_norm_rope_attention`.
    pub(super) fn write_kv_and_attend(
        &mut self,
        qkv: &mut CudaTensor,
        (q_norm, k_norm): (&CudaWeight, &CudaWeight),
        shape: &AttentionShape,
        batch: &CudaBatch,
        kv: &mut CudaKvCache,
        out: &mut CudaTensor,
    ) -> Result<()> {
        if batch.any_prefill {
            self.write_kv(qkv, (q_norm, k_norm), shape, batch, kv)?;
            return self.attend(qkv, shape, batch, kv, out);
        }
        self.qkv_shape(qkv, q_norm, k_norm, shape)?;
        out.store();
        let more = [
            q_norm.memory.address.arg(),
            k_norm.memory.address.arg(),
            kv.inverse_frequency.address.arg(),
            batch.slot_mapping().arg(),
            shape.norm_eps.arg(),
        ];
        self.attend_decode_rows("attention_step", qkv, shape, batch, kv, out, &more)
    }

    fn qkv_shape(
        &self,
        qkv: &CudaTensor,
        q_norm: &CudaWeight,
        k_norm: &CudaWeight,
        shape: &AttentionShape,
    ) -> Result<()> {
        let heads = shape.num_q_heads + 2 * shape.num_kv_heads;
        need(
            "qk_norm_rope_kv",
            shape.head_dim == 64 && qkv.cols == heads * 64 && q_norm.dtype == self.dtype && k_norm.dtype == self.dtype,
            || format!("{heads} heads of {} in {} columns", shape.head_dim, qkv.cols),
        )
    }

    /// Launches a kernel of attention_decode.cu; `more` follows the arguments that both have.
    #[expect(clippy::too_many_arguments, reason = "a kernel's arguments")]
    fn attend_decode_rows(
        &self,
        name: &str,
        qkv: &CudaTensor,
        shape: &AttentionShape,
        batch: &CudaBatch,
        kv: &CudaKvCache,
        out: &CudaTensor,
        more: &[u64],
    ) -> Result<()> {
        /// `DecodeShared`: four warps' K and V tiles, two under way; queries; results.
        const SHARED_BYTES: usize = 4 * 2 * 2 * 32 * 128 + 16 * 128 + 4 * 4 * SPLIT_BYTES + 16;
        let group = shape.num_q_heads / shape.num_kv_heads;
        need(
            "attention",
            group <= 4 && batch.rows * shape.num_kv_heads <= ATTENTION_COUNTERS,
            || {
                format!(
                    "{} rows of {} KV heads, groups of {group}",
                    batch.rows, shape.num_kv_heads
                )
            },
        )?;
        let mut args = vec![
            qkv.address().arg(),
            kv.k.address.arg(),
            kv.v.address.arg(),
            batch.block_tables().arg(),
            batch.piece_row().arg(),
            batch.row_starts().arg(),
            batch.context_lens().arg(),
            out.address().arg(),
            self.attention_partial.as_ref().map_or(0, |m| m.address).arg(),
            self.attention_arrived.address.arg(),
            shape.num_q_heads.arg(),
            shape.num_kv_heads.arg(),
            kv.block_size.arg(),
            batch.max_blocks.arg(),
            shape.scale.arg(),
            batch.split_tokens.arg(),
            batch.max_splits.arg(),
        ];
        args.extend(more);
        // `max_splits` is a power of two: where blocks are many, half as many leave none without work.
        let crowded = batch.pieces * shape.num_kv_heads * batch.max_splits > 3 * self.device.multiprocessors;
        let splits = if crowded {
            batch.max_splits.div_ceil(2)
        } else {
            batch.max_splits
        };
        let grid = [batch.pieces, shape.num_kv_heads, splits];
        let function = self.kernel(name, SHARED_BYTES)?;
        self.device.launch(function, grid, 128, SHARED_BYTES, &args)
    }

    /// `[D / 2]` f32: what a position is multiplied with to get RoPE's angles.
    fn inverse_frequency(&self, shape: &AttentionShape) -> Result<Memory> {
        let memory = Memory::new(&self.device, shape.head_dim / 2 * 4, "rope")?;
        let values: Vec<u8> = (0..shape.head_dim / 2)
            .flat_map(|j| (shape.rope_theta.powf(-2.0 * j as f64 / shape.head_dim as f64) as f32).to_le_bytes())
            .collect();
        memory.upload(0, &values, "rope")?;
        Ok(memory)
    }
}
