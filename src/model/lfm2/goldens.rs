//! The decoder against what Hugging Face computed, and the forms a checkpoint may take.

use std::collections::HashSet;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

use super::config::Lfm2Config;
use super::params::params;
use super::text::{Cache, LayerState, Lfm2Text};
use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, BatchLayout, DType};
use crate::config::ModelFiles;
use crate::model::LoadError;
use crate::model::layers::{Workspace, WorkspaceShape};
use crate::model::loader::Loader;
use crate::model::registry::read_config;
use crate::model::testing::*;
use crate::model::weights::Checkpoint;

const BLOCK_SIZE: usize = 16;
const MAX_TOKENS: usize = 520;

struct Loaded {
    backend: CpuBackend,
    config: Lfm2Config,
    model: Lfm2Text<CpuBackend>,
}

/// What one prefill yields; rows of `[n, cols]` lie behind one another.
struct Prefill {
    /// After the embedding and after each layer.
    hidden: Vec<Vec<f32>>,
    final_norm: Vec<f32>,
    logits: Vec<f32>,
    cache: Cache<CpuBackend>,
}

fn load(dir: &Path, hf_config: &Value, dtype: DType) -> Result<Loaded, LoadError> {
    let config = read_config(hf_config)?;
    let checkpoint = Checkpoint::open(&ModelFiles::Directory(dir.to_owned()), "model.")?;
    let params = params(&config, |layer| checkpoint.has_fused_experts(layer));
    checkpoint.check(&params)?;
    let mut backend = CpuBackend::new(2, dtype);
    let mut seen = Vec::new();
    let mut progress = |done, total| seen.push((done, total));
    let model = Lfm2Text::load(
        &mut Loader::new(&mut backend, &checkpoint, &params, dtype, &mut progress),
        &config,
    )?;
    assert!(
        seen.is_sorted() && seen.last().is_some_and(|(done, total)| done == total),
        "{seen:?}"
    );
    Ok(Loaded { backend, config, model })
}

fn load_golden(model: &str, dtype: DType) -> Loaded {
    load(&checkpoint_dir(model), &hf_config(model), dtype).unwrap()
}

impl Loaded {
    /// One row from an empty cache; logits of every token.
    fn prefill(&mut self, ids: &[u32]) -> Prefill {
        let Self { backend, config, model } = self;
        let (n, blocks) = (ids.len(), ids.len().div_ceil(BLOCK_SIZE));
        let dtype = backend.activation_dtype();
        let shape = WorkspaceShape::new(config, MAX_TOKENS, MAX_TOKENS);
        let mut ws = Workspace::new(backend, config, &shape).unwrap();
        let mut cache = Cache::new(backend, config, blocks, BLOCK_SIZE, dtype, 1).unwrap();
        let mut batch = backend.batch(MAX_TOKENS, 1, blocks).unwrap();
        let mut logits = backend.tensor(MAX_TOKENS, config.vocab_size, DType::F32).unwrap();
        let layout = BatchLayout {
            token_ids: ids.to_vec(),
            positions: (0..n as u32).collect(),
            slot_mapping: (0..n as i64).collect(),
            row_starts: vec![0, n as u32],
            context_lens: vec![n as u32],
            block_tables: (0..blocks as u32).collect(),
            max_blocks: blocks,
            slots: vec![0],
            reset_conv: vec![true],
            feedback: vec![false],
            logit_tokens: (0..n as u32).collect(),
        };
        backend.set_batch(&mut batch, &layout).unwrap();
        let mut hidden = Vec::new();
        model
            .forward_observed(backend, &batch, n, &mut ws, &mut cache, |backend, x| {
                let mut values = Vec::new();
                backend.read(x, n, &mut values)?;
                hidden.push(values);
                Ok(())
            })
            .unwrap();
        model.logits(backend, &batch, n, &mut ws, &mut logits).unwrap();
        let mut read = |x| {
            let mut values = Vec::new();
            backend.read(x, n, &mut values).unwrap();
            values
        };
        Prefill {
            hidden,
            final_norm: read(&ws.normed),
            logits: read(&logits),
            cache,
        }
    }

    fn logits(&mut self, ids: &[u32]) -> Vec<f32> {
        self.prefill(ids).logits
    }
}

