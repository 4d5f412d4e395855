//! The activations of a step, allocated once for the largest.

use crate::backend::{Backend, DType, Result};
use crate::model::lfm2::config::{Ffn, Lfm2Config};

/// Sizes of a [`Workspace`]. `T` tokens and `N` rows of logits at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceShape {
    pub max_tokens: usize,
    pub max_logit_rows: usize,
    hidden: usize,
    qkv: usize,
    heads: usize,
    /// 0 when the model has no short convolution.
    bcx: usize,
    /// 0 when every layer has experts.
    dense_ffn: usize,
    /// 0 when no layer has.
    expert_ffn: usize,
    /// `[T, K]` tokens times experts per token.
    expert_rows: usize,
}

impl WorkspaceShape {
    pub fn new(config: &Lfm2Config, max_tokens: usize, max_logit_rows: usize) -> Self {
        let shape = &config.attention;
        let widest = |pick: fn(&Ffn) -> usize| config.layers.iter().map(|layer| pick(&layer.ffn)).max().unwrap_or(0);
        let has_attention = config.num_attention_layers() > 0;
        let heads = if has_attention {
            shape.num_q_heads * shape.head_dim
        } else {
            0
        };
        let kv = if has_attention {
            shape.num_kv_heads * shape.head_dim
        } else {
            0
        };
        Self {
            max_tokens,
            max_logit_rows,
            hidden: config.hidden_size,
            qkv: heads + 2 * kv,
            heads,
            bcx: if config.num_conv_layers() > 0 {
                3 * config.hidden_size
            } else {
                0
            },
            dense_ffn: widest(|ffn| if let Ffn::Dense { width } = ffn { *width } else { 0 }),
            expert_ffn: widest(|ffn| if let Ffn::Moe { width } = ffn { *width } else { 0 }),
            expert_rows: config.route.map_or(0, |route| max_tokens * route.experts_per_token),
        }
    }

    /// Values that all tensors hold, the experts' scratch space (gate, up, product and output of each pair) included.
    pub fn elements(&self) -> usize {
        let per_token = 3 * self.hidden + self.qkv + self.heads + self.bcx + self.bcx / 3 + 3 * self.dense_ffn;
        self.max_tokens * per_token
            + self.max_logit_rows * self.hidden
            + self.expert_rows * (3 * self.expert_ffn + self.hidden)
    }
}

/// Activations between operations. `T` rows each, `logit_rows` `N`.
pub struct Workspace<B: Backend> {
    /// `[T, H]` the residual stream.
    pub residual: B::Tensor,
    /// `[T, H]` what the next operator reads; after the last layer the final norm.
    pub normed: B::Tensor,
    /// `[T, H]` what the last operator adds to the residual.
    pub delta: B::Tensor,
    /// `[T, (Nq + 2 Nk) D]`
    pub qkv: B::Tensor,
    /// `[T, Nq D]`
    pub heads: B::Tensor,
    /// `[T, 3H]`
    pub bcx: B::Tensor,
    /// `[T, H]`
    pub conv: B::Tensor,
    /// `[T, 2F]`
    pub gate_up: B::Tensor,
    /// `[T, F]`
    pub activated: B::Tensor,
    /// `[N, H]` the tokens whose logits are wanted.
    pub logit_rows: B::Tensor,
    pub routing: Option<B::Routing>,
}

impl<B: Backend> Workspace<B> {
    pub fn new(backend: &mut B, config: &Lfm2Config, shape: &WorkspaceShape) -> Result<Self> {
        let dtype: DType = backend.activation_dtype();
        let routing = match config.route {
            Some(route) if shape.expert_ffn > 0 => {
                Some(backend.routing(shape.max_tokens, &route, shape.hidden, shape.expert_ffn)?)
            }
            _ => None,
        };
        // A tensor that the model never uses has one column, so that no backend sees an empty one.
        let mut tensor = |cols: usize| match cols {
            0 => backend.tensor(1, 1, dtype),
            _ => backend.tensor(shape.max_tokens, cols, dtype),
        };
        Ok(Self {
            residual: tensor(shape.hidden)?,
            normed: tensor(shape.hidden)?,
            delta: tensor(shape.hidden)?,
            qkv: tensor(shape.qkv)?,
            heads: tensor(shape.heads)?,
            bcx: tensor(shape.bcx)?,
            conv: tensor(shape.bcx / 3)?,
            gate_up: tensor(2 * shape.dense_ffn)?,
            activated: tensor(shape.dense_ffn)?,
            logit_rows: backend.tensor(shape.max_logit_rows, shape.hidden, dtype)?,
            routing,
        })
    }
}
