//! `POST /v1/completions`.

pub mod types;
