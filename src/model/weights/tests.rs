//! Checkpoints that do not fit, and files that are no checkpoints.

use serde_json::{Value, json};

use super::*;
use crate::model::lfm2::params::params;
use crate::model::registry::read_config;
use crate::model::testing::*;

fn open(dir: &Path) -> Result<Checkpoint, LoadError> {
    Checkpoint::open(&ModelFiles::Directory(dir.to_owned()), "model.")
}

/// Opens and checks a checkpoint of these tensors against tiny-dense's configuration.
fn check(tensors: &Tensors, config: &Value) -> Result<(), LoadError> {
    let dir = tempfile::tempdir().unwrap();
    write_tensors(&dir.path().join(SINGLE_FILE), tensors);
    open(dir.path())?.check(&params(&read_config(config)?, |_| false))
}

/// What opening a file of these bytes says.
fn file_error(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(SINGLE_FILE), bytes).unwrap();
    open(dir.path()).expect_err("must be refused").to_string()
}

fn file(header: &Value, data_len: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_len, 0);
    bytes
}

fn tensor(dtype: &str, shape: &[u64], start: u64, end: u64) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})
}

#[test]
fn lengths_that_lie() {
    let whole = std::fs::read(checkpoint_dir("tiny-dense").join(SINGLE_FILE)).unwrap();
    let with_length = |length: u64| [&length.to_le_bytes(), &whole[8..]].concat();
    for length in [1 << 63, u64::MAX, whole.len() as u64] {
        let error = file_error(&with_length(length));
        assert!(
            error.contains(&format!("claims a header of {length} bytes")) && error.contains(SINGLE_FILE),
            "{error}"
        );
    }
    assert!(file_error(&with_length(10)).contains("malformed header"));
    assert!(file_error(&[]).contains("0 bytes, too few"));
    assert!(file_error(&whole[..7]).contains("7 bytes, too few"));
    assert!(file_error(&whole[..100]).contains("claims a header"));
    let error = file_error(&whole[..whole.len() - 1]);
    assert!(
        error.contains("truncated") && error.contains("model.layers."),
        "{error}"
    );
    assert!(file_error(&[&whole[..], b"x"].concat()).contains("to no tensor"));
}

#[test]
fn offsets_that_lie() {
    let cases = [
        (
            "places b over another tensor",
            json!({"a": tensor("F32", &[2], 0, 8), "b": tensor("F32", &[2], 4, 12)}),
            12,
        ),
        (
            "before b, to no tensor",
            json!({"a": tensor("F32", &[2], 0, 8), "b": tensor("F32", &[1], 12, 16)}),
            16,
        ),
        ("places a at bytes 8 to 0", json!({"a": tensor("F32", &[2], 8, 0)}), 8),
        (
            "gives a 8 bytes, which do not fit F32 [3]",
            json!({"a": tensor("F32", &[3], 0, 8)}),
            8,
        ),
        (
            "gives a 8 bytes",
            json!({"a": tensor("F32", &[u64::MAX, u64::MAX], 0, 8)}),
            8,
        ),
        (
            "places a at bytes 0 to 18446744073709551615",
            json!({"a": tensor("U8", &[u64::MAX], 0, u64::MAX)}),
            8,
        ),
        ("malformed header", json!({"a": tensor("F31", &[2], 0, 8)}), 8),
        (
            "malformed header",
            json!({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}),
            8,
        ),
        ("malformed header", json!([1, 2]), 0),
    ];
    for (message, header, data_len) in cases {
        let error = file_error(&file(&header, data_len));
        assert!(error.contains(message), "{message}: {error}");
    }
}

/// Tensors whose sizes add up to more than an address space must neither wrap around nor overflow.
#[test]
fn sums_that_overflow() {
    let quarter = 1u64 << 62;
    let header: serde_json::Map<String, Value> = (0..4)
        .map(|i| {
            (
                format!("t{i}"),
                tensor("U8", &[quarter], i * quarter, (i + 1).wrapping_mul(quarter)),
            )
        })
        .collect();
    assert!(file_error(&file(&Value::Object(header), 8)).contains("safetensors: "));
}

