//! The gated short convolution.

use super::Workspace;
use crate::backend::{Backend, ConvWeights, Result};
use crate::model::LoadError;
use crate::model::loader::Loader;

/// Source: transformers `Lfm2ShortConv`.
pub struct ShortConv<B: Backend> {
    /// `[3H, H]`: B, then C, then x.
    in_proj: B::Weight,
    in_bias: Option<B::Weight>,
    /// `[H, L]`; the last tap multiplies the current token.
    taps: B::Weight,
    taps_bias: Option<B::Weight>,
    /// `[H, H]`
    out_proj: B::Weight,
    out_bias: Option<B::Weight>,
}

impl<B: Backend> ShortConv<B> {
    pub fn load(loader: &mut Loader<B>, prefix: &str) -> Result<Self, LoadError> {
        let name = |name: &str| format!("{prefix}{name}");
        Ok(Self {
            in_proj: loader.weight(&name("in_proj.weight"))?,
            in_bias: loader.optional(&name("in_proj.bias"))?,
            taps: loader.weight(&name("conv.weight"))?,
            taps_bias: loader.optional(&name("conv.bias"))?,
            out_proj: loader.weight(&name("out_proj.weight"))?,
            out_bias: loader.optional(&name("out_proj.bias"))?,
        })
    }

    /// `ws.delta = conv(ws.normed)`, or it is in `ws.residual` already, for `tokens` tokens; the slots' states move on.
    pub fn forward(
        &self,
        backend: &mut B,
        batch: &B::Batch,
        tokens: usize,
        ws: &mut Workspace<B>,
        state: &mut B::ConvState,
    ) -> Result<()> {
        let weights = ConvWeights {
            in_proj: &self.in_proj,
            in_bias: self.in_bias.as_ref(),
            taps: &self.taps,
            taps_bias: self.taps_bias.as_ref(),
        };
        backend.linear_short_conv(&ws.normed, tokens, weights, batch, state, &mut ws.bcx, &mut ws.conv)?;
        let bias = self.out_bias.as_ref();
        backend.linear_residual(&ws.conv, tokens, &self.out_proj, bias, &mut ws.residual, &mut ws.delta)
    }
}
