//! rvllm: a drop-in replacement for `vllm serve` over its own paged-attention engine.
//!
//! > The **cli** is resolved into a **config**; the **server** speaks HTTP for the **chat**, which turns messages
//! > into **text**, which turns text into tokens for the **engine**, which plans **steps** for the **runner**, which
//! > runs the **model** on a **backend** made of **kernels**.
//!
//! The modules below stand in that order; imports point to the right, never back. A test (`tests` at the end of this
//! file) reads every `crate::` path and fails on one that points upwards.
//!
//! | layer | modules | may import |
//! |---|---|---|
//! | 8 | main, serve, bench | everything (wiring only) |
//! | 7 | cli | config |
//! | 6 | server | chat, text, engine (handle and errors) |
//! | 5 | chat | text, parsers, grammar, media |
//! | 4 | text | engine |
//! | 3 | engine | step, grammar |
//! | 2 | runner | step, model, backend |
//! | 1 | model | backend |
//! | 0 | backend | step (its data) |
//! | 0 | step, parsers, grammar, media, hub | none of ours |
//! | beside | config (data; each part receives its own part), metrics (names) | |

pub mod serve;

pub mod bench;
pub mod cli;
pub mod config;
pub mod server;

pub mod chat;
pub mod text;

pub mod engine;
pub mod runner;

pub mod model;

pub mod backend;
pub mod hub;
pub mod metrics;
pub mod parsers;
pub mod step;
