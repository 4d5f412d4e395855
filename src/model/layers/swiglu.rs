//! The dense feed-forward network.

use super::Workspace;
use crate::backend::{Backend, Result};
use crate::model::LoadError;
use crate::model::loader::Loader;

/// `w2(silu(w1 x) ⊙ w3 x)`. Source: transformers `Lfm2MLP`.
pub struct SwiGlu<B: Backend> {
    /// `[2F, H]`: w1 (gate), then w3 (up).
    w13: B::Weight,
    /// `[H, F]`
    w2: B::Weight,
}

impl<B: Backend> SwiGlu<B> {
    pub fn load(loader: &mut Loader<B>, prefix: &str) -> Result<Self, LoadError> {
        let name = |name: &str| format!("{prefix}{name}.weight");
        Ok(Self {
            w13: loader.rows(&[name("w1"), name("w3")])?,
            w2: loader.weight(&name("w2"))?,
        })
    }

    /// `ws.delta = ffn(ws.normed)`, or it is in `ws.residual` already, for `tokens` tokens.
    pub fn forward(&self, backend: &mut B, tokens: usize, ws: &mut Workspace<B>) -> Result<()> {
        backend.linear_swiglu(&ws.normed, tokens, &self.w13, &mut ws.gate_up, &mut ws.activated)?;
        backend.linear_residual(&ws.activated, tokens, &self.w2, None, &mut ws.residual, &mut ws.delta)
    }
}
