//! For tests: the golden checkpoints, and checkpoints made from them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The checkpoints with goldens.
pub const MODELS: [&str; 2] = ["tiny-dense", "tiny-moe"];
/// The prompts of each golden.
pub const PROMPTS: [&str; 4] = ["p1", "p7", "p130", "p513"];

/// A tensor in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

pub type Tensors = BTreeMap<String, Tensor>;

impl Tensor {
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => self
                .data
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            Dtype::BF16 => self
                .data
                .chunks_exact(2)
                .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            Dtype::F16 => self
                .data
                .chunks_exact(2)
                .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            other => panic!("{other:?} is not a float type"),
        }
    }

    pub fn cast(&self, dtype: Dtype) -> Self {
        let values = self.to_f32();
        let data = match dtype {
            Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            other => panic!("{other:?} is not a float type"),
        };
        Self {
            dtype,
            shape: self.shape.clone(),
            data,
        }
    }

    /// Tensors of equal type behind one another, as one of this shape.
    pub fn concat(parts: &[&Tensor], shape: &[usize]) -> Self {
        let data = parts.iter().flat_map(|part| part.data.iter().copied()).collect();
        Self {
            dtype: parts[0].dtype,
            shape: shape.to_vec(),
            data,
        }
    }
}

pub fn golden_dir(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("compat-tests/goldens")
        .join(model)
}

pub fn checkpoint_dir(model: &str) -> PathBuf {
    golden_dir(model).join("checkpoint")
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub fn hf_config(model: &str) -> Value {
    read_json(&checkpoint_dir(model).join("config.json"))
}

pub fn read_tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let own = |view: TensorView| Tensor {
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        data: view.data().to_vec(),
    };
    tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, own(view)))
        .collect()
}

pub fn checkpoint_tensors(model: &str) -> Tensors {
    read_tensors(&checkpoint_dir(model).join("model.safetensors"))
}

pub fn golden_tensors(model: &str) -> Tensors {
    read_tensors(&golden_dir(model).join("golden.safetensors"))
}

pub fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, tensor)| {
        (
            name,
            TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data).unwrap(),
        )
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// golden.json.
pub struct Golden(pub Value);

impl Golden {
    pub fn read(model: &str) -> Self {
        Self(read_json(&golden_dir(model).join("golden.json")))
    }

    pub fn prompt(&self, prompt: &str) -> Vec<u32> {
        ids(&self.0["prompts"][prompt])
    }

    /// The 64 tokens that follow the prompt in fp32.
    pub fn greedy(&self, prompt: &str) -> Vec<u32> {
        ids(&self.0["per_prompt"][prompt]["fp32"]["greedy"])
    }

    pub fn fp32(&self, prompt: &str, field: &str) -> Vec<f32> {
        let list = self.0["per_prompt"][prompt]["fp32"][field].as_array().unwrap();
        list.iter().map(|x| x.as_f64().unwrap() as f32).collect()
    }
}

pub fn ids(list: &Value) -> Vec<u32> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // NaN anywhere must fail a comparison with a tolerance.
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, |max, d| if d <= max { max } else { d })
}

pub fn argmax(values: &[f32]) -> u32 {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best }) as u32
}
