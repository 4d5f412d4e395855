//! What a model costs: bytes it holds and bytes a step must read. Floors for benchmarks, sizes for the memory plan.

use super::lfm2::config::{Ffn, Lfm2Config};
use super::lfm2::params::params;
use super::loader::stored_bytes;
use crate::backend::DType;

/// Byte counts of a model in one storage type.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCost {
    pub parameters: u64,
    /// All parameters as stored.
    pub weight_bytes: u64,
    /// Parameters that every decode step reads whole: all but the experts (the embedding once, as the head).
    pub shared_bytes: u64,
    /// One expert of one layer, summed over the expert layers.
    pub expert_bytes: u64,
    pub num_experts: usize,
    pub experts_per_token: usize,
    /// K and V of one token in all attention layers.
    pub kv_bytes_per_token: u64,
    /// Conv states of one sequence.
    pub conv_bytes_per_slot: u64,
    /// Parameters that every token is multiplied with: all but the embedding, the head and the experts it does not choose.
    pub parameters_per_token: u64,
    /// Parameters of the head, which only tokens that sample need.
    pub head_parameters: u64,
    /// Q's width, summed over the attention layers.
    pub attention_width: u64,
}

impl ModelCost {
    /// Weights and activations in `dtype`, KV in `kv_dtype`.
    pub fn new(config: &Lfm2Config, dtype: DType, kv_dtype: DType) -> Self {
        let params = params(config, |_| false);
        let weight_bytes: u64 = params.iter().map(|param| stored_bytes(param, dtype)).sum();
        let expert_elements = |ffn: &Ffn| match ffn {
            Ffn::Moe { width } => 3 * width * config.hidden_size,
            Ffn::Dense { .. } => 0,
        };
        let expert_parameters: usize = config.layers.iter().map(|layer| expert_elements(&layer.ffn)).sum();
        let expert_bytes = (expert_parameters * dtype.size_bytes()) as u64;
        let (num_experts, experts_per_token) = config
            .route
            .map_or((0, 0), |route| (route.num_experts, route.experts_per_token));
        // An untied embedding is a table of which a step reads single rows.
        let table = if config.tie_embeddings {
            0
        } else {
            config.vocab_size * config.hidden_size * dtype.size_bytes()
        };
        let shape = &config.attention;
        let parameters: u64 = params.iter().map(|param| param.elements() as u64).sum();
        let head_parameters = (config.vocab_size * config.hidden_size) as u64;
        let tables = if config.tie_embeddings { 1 } else { 2 };
        let unchosen = expert_parameters * (num_experts - experts_per_token);
        let kv_per_token = config.num_attention_layers() * 2 * shape.num_kv_heads * shape.head_dim;
        let conv_per_slot = config.num_conv_layers() * config.hidden_size * (config.conv_taps - 1);
        Self {
            parameters,
            weight_bytes,
            shared_bytes: weight_bytes - expert_bytes * num_experts as u64 - table as u64,
            expert_bytes,
            num_experts,
            experts_per_token,
            kv_bytes_per_token: (kv_per_token * kv_dtype.size_bytes()) as u64,
            conv_bytes_per_slot: (conv_per_slot * dtype.size_bytes()) as u64,
            parameters_per_token: parameters - tables * head_parameters - unchosen as u64,
            head_parameters,
            attention_width: (config.num_attention_layers() * shape.num_q_heads * shape.head_dim) as u64,
        }
    }

    /// Distinct experts that `tokens` tokens choose in one layer, if they choose evenly and independently.
    pub fn distinct_experts(&self, tokens: usize) -> f64 {
        if self.num_experts == 0 {
            return 0.0;
        }
        let (all, each) = (self.num_experts as f64, self.experts_per_token as f64);
        all * (1.0 - (1.0 - each / all).powf(tokens as f64))
    }

    /// Bytes of weights that one decode step of `sequences` sequences must read, in expectation.
    pub fn decode_weight_bytes(&self, sequences: usize) -> f64 {
        self.shared_bytes as f64 + self.expert_bytes as f64 * self.distinct_experts(sequences)
    }

