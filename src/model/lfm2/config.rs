//! config.json of the family, typed, with its old and its new names.
//!
//! Source: transformers `Lfm2Config` and `Lfm2MoeConfig`. Every size is bounded here, so that products of sizes later on
//! cannot overflow and a malformed file cannot ask for an absurd allocation.

use serde_json::Value;

use crate::backend::{AttentionShape, RouteShape};
use crate::model::LoadError;

/// What mixes tokens in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixer {
    Attention,
    ShortConv,
}

/// What follows the mixer in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ffn {
    /// SwiGLU of this width.
    Dense { width: usize },
    /// Experts of this width each.
    Moe { width: usize },
}

/// One decoder layer's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerKind {
    pub mixer: Mixer,
    pub ffn: Ffn,
}

/// Shape of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Lfm2Config {
    pub hidden_size: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    /// Of every RMS norm.
    pub norm_eps: f32,
    pub attention: AttentionShape,
    /// Taps of the short convolution (`conv_L_cache`).
    pub conv_taps: usize,
    /// Biases on the convolution and both its projections.
    pub conv_bias: bool,
    /// None for a dense model.
    pub route: Option<RouteShape>,
    /// Each expert layer has an f32 bias on the selection scores.
    pub use_expert_bias: bool,
    /// The head is the embedding.
    pub tie_embeddings: bool,
    pub layers: Vec<LayerKind>,
}

const MAX_LAYERS: usize = 256;
const MAX_EXPERTS: usize = 1024;
const MAX_WIDTH: usize = 1 << 18;

impl Lfm2Config {
    /// Reads the configuration of `Lfm2ForCausalLM`.
    pub fn dense(config: &Value) -> Result<Self, LoadError> {
        let fields = Fields(config);
        let width = dense_ffn_width(fields)?;
        let count = fields.size("num_hidden_layers", MAX_LAYERS)?;
        let mixers = match (mixers_by_type(fields, count)?, fields.get("full_attn_idxs")) {
            (Some(mixers), _) => mixers,
            (None, Some(list)) => mixers_by_index(list, count)?,
            (None, None) => vec![Mixer::Attention; count],
        };
        let layers = mixers
            .into_iter()
            .map(|mixer| LayerKind {
                mixer,
                ffn: Ffn::Dense { width },
            })
            .collect();
        Self::with_layers(fields, layers, None, false)
    }

    /// Reads the configuration of `Lfm2MoeForCausalLM`. Widths are literal; `layer_types` is required.
    pub fn moe(config: &Value) -> Result<Self, LoadError> {
        let fields = Fields(config);
        let count = fields.size("num_hidden_layers", MAX_LAYERS)?;
        let mixers = mixers_by_type(fields, count)?
            .ok_or_else(|| LoadError::config("layer_types", "is required for a mixture of experts"))?;
        let num_dense = fields.size_or("num_dense_layers", 0, MAX_LAYERS, 2)?;
        let dense = Ffn::Dense {
            width: fields.size("intermediate_size", MAX_WIDTH)?,
        };
        let sparse = Ffn::Moe {
            width: fields.size("moe_intermediate_size", MAX_WIDTH)?,
        };
        let num_experts = fields.size("num_experts", MAX_EXPERTS)?;
        let route = RouteShape {
            num_experts,
            experts_per_token: fields.size("num_experts_per_tok", num_experts.min(64))?,
            norm_topk_prob: fields.flag_or("norm_topk_prob", true)?,
            routed_scaling_factor: fields.number_or("routed_scaling_factor", 1.0, 1e-6..=1e6)? as f32,
        };
        let layers = mixers
            .into_iter()
            .enumerate()
            .map(|(i, mixer)| LayerKind {
                mixer,
                ffn: if i < num_dense { dense } else { sparse },
            })
            .collect();
        Self::with_layers(fields, layers, Some(route), fields.flag_or("use_expert_bias", true)?)
    }

    fn with_layers(
        fields: Fields,
        layers: Vec<LayerKind>,
        route: Option<RouteShape>,
        use_expert_bias: bool,
    ) -> Result<Self, LoadError> {
        let hidden_size = fields.size("hidden_size", 1 << 16)?;
        let norm_eps = fields.number_or("norm_eps", 1e-5, 1e-12..=1.0)? as f32;
        let tie_embeddings = match fields.get("tie_embedding") {
            Some(_) => fields.flag_or("tie_embedding", true)?,
            None => fields.flag_or("tie_word_embeddings", true)?,
        };
        Ok(Self {
            hidden_size,
            vocab_size: fields.size("vocab_size", 1 << 22)?,
            max_position_embeddings: fields.size("max_position_embeddings", 1 << 24)?,
            norm_eps,
            attention: attention_shape(fields, hidden_size, norm_eps)?,
            conv_taps: fields.size_or("conv_L_cache", 2, 16, 3)?,
            conv_bias: fields.flag_or("conv_bias", false)?,
            route,
            use_expert_bias,
            tie_embeddings,
            layers,
        })
    }

