//! The mixture of experts.

use super::Workspace;
use crate::backend::{Backend, BackendError, Result, RouteShape};
use crate::model::LoadError;
use crate::model::loader::Loader;

/// Sigmoid-routed SwiGLU experts. Source: transformers `Lfm2MoeSparseMoeBlock`.
pub struct Moe<B: Backend> {
    /// `[E, H]`
    gate: B::Weight,
    /// `[E]` f32, added to the scores for the selection only.
    bias: Option<B::Weight>,
    /// `[E, 2F, H]`
    w13: B::Weight,
    /// `[E, H, F]`
    w2: B::Weight,
    shape: RouteShape,
}

impl<B: Backend> Moe<B> {
    pub fn load(loader: &mut Loader<B>, prefix: &str, shape: RouteShape) -> Result<Self, LoadError> {
        let gate = loader.weight(&format!("{prefix}gate.weight"))?;
        let bias = loader.optional(&format!("{prefix}expert_bias"))?;
        let stacked = format!("{prefix}experts.gate_up_proj");
        let (w13, w2) = if loader.has(&stacked) {
            let w13 = loader.stacked_experts(&stacked)?;
            (w13, loader.stacked_experts(&format!("{prefix}experts.down_proj"))?)
        } else {
            let names = |list: &[&str]| -> Vec<Vec<String>> {
                let of = |e| {
                    list.iter()
                        .map(|name| format!("{prefix}experts.{e}.{name}.weight"))
                        .collect()
                };
                (0..shape.num_experts).map(of).collect()
            };
            let w13 = loader.experts(&names(&["w1", "w3"]))?;
            (w13, loader.experts(&names(&["w2"]))?)
        };
        Ok(Self {
            gate,
            bias,
            w13,
            w2,
            shape,
        })
    }

    /// `ws.delta = experts(ws.normed)`, or it is in `ws.residual` already, for `tokens` tokens.
    pub fn forward(&self, backend: &mut B, tokens: usize, ws: &mut Workspace<B>) -> Result<()> {
        let routing = ws.routing.as_mut().ok_or_else(|| BackendError {
            op: "moe_route",
            message: "the workspace was made for a dense model".into(),
            fatal: true,
        })?;
        backend.prefetch(&self.w13);
        backend.moe_route(&ws.normed, tokens, &self.gate, self.bias.as_ref(), &self.shape, routing)?;
        let (residual, delta) = (&mut ws.residual, &mut ws.delta);
        backend.moe_experts_residual(&ws.normed, tokens, &self.w13, &self.w2, routing, residual, delta)
    }
}
