//! The LFM2 family: dense and mixture-of-experts decoders of attention and short-convolution layers.

pub mod config;
pub mod params;
pub mod text;

#[cfg(test)]
mod goldens;