    /// Layers that cache K and V.
    pub fn num_attention_layers(&self) -> usize {
        self.layers
            .iter()
            .filter(|layer| layer.mixer == Mixer::Attention)
            .count()
    }

    /// Layers that keep a conv state.
    pub fn num_conv_layers(&self) -> usize {
        self.layers.len() - self.num_attention_layers()
    }

    /// Tokens whose replay rebuilds every conv state: each conv layer looks back taps − 1 tokens, one behind the other.
    pub fn conv_replay_tokens(&self) -> usize {
        self.num_conv_layers() * (self.conv_taps - 1)
    }
}

/// Width of `w1` in a dense model: the old names adjust it as the training code did.
fn dense_ffn_width(fields: Fields) -> Result<usize, LoadError> {
    let field = if fields.get("block_ff_dim").is_some() {
        "block_ff_dim"
    } else {
        "intermediate_size"
    };
    let mut width = fields.size(field, MAX_WIDTH)?;
    if fields.flag_or("block_auto_adjust_ff_dim", true)? {
        width = 2 * width / 3;
        // An explicit null switches the multiplier and the rounding off; absent means 1.0.
        if fields.0.get("block_ffn_dim_multiplier") != Some(&Value::Null) {
            let multiplier = fields.number_or("block_ffn_dim_multiplier", 1.0, 1e-3..=1e3)?;
            let multiple_of = fields.size_or("block_multiple_of", 1, MAX_WIDTH, 256)?;
            width = ((multiplier * width as f64) as usize).div_ceil(multiple_of) * multiple_of;
        }
    }
    if !(1..=MAX_WIDTH).contains(&width) {
        let message = format!("gives a feed-forward width of {width} after adjustment; 1 to {MAX_WIDTH} is supported");
        return Err(LoadError::config(field, message));
    }
    Ok(width)
}

fn mixers_by_type(fields: Fields, count: usize) -> Result<Option<Vec<Mixer>>, LoadError> {
    let Some(types) = fields.get("layer_types") else {
        return Ok(None);
    };
    let bad = |message: String| LoadError::config("layer_types", message);
    let types = types.as_array().ok_or_else(|| bad("must be a list".into()))?;
    if types.len() != count {
        return Err(bad(format!(
            "has {} entries, num_hidden_layers is {count}",
            types.len()
        )));
    }
    let mixer = |value: &Value| match value.as_str() {
        Some("conv") => Ok(Mixer::ShortConv),
        Some("full_attention") => Ok(Mixer::Attention),
        _ => Err(bad(format!(
            "unknown layer type {}; supported are conv, full_attention",
            clip(value)
        ))),
    };
    types.iter().map(mixer).collect::<Result<_, _>>().map(Some)
}

fn mixers_by_index(list: &Value, count: usize) -> Result<Vec<Mixer>, LoadError> {
    let bad = |message: String| LoadError::config("full_attn_idxs", message);
    let mut mixers = vec![Mixer::ShortConv; count];
    for value in list.as_array().ok_or_else(|| bad("must be a list".into()))? {
        let index = value.as_u64().and_then(|i| usize::try_from(i).ok());
        let mixer = index.and_then(|i| mixers.get_mut(i));
        *mixer.ok_or_else(|| bad(format!("{} is not the index of one of {count} layers", clip(value))))? =
            Mixer::Attention;
    }
    Ok(mixers)
}

fn attention_shape(fields: Fields, hidden_size: usize, norm_eps: f32) -> Result<AttentionShape, LoadError> {
    let num_q_heads = fields.size("num_attention_heads", 1024)?;
    let num_kv_heads = fields.size("num_key_value_heads", num_q_heads)?;
    if !num_q_heads.is_multiple_of(num_kv_heads) {
        let message = format!("{num_kv_heads} does not divide num_attention_heads {num_q_heads}");
        return Err(LoadError::config("num_key_value_heads", message));
    }
    let head_dim = match fields.get("head_dim") {
        Some(_) => fields.size("head_dim", 1024)?,
        None if hidden_size.is_multiple_of(num_q_heads) => hidden_size / num_q_heads,
        None => {
            let message = format!("{num_q_heads} does not divide hidden_size {hidden_size}, and head_dim is absent");
            return Err(LoadError::config("num_attention_heads", message));
        }
    };
    if !head_dim.is_multiple_of(2) || head_dim > 1024 {
        let message = format!("{head_dim} is not an even number up to 1024");
        return Err(LoadError::config("head_dim", message));
    }
    Ok(AttentionShape {
        num_q_heads,
        num_kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        rope_theta: rope_theta(fields)?,
        norm_eps,
    })
}