#[test]
fn fp32_logits_and_hidden_states() {
    for name in MODELS {
        let (golden, tensors) = (Golden::read(name), golden_tensors(name));
        let mut loaded = load_golden(name, DType::F32);
        for prompt in PROMPTS {
            let run = loaded.prefill(&golden.prompt(prompt));
            let want = tensors[&format!("fp32.logits_last.{prompt}")].to_f32();
            let last = &run.logits[run.logits.len() - want.len()..];
            assert!(
                max_difference(last, &want) <= 1e-3,
                "{name} {prompt}: {}",
                max_difference(last, &want)
            );
            let picks: Vec<u32> = run.logits.chunks(want.len()).map(argmax).collect();
            assert_eq!(
                picks,
                ids(&golden.0["per_prompt"][prompt]["fp32"]["argmax"]),
                "{name} {prompt}"
            );
        }
        let run = loaded.prefill(&golden.prompt("p7"));
        assert!(max_difference(&run.logits, &tensors["fp32.logits_all.p7"].to_f32()) <= 1e-3);
        assert!(max_difference(&run.final_norm, &tensors["fp32.final_norm.p7"].to_f32()) <= 1e-3);
        let hidden = tensors["fp32.hidden.p7"].to_f32();
        let per_layer = hidden.len() / run.hidden.len();
        for (i, (got, want)) in run.hidden.iter().zip(hidden.chunks(per_layer)).enumerate() {
            assert!(
                max_difference(got, want) <= 1e-3,
                "{name}: after {i} layers {}",
                max_difference(got, want)
            );
        }
    }
}

#[test]
fn fp32_cache_contents() {
    for name in MODELS {
        let (golden, tensors) = (Golden::read(name), golden_tensors(name));
        let mut loaded = load_golden(name, DType::F32);
        for prompt in PROMPTS {
            let tokens = golden.prompt(prompt).len();
            let run = loaded.prefill(&golden.prompt(prompt));
            let mut compared = 0;
            for (i, state) in run.cache.0.iter().enumerate() {
                let want = |what: &str| tensors.get(&format!("fp32.cache.{prompt}.layers.{i}.{what}"));
                match state {
                    // `[H, L - 1]` there, `[L - 1, H]` here.
                    LayerState::Conv(state) => {
                        let want = want("conv_state").expect("each prompt has its conv states");
                        let history = want.shape[1];
                        let want = want.to_f32();
                        let turned: Vec<f32> = (0..history)
                            .flat_map(|k| want.iter().skip(k).step_by(history).copied())
                            .collect();
                        let far = max_difference(state.slot(0), &turned);
                        assert!(far <= 1e-3, "{name} {prompt} layer {i}: {far}");
                        compared += 1;
                    }
                    // `[Nk, T, D]`, kept for the shortest prompts only.
                    LayerState::Kv(kv) => {
                        let (Some(k), Some(v)) = (want("k"), want("v")) else {
                            continue;
                        };
                        let (heads, width) = (k.shape[0], k.shape[2]);
                        let (k, v) = (k.to_f32(), v.to_f32());
                        for (at, (k, v)) in k.chunks(width).zip(v.chunks(width)).enumerate() {
                            let (head, token) = (at / tokens, at % tokens);
                            let (our_k, our_v) = kv.token(token / BLOCK_SIZE, token % BLOCK_SIZE, head);
                            let far = max_difference(&our_k, k).max(max_difference(&our_v, v));
                            assert!(
                                far <= 1e-3,
                                "{name} {prompt} layer {i} head {head} token {token}: {far}"
                            );
                        }
                        assert_eq!(k.len(), heads * tokens * width);
                        compared += 1;
                    }
                }
            }
            assert!(compared >= 4, "{name} {prompt}: {compared} layers compared");
        }
        assert!(
            tensors.contains_key("fp32.cache.p7.layers.2.k"),
            "attention's cache is among the goldens"
        );
    }
}

#[test]
fn bf16_is_as_near_to_fp32_as_hugging_face() {
    let rms =
        |a: &[f32], b: &[f32]| (a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f32>() / a.len() as f32).sqrt();
    for name in MODELS {
        let (golden, tensors) = (Golden::read(name), golden_tensors(name));
        let mut loaded = load_golden(name, DType::Bf16);
        for prompt in PROMPTS {
            let exact = tensors[&format!("fp32.logits_last.{prompt}")].to_f32();
            let theirs = rms(&tensors[&format!("bf16.logits_last.{prompt}")].to_f32(), &exact);

            // Teacher-forced: the prompt and the fp32 continuation in one prefill.
            let (ids, greedy) = (golden.prompt(prompt), golden.greedy(prompt));
            let forced: Vec<u32> = ids.iter().chain(&greedy).copied().take(MAX_TOKENS).collect();
            let logits = loaded.logits(&forced);
            let rows: Vec<&[f32]> = logits.chunks(exact.len()).skip(ids.len() - 1).collect();
            let ours = rms(rows[0], &exact);
            assert!(ours <= 1.3 * theirs, "{name} {prompt}: rms {ours} against {theirs}");
            for (i, margin) in golden
                .fp32(prompt, "greedy_margins")
                .into_iter()
                .enumerate()
                .take(rows.len())
            {
                if margin >= 0.7 {
                    assert_eq!(argmax(rows[i]), greedy[i], "{name} {prompt} token {i}, margin {margin}");
                }
            }
        }
    }
}

