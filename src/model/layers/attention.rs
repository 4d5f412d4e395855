//! Grouped-query attention with per-head norms of q and k.

use super::Workspace;
use crate::backend::{AttentionShape, Backend, Result};
use crate::model::LoadError;
use crate::model::loader::Loader;

/// Source: transformers `Lfm2Attention`.
pub struct Attention<B: Backend> {
    /// `[(Nq + 2 Nk) D, H]`: q, then k, then v.
    qkv: B::Weight,
    /// `[D]`, shared by all heads.
    q_norm: B::Weight,
    k_norm: B::Weight,
    /// `[H, Nq D]`
    out: B::Weight,
    shape: AttentionShape,
}

impl<B: Backend> Attention<B> {
    pub fn load(loader: &mut Loader<B>, prefix: &str, shape: AttentionShape) -> Result<Self, LoadError> {
        let name = |name: &str| format!("{prefix}{name}.weight");
        Ok(Self {
            qkv: loader.rows(&[name("q_proj"), name("k_proj"), name("v_proj")])?,
            q_norm: loader.weight(&name("q_layernorm"))?,
            k_norm: loader.weight(&name("k_layernorm"))?,
            out: loader.weight(&name("out_proj"))?,
            shape,
        })
    }

    /// `ws.delta = attention(ws.normed)`, or it is in `ws.residual` already, for `tokens` tokens; their K and V go to the cache.
    pub fn forward(
        &self,
        backend: &mut B,
        batch: &B::Batch,
        tokens: usize,
        ws: &mut Workspace<B>,
        kv: &mut B::KvCache,
    ) -> Result<()> {
        backend.linear(&ws.normed, tokens, &self.qkv, None, &mut ws.qkv)?;
        let (q_norm, k_norm) = (&self.q_norm, &self.k_norm);
        backend.qk_norm_rope_attention(&mut ws.qkv, q_norm, k_norm, &self.shape, batch, kv, &mut ws.heads)?;
        backend.linear_residual(&ws.heads, tokens, &self.out, None, &mut ws.residual, &mut ws.delta)
    }
}
