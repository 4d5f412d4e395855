//! Flags exactly as vLLM spells them: a table of every flag, one typed struct per group of `vllm serve --help`.
