//! Steps become device arrays, and logits become tokens.
//!
//! [`build_executor`] loads a model and sizes its memory; the [`ModelRunner`] it returns checks each plan, lays it out
//! ([`batch`]), runs the model and samples.

pub mod batch;
pub mod build;
pub mod memory;
pub mod model_runner;

pub use build::{ExecutorOptions, build_executor, plan_memory};
pub use memory::MemoryPlan;
pub use model_runner::ModelRunner;

#[cfg(test)]
mod tests;