    /// Operations of the prefill of `sequences` prompts of `tokens` each: two for each multiplication with a parameter, one row
    /// of logits a sequence, and QK and PV over half of the square.
    pub fn prefill_flops(&self, sequences: usize, tokens: usize) -> f64 {
        let tokens = tokens as f64;
        let dense = 2.0 * self.parameters_per_token as f64 * tokens + 2.0 * self.head_parameters as f64;
        let attention = 2.0 * self.attention_width as f64 * tokens * tokens;
        sequences as f64 * (dense + attention)
    }

    /// Bytes that the step must move in all: weights, the KV of `context` tokens each, conv states in and out.
    pub fn decode_step_bytes(&self, sequences: usize, context: usize) -> f64 {
        let state = self.kv_bytes_per_token as f64 * context as f64 + 2.0 * self.conv_bytes_per_slot as f64;
        self.decode_weight_bytes(sequences) + sequences as f64 * state
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn lfm2_5_8b() -> Lfm2Config {
        let attention = [2, 6, 10, 14, 18, 21];
        let types: Vec<&str> = (0..24)
            .map(|i| {
                if attention.contains(&i) {
                    "full_attention"
                } else {
                    "conv"
                }
            })
            .collect();
        Lfm2Config::moe(&json!({
            "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 128000, "max_position_embeddings": 128000, "intermediate_size": 7168,
            "moe_intermediate_size": 1792, "num_experts": 32, "num_experts_per_tok": 4, "layer_types": types
        }))
        .unwrap()
    }

    /// The published sizes of LFM2.5-8B-A1B.
    #[test]
    fn moe_8b() {
        let cost = ModelCost::new(&lfm2_5_8b(), DType::Bf16, DType::Bf16);
        assert_eq!(cost.parameters, 8_467_856_832);
        // Every parameter takes two bytes but the 22 × 32 selection biases, which take four.
        assert_eq!(cost.weight_bytes, 2 * 8_467_856_832 + 2 * 22 * 32);
        assert_eq!((cost.kv_bytes_per_token, cost.conv_bytes_per_slot), (12_288, 147_456));
        assert_eq!(cost.decode_weight_bytes(1) as u64, 2 * 1_685_667_264 + 2 * 22 * 32);
        assert_eq!(cost.distinct_experts(1), 4.0);
        assert!((cost.distinct_experts(8) - 32.0 * (1.0 - 0.875f64.powi(8))).abs() < 1e-9);
        assert!(cost.decode_weight_bytes(100_000) <= cost.weight_bytes as f64 + 1.0);
        assert_eq!(lfm2_5_8b().conv_replay_tokens(), 36);
        // Of the 1.69 B parameters of a token, 0.26 B are the head's.
        assert_eq!(cost.parameters_per_token + cost.head_parameters, 1_685_667_264);
        assert_eq!((cost.head_parameters, cost.attention_width), (128_000 * 2048, 6 * 2048));
        let one = cost.prefill_flops(1, 8192);
        assert_eq!(
            one,
            2.0 * 1_423_523_264.0 * 8192.0 + 2.0 * 262_144_000.0 + 2.0 * 12_288.0 * 8192.0 * 8192.0
        );
        assert_eq!(cost.prefill_flops(16, 8192), 16.0 * one);
    }

    /// The published sizes of LFM2.5-350M.
    #[test]
    fn dense_350m() {
        let types: Vec<&str> = (0..16)
            .map(|i| {
                if [2, 5, 8, 10, 12, 14].contains(&i) {
                    "full_attention"
                } else {
                    "conv"
                }
            })
            .collect();
        let config = Lfm2Config::dense(&json!({
            "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8,
            "vocab_size": 65536, "max_position_embeddings": 128000, "block_ff_dim": 6656, "layer_types": types
        }))
        .unwrap();
        let cost = ModelCost::new(&config, DType::Bf16, DType::Bf16);
        assert_eq!(cost.parameters, 354_483_968);
        assert_eq!((cost.kv_bytes_per_token, cost.conv_bytes_per_slot), (12_288, 40_960));
        assert_eq!(cost.decode_weight_bytes(64) as u64, cost.weight_bytes);
    }
}
