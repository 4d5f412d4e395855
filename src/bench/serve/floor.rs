//! The least time that a token can take: the bytes of a decode step over the bandwidth that was measured on the server's device.

use serde_json::{Value, json};

use super::metrics::Metrics;
use crate::cli::{self, Invocation};
use crate::config::args::Machine;
use crate::config::environment::Environment;
use crate::config::resolve;
use crate::model::cost::ModelCost;
use crate::model::registry::read_config;

/// The floor of a run, or why there is none.
#[derive(Clone, Debug)]
pub enum Floor {
    Known {
        /// Of one token of each sequence, at the run's mean number of sequences and mean context.
        tpot_ms: f64,
        /// Of the run's median.
        share_of_tpot: f64,
        output_per_s: f64,
        bytes_per_step: f64,
        bandwidth: f64,
    },
    Unknown(String),
}

impl Floor {
    /// `model` is a directory, a hub id or `demo`; its dtype is taken to be the one that `rvllm serve` chooses.
    pub fn new(model: &str, bandwidth: f64, metrics: &Metrics) -> Self {
        match cost(model) {
            Err(error) => Self::Unknown(format!("{error:#}")),
            Ok(_) if metrics.completed == 0 => Self::Unknown("no request succeeded".to_owned()),
            Ok(cost) => {
                let sequences = metrics.mean_concurrent.round().max(1.0);
                let bytes = cost.decode_step_bytes(sequences as usize, metrics.mean_context as usize);
                let step_s = bytes / bandwidth;
                Self::Known {
                    tpot_ms: step_s * 1e3,
                    share_of_tpot: match metrics.median_tpot_ms > 0.0 {
                        true => step_s * 1e3 / metrics.median_tpot_ms,
                        false => 0.0,
                    },
                    output_per_s: sequences / step_s,
                    bytes_per_step: bytes,
                    bandwidth,
                }
            }
        }
    }

    pub fn to_json(&self) -> Value {
        match self {
            Self::Unknown(reason) => json!({"unknown": reason}),
            Self::Known {
                tpot_ms,
                share_of_tpot,
                output_per_s,
                bytes_per_step,
                bandwidth,
            } => json!({
                "tpot_ms": tpot_ms,
                "share_of_median_tpot": share_of_tpot,
                "output_throughput": output_per_s,
                "bytes_per_step": bytes_per_step,
                "read_bandwidth_bytes_per_s": bandwidth,
            }),
        }
    }
}

/// The model's bytes, from its config.json.
fn cost(model: &str) -> anyhow::Result<ModelCost> {
    let argv = ["serve", model, "--dry-run"].map(str::to_owned);
    let Invocation::Serve(args) = cli::parse(&argv)? else {
        anyhow::bail!("'{model}' is no model")
    };
    let config = resolve::resolve(&args, &Environment::of_process(), &Machine::probe(Vec::new()))?;
    let kv_dtype = config.cache.kv_dtype.unwrap_or(config.model.dtype);
    Ok(ModelCost::new(
        &read_config(&config.model.hf_config)?,
        config.model.dtype,
        kv_dtype,
    ))
}