/// The golden's experts in the two stacked tensors that transformers holds in memory.
fn fuse_experts(tensors: &mut Tensors, config: &Value) {
    let size = |field: &str| config[field].as_u64().unwrap() as usize;
    let (experts, ffn, hidden) = (size("num_experts"), size("moe_intermediate_size"), size("hidden_size"));
    for layer in size("num_dense_layers")..size("num_hidden_layers") {
        let prefix = format!("model.layers.{layer}.feed_forward.experts.");
        let mut take = |e: usize, name: &str| tensors.remove(&format!("{prefix}{e}.{name}.weight")).unwrap();
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for e in 0..experts {
            gate_up.extend([take(e, "w1"), take(e, "w3")]);
            down.push(take(e, "w2"));
        }
        let stack = |parts: &[Tensor], shape: &[usize]| Tensor::concat(&parts.iter().collect::<Vec<_>>(), shape);
        tensors.insert(
            format!("{prefix}gate_up_proj"),
            stack(&gate_up, &[experts, 2 * ffn, hidden]),
        );
        tensors.insert(format!("{prefix}down_proj"), stack(&down, &[experts, hidden, ffn]));
    }
}

/// Loads a checkpoint of one file.
fn load_tensors(tensors: &Tensors, config: &Value, dtype: DType) -> Result<Loaded, LoadError> {
    let dir = tempfile::tempdir().unwrap();
    write_tensors(&dir.path().join("model.safetensors"), tensors);
    load(dir.path(), config, dtype)
}

#[test]
fn fused_experts_are_the_same_model() {
    let config = hf_config("tiny-moe");
    let mut tensors = checkpoint_tensors("tiny-moe");
    fuse_experts(&mut tensors, &config);
    assert!(!tensors.keys().any(|name| name.contains("experts.0.")));
    let ids = Golden::read("tiny-moe").prompt("p130");
    for dtype in [DType::F32, DType::Bf16] {
        let fused = load_tensors(&tensors, &config, dtype).unwrap().logits(&ids);
        assert_eq!(fused, load_golden("tiny-moe", dtype).logits(&ids), "{dtype}");
    }
}

