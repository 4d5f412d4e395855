//! Names and shapes of the family's parameters: what a checkpoint must hold, what a dummy model makes up, what a model
//! costs. Names carry no prefix (`model.` in text checkpoints).

use super::config::{Ffn, Lfm2Config, Mixer};

/// What a parameter is, for random initialisation and for its storage type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// A matrix, or a stack of matrices.
    Matrix,
    /// The scale of an RMS norm.
    Norm,
    /// `[H, 1, L]` taps of a short convolution.
    Taps,
    /// A bias in the model's type.
    Bias,
    /// The router's selection bias: always f32.
    ExpertBias,
}

/// A parameter as a checkpoint stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    pub name: String,
    pub shape: Vec<usize>,
    pub kind: ParamKind,
}

impl Param {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The untied head; it has no prefix in a checkpoint.
pub const HEAD: &str = "lm_head.weight";

/// Every parameter of the decoder. `fused(i)` says whether the experts of layer i stand in two stacked tensors
/// (`experts.gate_up_proj`, `experts.down_proj`) instead of three for each expert.
pub fn params(config: &Lfm2Config, fused: impl Fn(usize) -> bool) -> Vec<Param> {
    let (h, shape) = (config.hidden_size, &config.attention);
    let mut list = List(Vec::new());
    list.add("embed_tokens.weight", [config.vocab_size, h], ParamKind::Matrix);
    list.add("embedding_norm.weight", [h], ParamKind::Norm);
    if !config.tie_embeddings {
        list.add(HEAD, [config.vocab_size, h], ParamKind::Matrix);
    }
    for (i, layer) in config.layers.iter().enumerate() {
        let layer_name = |name: &str| format!("layers.{i}.{name}");
        list.add(layer_name("operator_norm.weight"), [h], ParamKind::Norm);
        list.add(layer_name("ffn_norm.weight"), [h], ParamKind::Norm);
        match layer.mixer {
            Mixer::Attention => {
                let (q, kv) = (shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim);
                let name = |name: &str| format!("layers.{i}.self_attn.{name}.weight");
                list.add(name("q_proj"), [q, h], ParamKind::Matrix);
                list.add(name("k_proj"), [kv, h], ParamKind::Matrix);
                list.add(name("v_proj"), [kv, h], ParamKind::Matrix);
                list.add(name("out_proj"), [h, q], ParamKind::Matrix);
                list.add(name("q_layernorm"), [shape.head_dim], ParamKind::Norm);
                list.add(name("k_layernorm"), [shape.head_dim], ParamKind::Norm);
            }
            Mixer::ShortConv => {
                let name = |name: &str| format!("layers.{i}.conv.{name}");
                list.add(name("in_proj.weight"), [3 * h, h], ParamKind::Matrix);
                list.add(name("conv.weight"), [h, 1, config.conv_taps], ParamKind::Taps);
                list.add(name("out_proj.weight"), [h, h], ParamKind::Matrix);
                if config.conv_bias {
                    list.add(name("in_proj.bias"), [3 * h], ParamKind::Bias);
                    list.add(name("conv.bias"), [h], ParamKind::Bias);
                    list.add(name("out_proj.bias"), [h], ParamKind::Bias);
                }
            }
        }
        match (layer.ffn, config.route) {
            (Ffn::Moe { width }, Some(route)) => {
                let name = |name: &str| format!("layers.{i}.feed_forward.{name}");
                list.add(name("gate.weight"), [route.num_experts, h], ParamKind::Matrix);
                if config.use_expert_bias {
                    list.add(name("expert_bias"), [route.num_experts], ParamKind::ExpertBias);
                }
                if fused(i) {
                    list.add(
                        name("experts.gate_up_proj"),
                        [route.num_experts, 2 * width, h],
                        ParamKind::Matrix,
                    );
                    list.add(
                        name("experts.down_proj"),
                        [route.num_experts, h, width],
                        ParamKind::Matrix,
                    );
                } else {
                    for e in 0..route.num_experts {
                        list.swiglu(&name(&format!("experts.{e}.")), h, width);
                    }
                }
            }
            (Ffn::Dense { width } | Ffn::Moe { width }, _) => list.swiglu(&layer_name("feed_forward."), h, width),
        }
    }
    list.0
}

struct List(Vec<Param>);

impl List {
    fn add<const N: usize>(&mut self, name: impl Into<String>, shape: [usize; N], kind: ParamKind) {
        self.0.push(Param {
            name: name.into(),
            shape: shape.into(),
            kind,
        });
    }

    fn swiglu(&mut self, prefix: &str, hidden: usize, width: usize) {
        self.add(format!("{prefix}w1.weight"), [width, hidden], ParamKind::Matrix);
        self.add(format!("{prefix}w3.weight"), [width, hidden], ParamKind::Matrix);
        self.add(format!("{prefix}w2.weight"), [hidden, width], ParamKind::Matrix);
    }
}
