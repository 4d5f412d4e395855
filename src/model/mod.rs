//! Checkpoints become models, written once against `backend::Backend`.
//!
//! [`registry`] turns a `config.json` into a typed configuration, [`weights`] or [`dummy`] provides its parameters,
//! [`loader`] puts them on a backend as the [`layers`] of a decoder, and [`lfm2`] runs it.

pub mod cost;
pub mod dummy;
pub mod layers;
pub mod lfm2;
pub mod loader;
pub mod registry;
pub mod weights;

#[cfg(test)]
pub mod testing;

use crate::backend::BackendError;

/// A model cannot be loaded. The message names the file, the field or the tensor at fault.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// `architectures` of config.json is not one of ours.
    #[error("{0}")]
    Architecture(String),
    #[error("config.json: {field}: {message}")]
    Config { field: String, message: String },
    /// A checkpoint file is absent, unreadable or malformed.
    #[error("{file}: {message}")]
    File { file: String, message: String },
    /// The checkpoint's tensors are not those the configuration asks for.
    #[error("the checkpoint does not fit its config.json: {0}")]
    Tensors(String),
    /// Weights, workspace and cache do not fit the device.
    #[error("{0}")]
    Memory(String),
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl LoadError {
    fn config(field: impl Into<String>, message: impl Into<String>) -> Self {
        LoadError::Config {
            field: field.into(),
            message: message.into(),
        }
    }

    fn file(file: impl Into<String>, message: impl Into<String>) -> Self {
        LoadError::File {
            file: file.into(),
            message: message.into(),
        }
    }
}
