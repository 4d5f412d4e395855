//! Safetensors checkpoints: one file, shards with an index, or bytes embedded in the program.
//!
//! Files are mapped, so that a tensor's bytes are read when a backend copies them. A file that another process truncates
//! while it is mapped raises SIGBUS; checkpoints must not be edited while they load.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Component, Path};

use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;

use super::LoadError;
use super::lfm2::params::{HEAD, Param};
use super::loader::{SourceTensor, TensorSource};
use crate::backend::DType;
use crate::config::ModelFiles;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Bytes of the little-endian header length that opens a file.
const LENGTH_BYTES: usize = 8;
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Problems that one error message lists.
const MAX_LISTED: usize = 10;

enum Bytes {
    Mapped(Mmap),
    Embedded(&'static [u8]),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Embedded(bytes) => bytes,
        }
    }
}

struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bytes in the shard.
    range: Range<usize>,
}

/// An opened checkpoint: every header read and checked, no tensor read.
pub struct Checkpoint {
    shards: Vec<Bytes>,
    /// By full name, prefix included.
    entries: HashMap<String, Entry>,
    prefix: &'static str,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Checkpoint({} tensors in {} files)",
            self.entries.len(),
            self.shards.len()
        )
    }
}

impl Checkpoint {
    /// Opens a checkpoint whose decoder tensors start with `prefix` (`model.`).
    ///
    /// # Errors
    /// A file that is absent or malformed; the message names the file and, where there is one, the tensor.
    pub fn open(files: &ModelFiles, prefix: &'static str) -> Result<Self, LoadError> {
        let mut checkpoint = Self {
            shards: Vec::new(),
            entries: HashMap::new(),
            prefix,
        };
        let index = read_index(files)?;
        let shards = match &index {
            None => vec![SINGLE_FILE.to_owned()],
            Some(index) => index.values().cloned().collect::<BTreeSet<_>>().into_iter().collect(),
        };
        for shard in &shards {
            checkpoint.add_shard(shard, open_shard(files, shard)?)?;
        }
        if let Some(index) = index {
            for (name, shard) in &index {
                let found = checkpoint.entries.get(name).map(|entry| &shards[entry.shard]);
                if found != Some(shard) {
                    return Err(LoadError::file(
                        INDEX_FILE,
                        format!("places {name} in {shard}, which does not hold it"),
                    ));
                }
            }
        }
        Ok(checkpoint)
    }

    fn add_shard(&mut self, file: &str, bytes: Bytes) -> Result<(), LoadError> {
        let (tensors, data_start) = read_header(file, bytes.as_slice())?;
        for (name, info) in tensors {
            let (start, end) = info.data_offsets;
            let range = data_start + start..data_start + end;
            let entry = Entry {
                shard: self.shards.len(),
                dtype: info.dtype,
                shape: info.shape,
                range,
            };
            if self.entries.insert(name.clone(), entry).is_some() {
                return Err(LoadError::file(
                    file,
                    format!("holds {name}, which an earlier file holds too"),
                ));
            }
        }
        self.shards.push(bytes);
        Ok(())
    }

    /// Whether layer i's experts stand in stacked tensors.
    pub fn has_fused_experts(&self, layer: usize) -> bool {
        self.entries.contains_key(&format!(
            "{}layers.{layer}.feed_forward.experts.gate_up_proj",
            self.prefix
        ))
    }

    /// Bytes of all tensors.
    pub fn data_bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.range.len() as u64).sum()
    }

    /// Checks that the checkpoint holds exactly `params`, each with its shape and a type we read.
    ///
    /// A tied model's `lm_head.weight` is a copy of the embedding and ignored, as Hugging Face does.
    ///
    /// # Errors
    /// Lists up to ten tensors that are missing, unexpected or misshapen.
    pub fn check(&self, params: &[Param]) -> Result<(), LoadError> {
        let mut problems = Vec::new();
        let mut expected = HashSet::new();
        for param in params {
            let name = self.full_name(&param.name);
            match self.entries.get(&name) {
                None => problems.push(format!("{name} is missing")),
                Some(entry) if entry.shape != param.shape => problems.push(format!(
                    "{name} has shape {:?}, config.json asks for {:?}",
                    entry.shape, param.shape
                )),
                Some(entry) if float_type(entry.dtype).is_none() => {
                    problems.push(format!("{name} is {:?}; BF16, F16 and F32 are supported", entry.dtype));
                }
                Some(_) => {}
            }
            expected.insert(name);
        }
        let head_is_copy = !expected.contains(HEAD);
        let mut extra: Vec<&String> = self.entries.keys().filter(|name| !expected.contains(*name)).collect();
        extra.retain(|name| !(head_is_copy && *name == HEAD));
        extra.sort();
        problems.extend(extra.into_iter().map(|name| format!("{name} is unexpected")));
        if problems.is_empty() {
            return Ok(());
        }
        let more = problems.len().saturating_sub(MAX_LISTED);
        problems.truncate(MAX_LISTED);
        let mut message = problems.join("; ");
        if more > 0 {
            message.push_str(&format!("; and {more} more"));
        }
        Err(LoadError::Tensors(message))
    }

    fn full_name(&self, name: &str) -> String {
        if name == HEAD {
            name.to_owned()
        } else {
            format!("{}{name}", self.prefix)
        }
    }
}