/// `rope_parameters` (new) wins over `rope_theta` (old); `rope_scaling` is the old place of `rope_type`.
fn rope_theta(fields: Fields) -> Result<f64, LoadError> {
    for place in ["rope_parameters", "rope_scaling"] {
        let Some(nested) = fields.get(place) else { continue };
        let kind = nested
            .get("rope_type")
            .or_else(|| nested.get("type"))
            .filter(|kind| !kind.is_null());
        if let Some(kind) = kind.filter(|kind| kind.as_str() != Some("default")) {
            let message = format!("{} is not supported; only \"default\" is", clip(kind));
            return Err(LoadError::config(format!("{place}.rope_type"), message));
        }
    }
    let range = 1.0..=1e12;
    match fields.get("rope_parameters") {
        Some(nested) if nested.get("rope_theta").is_some_and(|theta| !theta.is_null()) => {
            Fields(nested).number_or("rope_theta", 1e6, range)
        }
        _ => fields.number_or("rope_theta", 1e6, range),
    }
}

/// A JSON object whose null fields count as absent.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a Value);

impl<'a> Fields<'a> {
    fn get(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// A required size, 1 to `max`.
    fn size(self, name: &str, max: usize) -> Result<usize, LoadError> {
        if self.get(name).is_none() {
            return Err(LoadError::config(name, "is missing"));
        }
        self.size_or(name, 1, max, 1)
    }

    fn size_or(self, name: &str, min: usize, max: usize, default: usize) -> Result<usize, LoadError> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        let size = value
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| (min..=max).contains(n));
        size.ok_or_else(|| LoadError::config(name, format!("{} is not an integer from {min} to {max}", clip(value))))
    }

    fn number_or(self, name: &str, default: f64, range: std::ops::RangeInclusive<f64>) -> Result<f64, LoadError> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        value.as_f64().filter(|x| range.contains(x)).ok_or_else(|| {
            let message = format!(
                "{} is not a number from {:e} to {:e}",
                clip(value),
                range.start(),
                range.end()
            );
            LoadError::config(name, message)
        })
    }

    fn flag_or(self, name: &str, default: bool) -> Result<bool, LoadError> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        value
            .as_bool()
            .ok_or_else(|| LoadError::config(name, format!("{} is not true or false", clip(value))))
    }
}