#[test]
fn shards_are_the_same_model() {
    let tensors = checkpoint_tensors("tiny-moe");
    let dir = tempfile::tempdir().unwrap();
    let mut map = serde_json::Map::new();
    let names: Vec<&String> = tensors.keys().collect();
    for (i, part) in names.chunks(names.len().div_ceil(3)).enumerate() {
        let file = format!("model-{:05}-of-00003.safetensors", i + 1);
        let shard: Tensors = part.iter().map(|&name| (name.clone(), tensors[name].clone())).collect();
        write_tensors(&dir.path().join(&file), &shard);
        map.extend(part.iter().map(|&name| (name.clone(), json!(file))));
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let ids = Golden::read("tiny-moe").prompt("p7");
    let sharded = load(dir.path(), &hf_config("tiny-moe"), DType::F32)
        .unwrap()
        .logits(&ids);
    assert_eq!(sharded, load_golden("tiny-moe", DType::F32).logits(&ids));
}

#[test]
fn wider_files_are_the_same_model() {
    for name in MODELS {
        let ids = Golden::read(name).prompt("p7");
        let want = load_golden(name, DType::F32).logits(&ids);
        let (config, tensors) = (hf_config(name), checkpoint_tensors(name));
        let wide: Tensors = tensors
            .iter()
            .map(|(name, t)| (name.clone(), t.cast(Dtype::F32)))
            .collect();
        assert_eq!(load_tensors(&wide, &config, DType::F32).unwrap().logits(&ids), want);
        // A mix of all three types: f16 holds these bf16 values but for the smallest.
        let kinds = [Dtype::F32, Dtype::F16, Dtype::BF16];
        let mixed = tensors
            .iter()
            .enumerate()
            .map(|(i, (name, t))| (name.clone(), t.cast(kinds[i % 3])))
            .collect();
        let got = load_tensors(&mixed, &config, DType::F32).unwrap().logits(&ids);
        assert!(
            max_difference(&got, &want) <= 1e-3,
            "{name}: {}",
            max_difference(&got, &want)
        );
    }
}

#[test]
fn an_untied_head_is_used() {
    let ids = Golden::read("tiny-dense").prompt("p7");
    let tied = load_golden("tiny-dense", DType::F32).logits(&ids);
    let mut config = hf_config("tiny-dense");
    let mut tensors = checkpoint_tensors("tiny-dense");
    let embedding = tensors["model.embed_tokens.weight"].clone();

    // A tied checkpoint that repeats the embedding is read, the copy ignored.
    tensors.insert("lm_head.weight".into(), embedding.clone());
    assert_eq!(load_tensors(&tensors, &config, DType::F32).unwrap().logits(&ids), tied);

    // Untied, with the rows in reverse order.
    let rows: Vec<&[u8]> = embedding.data.chunks(embedding.shape[1] * 2).rev().collect();
    let head = Tensor {
        data: rows.concat(),
        ..embedding
    };
    tensors.insert("lm_head.weight".into(), head);
    config["tie_embedding"] = json!(false);
    let untied = load_tensors(&tensors, &config, DType::F32).unwrap().logits(&ids);
    let vocab = config["vocab_size"].as_u64().unwrap() as usize;
    for (tied, untied) in tied.chunks(vocab).zip(untied.chunks(vocab)) {
        assert!(max_difference(&tied.iter().rev().copied().collect::<Vec<_>>(), untied) <= 1e-4);
    }
}

#[test]
fn new_names_are_the_same_model() {
    let mut config = hf_config("tiny-dense");
    let object = config.as_object_mut().unwrap();
    let legacy: Vec<String> = object
        .keys()
        .filter(|key| key.starts_with("block_") || key.starts_with("conv_dim"))
        .cloned()
        .collect();
    for key in legacy
        .iter()
        .map(String::as_str)
        .chain(["rope_theta", "tie_embedding", "num_heads"])
    {
        object.remove(key);
    }
    object.insert("intermediate_size".into(), json!(192));
    object.insert("block_auto_adjust_ff_dim".into(), json!(false));
    object.insert(
        "rope_parameters".into(),
        json!({"rope_theta": 1e6, "rope_type": "default"}),
    );
    object.insert("tie_word_embeddings".into(), json!(true));
    let ids = Golden::read("tiny-dense").prompt("p7");
    let renamed = load(&checkpoint_dir("tiny-dense"), &config, DType::F32)
        .unwrap()
        .logits(&ids);
    assert_eq!(renamed, load_golden("tiny-dense", DType::F32).logits(&ids));
}

#[test]
fn conv_biases_are_added() {
    let mut config = hf_config("tiny-dense");
    config["conv_bias"] = json!(true);
    let ids = Golden::read("tiny-dense").prompt("p7");
    let plain = load_golden("tiny-dense", DType::F32).logits(&ids);
    let with_bias = |value: f32| {
        let mut tensors = checkpoint_tensors("tiny-dense");
        let hidden = 128;
        for layer in [0, 1, 3, 5, 7] {
            for (name, width) in [("in_proj", 3 * hidden), ("conv", hidden), ("out_proj", hidden)] {
                let data = value.to_le_bytes().repeat(width);
                let bias = Tensor {
                    dtype: Dtype::F32,
                    shape: vec![width],
                    data,
                };
                tensors.insert(format!("model.layers.{layer}.conv.{name}.bias"), bias);
            }
        }
        load_tensors(&tensors, &config, DType::F32).unwrap().logits(&ids)
    };
    assert_eq!(with_bias(0.0), plain);
    assert!(max_difference(&with_bias(0.5), &plain) > 0.1);
}

#[test]
fn nan_weights_load_and_show() {
    let mut tensors = checkpoint_tensors("tiny-dense");
    let norm = tensors.get_mut("model.embedding_norm.weight").unwrap();
    *norm = norm.cast(Dtype::F32);
    norm.data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let logits = load_tensors(&tensors, &hf_config("tiny-dense"), DType::F32)
        .unwrap()
        .logits(&[1]);
    assert!(logits.iter().all(|x| x.is_nan()));
}

#[test]
fn names_are_unique() {
    for name in MODELS {
        for fused in [false, true] {
            let list = params(&read_config(&hf_config(name)).unwrap(), |_| fused);
            let names: HashSet<&str> = list.iter().map(|param| param.name.as_str()).collect();
            assert_eq!(names.len(), list.len());
        }
    }
}
