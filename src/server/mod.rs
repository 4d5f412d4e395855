//! HTTP in, JSON or SSE out.