/// A value for an error message, short whatever the file holds.
fn clip(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// LFM2-1.2B in the old names.
    fn old_dense() -> Value {
        json!({
            "architectures": ["Lfm2ForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32,
            "num_heads": 7, "num_key_value_heads": 8, "vocab_size": 65536, "max_position_embeddings": 128000,
            "block_ff_dim": 12288, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": true, "full_attn_idxs": [2], "rope_theta": 1000000.0, "theta": 5.0,
            "norm_eps": 1e-5, "block_norm_eps": 7.0, "tie_embedding": true, "tie_word_embeddings": false
        })
    }

    fn new_moe() -> Value {
        json!({
            "hidden_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 128000, "max_position_embeddings": 128000, "intermediate_size": 7168,
            "moe_intermediate_size": 1792, "num_dense_layers": 1, "num_experts": 32, "num_experts_per_tok": 4,
            "layer_types": ["conv", "conv", "full_attention"], "rope_theta": 3.0,
            "rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"}
        })
    }

    fn with(mut config: Value, field: &str, value: Value) -> Value {
        config[field] = value;
        config
    }

    #[test]
    fn old_names() {
        let config = Lfm2Config::dense(&old_dense()).unwrap();
        assert_eq!(
            config
                .layers
                .iter()
                .map(|l| l.mixer == Mixer::Attention)
                .collect::<Vec<_>>(),
            [false, false, true, false]
        );
        assert!(config.layers.iter().all(|l| l.ffn == Ffn::Dense { width: 8192 }));
        assert_eq!((config.attention.head_dim, config.attention.num_q_heads), (64, 32));
        assert_eq!((config.norm_eps, config.attention.rope_theta), (1e-5, 1e6));
        assert!(config.tie_embeddings, "tie_embedding overrides tie_word_embeddings");
        assert_eq!(config.conv_replay_tokens(), 3 * 2);
    }

    #[test]
    fn new_names() {
        let config = Lfm2Config::moe(&new_moe()).unwrap();
        assert_eq!(config.attention.rope_theta, 5e6);
        assert_eq!(config.layers[0].ffn, Ffn::Dense { width: 7168 });
        assert_eq!(
            config.layers[2],
            LayerKind {
                mixer: Mixer::Attention,
                ffn: Ffn::Moe { width: 1792 }
            }
        );
        let route = config.route.unwrap();
        assert!(route.norm_topk_prob && config.use_expert_bias && config.tie_embeddings);
        assert_eq!(
            (route.num_experts, route.experts_per_token, route.routed_scaling_factor),
            (32, 4, 1.0)
        );
    }

    #[test]
    fn layer_types_win_and_absence_means_attention_everywhere() {
        let types = json!(["full_attention", "conv", "conv", "conv"]);
        let config = Lfm2Config::dense(&with(old_dense(), "layer_types", types)).unwrap();
        assert_eq!(config.layers[0].mixer, Mixer::Attention);
        assert_eq!(config.layers[2].mixer, Mixer::ShortConv);
        let config = Lfm2Config::dense(&with(old_dense(), "full_attn_idxs", Value::Null)).unwrap();
        assert_eq!(config.num_attention_layers(), 4);
    }

    #[test]
    fn ffn_width_rule() {
        let width = |config: Value| match Lfm2Config::dense(&config).unwrap().layers[0].ffn {
            Ffn::Dense { width } | Ffn::Moe { width } => width,
        };
        let only = |ff: usize| with(old_dense(), "block_ff_dim", json!(ff));
        assert_eq!(width(only(6656)), 4608);
        assert_eq!(width(only(10240)), 6912);
        assert_eq!(
            width(with(only(10752), "block_auto_adjust_ff_dim", json!(false))),
            10752
        );
        assert_eq!(width(with(only(10000), "block_ffn_dim_multiplier", Value::Null)), 6666);
        assert_eq!(width(with(only(9000), "block_ffn_dim_multiplier", json!(1.3))), 7936);
        let mut fallback = with(old_dense(), "intermediate_size", json!(12288));
        fallback.as_object_mut().unwrap().remove("block_ff_dim");
        assert_eq!(width(fallback), 8192);
    }

    #[test]
    fn head_dim_is_honoured() {
        let config = Lfm2Config::dense(&with(old_dense(), "head_dim", json!(128))).unwrap();
        assert_eq!(config.attention.head_dim, 128);
        assert_eq!(config.attention.scale, 1.0 / 128f32.sqrt());
    }

    #[test]
    fn absurd_values_are_refused_by_name() {
        let huge = json!(u64::MAX);
        let cases = [
            ("hidden_size", json!(0)),
            ("hidden_size", huge.clone()),
            ("hidden_size", json!(-1)),
            ("hidden_size", json!("2048")),
            ("hidden_size", Value::Null),
            ("num_hidden_layers", huge.clone()),
            ("num_attention_heads", json!(31)),
            ("num_key_value_heads", json!(5)),
            ("num_key_value_heads", json!(0)),
            ("head_dim", json!(63)),
            ("vocab_size", json!(1e300)),
            ("max_position_embeddings", huge.clone()),
            ("block_ff_dim", huge.clone()),
            ("block_ff_dim", json!(1)),
            ("block_multiple_of", json!(0)),
            ("block_ffn_dim_multiplier", json!(1e9)),
            ("conv_L_cache", json!(1)),
            ("conv_L_cache", json!(1_000_000)),
            ("norm_eps", json!(0.0)),
            ("rope_theta", json!(-1.0)),
            ("full_attn_idxs", json!([4])),
            ("full_attn_idxs", json!("all")),
            ("layer_types", json!(["conv"])),
            ("layer_types", json!(["conv", "mamba", "conv", "conv"])),
            ("rope_scaling", json!({"rope_type": "yarn"})),
            ("conv_bias", json!("no")),
        ];
        for (field, value) in cases {
            let error = Lfm2Config::dense(&with(old_dense(), field, value.clone()))
                .expect_err(field)
                .to_string();
            assert!(error.contains(field) && error.len() < 300, "{field} = {value}: {error}");
        }
        for (field, value) in [
            ("num_experts", huge.clone()),
            ("num_experts_per_tok", json!(33)),
            ("moe_intermediate_size", Value::Null),
            ("layer_types", Value::Null),
            ("num_dense_layers", json!(-2)),
        ] {
            let error = Lfm2Config::moe(&with(new_moe(), field, value))
                .expect_err(field)
                .to_string();
            assert!(error.contains(field), "{field}: {error}");
        }
    }
}
