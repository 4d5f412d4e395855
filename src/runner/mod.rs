//! Steps become device arrays, and logits become tokens.
