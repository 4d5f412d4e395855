//! Every Prometheus series, by vLLM's name, in one list.