#[test]
fn deep_json_is_an_error() {
    let mut bytes = 20_000u64.to_le_bytes().to_vec();
    bytes.extend_from_slice("[".repeat(20_000).as_bytes());
    assert!(file_error(&bytes).contains("malformed header"));
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let (config, whole) = (hf_config("tiny-dense"), checkpoint_tensors("tiny-dense"));
    check(&whole, &config).unwrap();

    let mut tensors = whole.clone();
    let moved = tensors.remove("model.layers.2.self_attn.k_proj.weight").unwrap();
    tensors.insert("model.layers.2.self_attn.k_proj.weights".into(), moved);
    tensors.get_mut("model.layers.0.operator_norm.weight").unwrap().shape = vec![1, 128];
    let bias = tensors.get_mut("model.layers.1.ffn_norm.weight").unwrap();
    bias.dtype = Dtype::I16;
    let error = check(&tensors, &config).unwrap_err().to_string();
    for problem in [
        "model.layers.2.self_attn.k_proj.weight is missing",
        "model.layers.2.self_attn.k_proj.weights is unexpected",
        "model.layers.0.operator_norm.weight has shape [1, 128], config.json asks for [128]",
        "model.layers.1.ffn_norm.weight is I16",
    ] {
        assert!(error.contains(problem), "{problem}: {error}");
    }

    // The adjusted feed-forward width that the configuration implies, and the file's.
    let mut wide = config.clone();
    wide["block_ff_dim"] = json!(384);
    let error = check(&whole, &wide).unwrap_err().to_string();
    assert!(
        error.contains("w1.weight has shape [192, 128], config.json asks for [256, 128]"),
        "{error}"
    );
    assert!(
        error.contains("and 14 more"),
        "8 layers of 3 misshapen matrices, 10 listed: {error}"
    );

    let error = check(&Tensors::new(), &config).unwrap_err().to_string();
    assert!(error.len() < 1000 && error.contains("more"), "{error}");

    // A tied head in the file is a copy; an untied one must be there.
    let mut untied = config;
    untied["tie_embedding"] = json!(false);
    assert!(
        check(&whole, &untied)
            .unwrap_err()
            .to_string()
            .contains("lm_head.weight is missing")
    );
}

#[test]
fn indices_that_lie() {
    let dir = tempfile::tempdir().unwrap();
    let error = open(dir.path()).unwrap_err().to_string();
    assert!(error.contains(SINGLE_FILE), "{error}");
    let index = |map: Value| {
        std::fs::write(dir.path().join(INDEX_FILE), json!({"weight_map": map}).to_string()).unwrap();
        open(dir.path()).expect_err("must be refused").to_string()
    };
    for outside in ["../secret", "/etc/passwd", "a/b", "", ".."] {
        assert!(
            index(json!({"a": outside})).contains("is not a file of the checkpoint"),
            "{outside}"
        );
    }
    assert!(index(json!({"a": "absent.safetensors"})).contains("absent.safetensors"));
    assert!(index(json!({"a": 3})).contains(INDEX_FILE));
    std::fs::write(
        dir.path().join("x.safetensors"),
        file(&json!({"b": tensor("F32", &[1], 0, 4)}), 4),
    )
    .unwrap();
    assert!(index(json!({"a": "x.safetensors"})).contains("places a in x.safetensors, which does not hold it"));
    std::fs::copy(dir.path().join("x.safetensors"), dir.path().join("y.safetensors")).unwrap();
    assert!(index(json!({"b": "x.safetensors", "c": "y.safetensors"})).contains("which an earlier file holds too"));
}

#[test]
fn embedded_files_are_read() {
    let bytes: &'static [u8] = include_bytes!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/compat-tests/goldens/tiny-dense/checkpoint/model.safetensors"
    ));
    let files: &'static [(&'static str, &'static [u8])] = vec![(SINGLE_FILE, bytes)].leak();
    let checkpoint = Checkpoint::open(&ModelFiles::Embedded(files), "model.").unwrap();
    let params = params(&read_config(&hf_config("tiny-dense")).unwrap(), |_| false);
    checkpoint.check(&params).unwrap();
    assert_eq!(
        checkpoint.data_bytes(),
        params.iter().map(|param| 2 * param.elements() as u64).sum::<u64>()
    );
    let got = checkpoint.tensor(&params[0]).unwrap();
    assert_eq!(
        got.data,
        checkpoint_tensors("tiny-dense")["model.embed_tokens.weight"].data
    );
    assert!(
        Checkpoint::open(&ModelFiles::Embedded(&[]), "model.")
            .unwrap_err()
            .to_string()
            .contains(SINGLE_FILE)
    );
}

mod any_bytes {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// No header, however broken, makes the reader panic or accept tensors outside the file.
        #[test]
        fn never_panic(
            starts in prop::collection::vec((any::<u64>(), any::<u64>(), 0u64..40), 0..4),
            small in prop::collection::vec((0u64..20, 0u64..20, 0u64..6), 0..4),
            data_len in 0usize..24,
        ) {
            let entries = starts.into_iter().chain(small).enumerate();
            let header: serde_json::Map<String, Value> =
                entries.map(|(i, (start, end, n))| (format!("t{i}"), tensor("F32", &[n], start, end))).collect();
            let bytes = file(&Value::Object(header), data_len);
            if let Ok((tensors, data_start)) = read_header("x", &bytes) {
                for (_, info) in tensors {
                    prop_assert!(data_start + info.data_offsets.1 <= bytes.len());
                }
            }
        }

        #[test]
        fn never_panic_on_noise(mut noise in prop::collection::vec(any::<u8>(), 0..200), length in 0u64..220) {
            if noise.len() >= 8 {
                noise[..8].copy_from_slice(&length.to_le_bytes());
            }
            let _ = read_header("x", &noise);
        }
    }
}