impl TensorSource for Checkpoint {
    fn tensor(&self, param: &Param) -> Result<SourceTensor<'_>, LoadError> {
        let name = self.full_name(&param.name);
        let found = self
            .entries
            .get(&name)
            .and_then(|entry| Some((entry, float_type(entry.dtype)?)));
        let Some((entry, dtype)) = found else {
            return Err(LoadError::Tensors(format!("{name} is missing")));
        };
        let data = &self.shards[entry.shard].as_slice()[entry.range.clone()];
        Ok(SourceTensor {
            dtype,
            data: Cow::Borrowed(data),
        })
    }
}

fn float_type(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::BF16 => Some(DType::Bf16),
        Dtype::F16 => Some(DType::F16),
        Dtype::F32 => Some(DType::F32),
        _ => None,
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Tensor → shard, if the checkpoint is sharded. A single file wins over an index, as in transformers.
fn read_index(files: &ModelFiles) -> Result<Option<BTreeMap<String, String>>, LoadError> {
    let text = match files {
        ModelFiles::Embedded(list) => {
            let find = |wanted: &str| {
                list.iter()
                    .find(|(name, _)| *name == wanted)
                    .map(|(_, bytes)| bytes.to_vec())
            };
            if find(SINGLE_FILE).is_some() {
                None
            } else {
                find(INDEX_FILE)
            }
        }
        ModelFiles::Directory(dir) if dir.join(SINGLE_FILE).exists() => None,
        ModelFiles::Directory(dir) => match std::fs::read(dir.join(INDEX_FILE)) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                return Err(LoadError::file(
                    dir.join(INDEX_FILE).display().to_string(),
                    error.to_string(),
                ));
            }
        },
    };
    let Some(text) = text else { return Ok(None) };
    let index: Index = serde_json::from_slice(&text).map_err(|error| LoadError::file(INDEX_FILE, error.to_string()))?;
    for shard in index.weight_map.values() {
        let mut parts = Path::new(shard).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(LoadError::file(
                INDEX_FILE,
                format!("{shard:?} is not a file of the checkpoint"),
            ));
        }
    }
    Ok(Some(index.weight_map))
}

fn open_shard(files: &ModelFiles, shard: &str) -> Result<Bytes, LoadError> {
    match files {
        ModelFiles::Embedded(list) => match list.iter().find(|(name, _)| *name == shard) {
            Some((_, bytes)) => Ok(Bytes::Embedded(bytes)),
            None => Err(LoadError::file(shard, "is not among the embedded files")),
        },
        ModelFiles::Directory(dir) => {
            let path = dir.join(shard);
            let fail = |error: std::io::Error| LoadError::file(path.display().to_string(), error.to_string());
            let file = File::open(&path).map_err(fail)?;
            // SAFETY: the map is read only; see the module's note on files that change while they load.
            let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
            Ok(Bytes::Mapped(map))
        }
    }
}

#[derive(Deserialize)]
struct Header {
    /// Present so that it is not taken for a tensor.
    #[serde(rename = "__metadata__")]
    _metadata: Option<serde_json::Value>,
    #[serde(flatten)]
    tensors: HashMap<String, TensorInfo>,
}

/// Tensors of a file, and where their data starts.
///
/// Checks the length, that every tensor's bytes are what its shape and type need, and that the tensors cover the data
/// without holes or overlaps.
fn read_header(file: &str, bytes: &[u8]) -> Result<(Vec<(String, TensorInfo)>, usize), LoadError> {
    let fail = |message: String| LoadError::file(file, message);
    let Some(length) = bytes.first_chunk::<LENGTH_BYTES>() else {
        return Err(fail(format!(
            "has {} bytes, too few for a safetensors file",
            bytes.len()
        )));
    };
    let length = u64::from_le_bytes(*length);
    let available = (bytes.len() - LENGTH_BYTES) as u64;
    if length > MAX_HEADER_BYTES.min(available) {
        return Err(fail(format!(
            "claims a header of {length} bytes; {available} bytes follow"
        )));
    }
    let data_start = LENGTH_BYTES + length as usize;
    let header: Header = serde_json::from_slice(&bytes[LENGTH_BYTES..data_start])
        .map_err(|error| fail(format!("has a malformed header: {error}")))?;
    let data_len = bytes.len() - data_start;

    let mut tensors: Vec<(String, TensorInfo)> = header.tensors.into_iter().collect();
    tensors.sort_by(|(a_name, a), (b_name, b)| (a.data_offsets, a_name).cmp(&(b.data_offsets, b_name)));
    let mut covered = 0;
    for (name, info) in &tensors {
        let (start, end) = info.data_offsets;
        if start > end || end > data_len {
            return Err(fail(format!(
                "places {name} at bytes {start} to {end} of {data_len}: truncated or malformed"
            )));
        }
        if start < covered {
            return Err(fail(format!(
                "places {name} over another tensor, at byte {start} of the data"
            )));
        }
        if start > covered {
            return Err(fail(format!(
                "leaves bytes {covered} to {start}, before {name}, to no tensor"
            )));
        }
        let bits = info
            .shape
            .iter()
            .try_fold(info.dtype.bitsize(), |product, &n| product.checked_mul(n));
        if bits != (end - start).checked_mul(8) {
            let (dtype, shape) = (info.dtype, &info.shape);
            return Err(fail(format!(
                "gives {name} {} bytes, which do not fit {dtype:?} {shape:?}",
                end - start
            )));
        }
        covered = end;
    }
    if covered != data_len {
        return Err(fail(format!(
            "leaves bytes {covered} to {data_len} of the data to no tensor"
        )));
    }
    Ok((tensors, data_start))
}

#[cfg(test)]
mod tests;
