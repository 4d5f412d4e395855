//! `rvllm bench latency|throughput`: the engine in process, with the floor computed from bytes beside each figure.
