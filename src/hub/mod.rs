//! Checkpoints from the Hugging Face hub, in its standard cache layout.
