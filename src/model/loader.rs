//! Puts a model's parameters on a backend, one layer after the other.

use std::borrow::Cow;
use std::collections::HashMap;

use super::LoadError;
use super::lfm2::params::{Param, ParamKind};
use crate::backend::{Backend, DType, HostTensor};

/// A parameter's bytes, row-major.
pub struct SourceTensor<'a> {
    pub dtype: DType,
    pub data: Cow<'a, [u8]>,
}

/// Where parameters come from.
pub trait TensorSource {
    /// The bytes of `param`, which is one of the parameters that the source was made or checked for.
    fn tensor(&self, param: &Param) -> Result<SourceTensor<'_>, LoadError>;
}

/// Receives (bytes loaded, bytes in all), in units of the source's or the model's storage type.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Hands parameters from a source to a backend by name, converted to the model's type.
pub struct Loader<'a, B: Backend> {
    backend: &'a mut B,
    source: &'a dyn TensorSource,
    params: HashMap<&'a str, &'a Param>,
    dtype: DType,
    progress: Progress<'a>,
    done_bytes: u64,
    total_bytes: u64,
}

impl<'a, B: Backend> Loader<'a, B> {
    pub fn new(
        backend: &'a mut B,
        source: &'a dyn TensorSource,
        params: &'a [Param],
        dtype: DType,
        progress: Progress<'a>,
    ) -> Self {
        let total_bytes = params.iter().map(|param| stored_bytes(param, dtype)).sum();
        let params = params.iter().map(|param| (param.name.as_str(), param)).collect();
        Self {
            backend,
            source,
            params,
            dtype,
            progress,
            done_bytes: 0,
            total_bytes,
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.params.contains_key(name)
    }

    /// One parameter as it is; the middle dimension of conv taps (1) is dropped.
    pub fn weight(&mut self, name: &str) -> Result<B::Weight, LoadError> {
        let param = self.param(name)?;
        let tensor = self.source.tensor(param)?;
        let dtype = if param.kind == ParamKind::ExpertBias {
            DType::F32
        } else {
            self.dtype
        };
        let shape: &[usize] = &match (param.kind, param.shape.as_slice()) {
            (ParamKind::Taps, [h, 1, taps]) => vec![*h, *taps],
            _ => param.shape.clone(),
        };
        let weight = self.backend.weight(
            HostTensor {
                dtype: tensor.dtype,
                shape,
                data: &tensor.data,
            },
            dtype,
        )?;
        self.advance(&[param]);
        Ok(weight)
    }

    /// A parameter that the model may lack.
    pub fn optional(&mut self, name: &str) -> Result<Option<B::Weight>, LoadError> {
        if self.has(name) {
            self.weight(name).map(Some)
        } else {
            Ok(None)
        }
    }

    /// Matrices of one input width, stacked over their output rows.
    pub fn rows(&mut self, names: &[String]) -> Result<B::Weight, LoadError> {
        let params = names
            .iter()
            .map(|name| self.param(name))
            .collect::<Result<Vec<_>, _>>()?;
        let tensors = params
            .iter()
            .map(|param| self.source.tensor(param))
            .collect::<Result<Vec<_>, _>>()?;
        let parts: Vec<HostTensor> = params
            .iter()
            .zip(&tensors)
            .map(|(param, tensor)| host(param, tensor))
            .collect();
        let weight = self.backend.weight_rows(&parts, self.dtype)?;
        self.advance(&params);
        Ok(weight)
    }

    /// The matrices of every expert, stacked over rows inside an expert: `names[e]` lists those of expert e.
    pub fn experts(&mut self, names: &[Vec<String>]) -> Result<B::Weight, LoadError> {
        let mut params = Vec::new();
        for name in names.iter().flatten() {
            params.push(self.param(name)?);
        }
        let tensors = params
            .iter()
            .map(|param| self.source.tensor(param))
            .collect::<Result<Vec<_>, _>>()?;
        let mut flat = params.iter().zip(&tensors).map(|(param, tensor)| host(param, tensor));
        let parts: Vec<Vec<HostTensor>> = names
            .iter()
            .map(|list| flat.by_ref().take(list.len()).collect())
            .collect();
        let weight = self.backend.weight_experts(&parts, self.dtype)?;
        self.advance(&params);
        Ok(weight)
    }

    /// Experts that the checkpoint stores as one tensor `[E, rows, cols]`.
    pub fn stacked_experts(&mut self, name: &str) -> Result<B::Weight, LoadError> {
        let param = self.param(name)?;
        let [_, shape @ ..] = param.shape.as_slice() else {
            return Err(LoadError::Tensors(format!("{name} is not a stack of matrices")));
        };
        let tensor = self.source.tensor(param)?;
        let expert_bytes = shape.iter().product::<usize>() * tensor.dtype.size_bytes();
        let part = |data| {
            vec![HostTensor {
                dtype: tensor.dtype,
                shape,
                data,
            }]
        };
        let parts: Vec<Vec<HostTensor>> = tensor.data.chunks_exact(expert_bytes).map(part).collect();
        let weight = self.backend.weight_experts(&parts, self.dtype)?;
        self.advance(&[param]);
        Ok(weight)
    }

    fn param(&self, name: &str) -> Result<&'a Param, LoadError> {
        self.params
            .get(name)
            .copied()
            .ok_or_else(|| LoadError::Tensors(format!("{name} is no parameter of the model")))
    }

    fn advance(&mut self, params: &[&Param]) {
        self.done_bytes += params.iter().map(|param| stored_bytes(param, self.dtype)).sum::<u64>();
        (self.progress)(self.done_bytes, self.total_bytes);
    }
}

fn host<'t>(param: &'t Param, tensor: &'t SourceTensor<'_>) -> HostTensor<'t> {
    HostTensor {
        dtype: tensor.dtype,
        shape: &param.shape,
        data: &tensor.data,
    }
}

/// Bytes of a parameter on the device when the model's type is `dtype`.
pub fn stored_bytes(param: &Param, dtype: DType) -> u64 {
    let dtype = if param.kind == ParamKind::ExpertBias {
        DType::F32
    } else {
        dtype
    };
    (param.elements() * dtype.size_bytes()) as u64
}
