//! The decoder: `h += mixer(norm(h)); h += ffn(norm(h))` in every layer, then the final norm and the head.
//!
//! Source: transformers `Lfm2Model`, `Lfm2MoeModel`. Each residual addition is fused with the norm that follows it.

use super::config::{Ffn, Lfm2Config, Mixer};
use super::params::HEAD;
use crate::backend::{Backend, DType, Result};
use crate::model::LoadError;
use crate::model::layers::{Attention, Moe, ShortConv, SwiGlu, Workspace};
use crate::model::loader::Loader;

enum MixerLayer<B: Backend> {
    Attention(Attention<B>),
    ShortConv(ShortConv<B>),
}

enum FfnLayer<B: Backend> {
    Dense(SwiGlu<B>),
    Moe(Moe<B>),
}

struct DecoderLayer<B: Backend> {
    operator_norm: B::Weight,
    mixer: MixerLayer<B>,
    ffn_norm: B::Weight,
    ffn: FfnLayer<B>,
}

/// What one layer remembers of the past.
pub enum LayerState<B: Backend> {
    Kv(B::KvCache),
    Conv(B::ConvState),
}

/// What every layer remembers: KV blocks and conv-state slots.
pub struct Cache<B: Backend>(pub Vec<LayerState<B>>);

impl<B: Backend> Cache<B> {
    pub fn new(
        backend: &mut B,
        config: &Lfm2Config,
        num_blocks: usize,
        block_size: usize,
        kv_dtype: DType,
        num_slots: usize,
    ) -> Result<Self> {
        let state = |mixer| match mixer {
            Mixer::Attention => backend
                .kv_cache(num_blocks, block_size, &config.attention, kv_dtype)
                .map(LayerState::Kv),
            Mixer::ShortConv => backend
                .conv_state(num_slots, config.conv_taps, config.hidden_size)
                .map(LayerState::Conv),
        };
        config
            .layers
            .iter()
            .map(|layer| layer.mixer)
            .map(state)
            .collect::<Result<_>>()
            .map(Self)
    }
}

/// A text decoder on a backend.
pub struct Lfm2Text<B: Backend> {
    /// `[V, H]`
    embedding: B::Weight,
    layers: Vec<DecoderLayer<B>>,
    final_norm: B::Weight,
    /// `[V, H]`; none = the embedding.
    head: Option<B::Weight>,
    norm_eps: f32,
}

impl<B: Backend> Lfm2Text<B> {
    pub fn load(loader: &mut Loader<B>, config: &Lfm2Config) -> Result<Self, LoadError> {
        let embedding = loader.weight("embed_tokens.weight")?;
        let mut layers = Vec::with_capacity(config.layers.len());
        for (i, kind) in config.layers.iter().enumerate() {
            let operator_norm = loader.weight(&format!("layers.{i}.operator_norm.weight"))?;
            let mixer = match kind.mixer {
                Mixer::Attention => {
                    let prefix = format!("layers.{i}.self_attn.");
                    MixerLayer::Attention(Attention::load(loader, &prefix, config.attention)?)
                }
                Mixer::ShortConv => MixerLayer::ShortConv(ShortConv::load(loader, &format!("layers.{i}.conv."))?),
            };
            let ffn_norm = loader.weight(&format!("layers.{i}.ffn_norm.weight"))?;
            let prefix = format!("layers.{i}.feed_forward.");
            let ffn = match (kind.ffn, config.route) {
                (Ffn::Moe { .. }, Some(route)) => FfnLayer::Moe(Moe::load(loader, &prefix, route)?),
                _ => FfnLayer::Dense(SwiGlu::load(loader, &prefix)?),
            };
            layers.push(DecoderLayer {
                operator_norm,
                mixer,
                ffn_norm,
                ffn,
            });
        }
        Ok(Self {
            embedding,
            layers,
            final_norm: loader.weight("embedding_norm.weight")?,
            head: loader.optional(HEAD)?,
            norm_eps: config.norm_eps,
        })
    }

    /// Runs the batch's tokens: `ws.normed` `[T, H]` holds their final norms, and the cache has moved on.
    pub fn forward(
        &self,
        backend: &mut B,
        batch: &B::Batch,
        tokens: usize,
        ws: &mut Workspace<B>,
        cache: &mut Cache<B>,
    ) -> Result<()> {
        self.forward_observed(backend, batch, tokens, ws, cache, |_, _| Ok(()))
    }

    /// [`forward`](Self::forward); `observe` sees the residual stream `[T, H]` after the embedding and after each layer.
    pub fn forward_observed(
        &self,
        backend: &mut B,
        batch: &B::Batch,
        tokens: usize,
        ws: &mut Workspace<B>,
        cache: &mut Cache<B>,
        mut observe: impl FnMut(&mut B, &B::Tensor) -> Result<()>,
    ) -> Result<()> {
        let eps = self.norm_eps;
        backend.embed(&self.embedding, batch, &mut ws.residual)?;
        observe(backend, &ws.residual)?;
        if let Some(first) = self.layers.first() {
            backend.rms_norm(&ws.residual, tokens, &first.operator_norm, eps, &mut ws.normed)?;
        }
        for (i, (layer, state)) in self.layers.iter().zip(&mut cache.0).enumerate() {
            match (&layer.mixer, state) {
                (MixerLayer::Attention(mixer), LayerState::Kv(kv)) => mixer.forward(backend, batch, tokens, ws, kv)?,
                (MixerLayer::ShortConv(mixer), LayerState::Conv(state)) => {
                    mixer.forward(backend, batch, tokens, ws, state)?
                }
                _ => unreachable!("the cache is made from the same layer list"),
            }
            backend.add_rms_norm(
                &mut ws.residual,
                &ws.delta,
                tokens,
                &layer.ffn_norm,
                eps,
                &mut ws.normed,
            )?;
            match &layer.ffn {
                FfnLayer::Dense(ffn) => ffn.forward(backend, tokens, ws)?,
                FfnLayer::Moe(ffn) => ffn.forward(backend, tokens, ws)?,
            }
            let next_norm = self
                .layers
                .get(i + 1)
                .map_or(&self.final_norm, |next| &next.operator_norm);
            backend.add_rms_norm(&mut ws.residual, &ws.delta, tokens, next_norm, eps, &mut ws.normed)?;
            observe(backend, &ws.residual)?;
        }
        Ok(())
    }

    /// `out = head(final norms of the batch's logit tokens)`, `[rows, V]` f32, after [`forward`](Self::forward).
    /// `rows` is the number of `logit_tokens`.
    pub fn logits(
        &self,
        backend: &mut B,
        batch: &B::Batch,
        rows: usize,
        ws: &mut Workspace<B>,
        out: &mut B::Tensor,
    ) -> Result<()> {
        backend.gather_logit_rows(&ws.normed, batch, &mut ws.logit_rows)?;
        backend.linear(
            &ws.logit_rows,
            rows,
            self.head.as_ref().unwrap_or(&self.embedding),
            None,
            out,
        )
    }
}
