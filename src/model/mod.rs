//! Checkpoints become models, written once against `backend::Backend`.
