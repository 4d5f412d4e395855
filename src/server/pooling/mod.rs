//! `--runner pooling`: prompts become vectors. What the endpoints of the family share: running prompts, and the length of
//! what comes back.

pub mod cohere;
pub mod embeddings;
mod encode;
mod input;
pub mod score;
pub mod types;

use std::sync::Arc;

use axum::http::HeaderMap;
use futures_util::future::try_join_all;

use crate::config::{Dimensions, PoolingConfig};
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::ids;
use crate::server::openai::chat_completions::validate::check_media_kwargs;
use crate::server::openai::validate::check_cache_salt;
use crate::step::TokenId;
use crate::text::PoolRequest;

/// Most inputs of one request.
const MAX_INPUTS: usize = 2048;

/// What is the same for all inputs of a request.
struct Request {
    /// Of the response, with its prefix.
    id: String,
    model: String,
    /// Seconds since 1970.
    created: u64,
    priority: i64,
    cache_salt: Option<String>,
}

impl Request {
    fn new(
        app: &App,
        headers: &HeaderMap,
        prefix: &str,
        model: Option<&str>,
        fields: &types::SharedFields,
    ) -> Result<Self, ApiError> {
        if let Some(salt) = &fields.cache_salt {
            check_cache_salt(salt)?;
        }
        check_media_kwargs(fields.mm_processor_kwargs.as_ref(), None)?;
        Ok(Self {
            id: format!("{prefix}{}", ids::of_request(headers, fields.request_id.as_deref())),
            model: app.model_name(model)?.to_owned(),
            created: ids::unix_seconds(),
            priority: fields.priority.unwrap_or(0),
            cache_salt: fields.cache_salt.clone(),
        })
    }
}

/// The server's pooling, which exists wherever these routes do.
///
/// # Errors
/// 501: the model generates.
fn config(app: &App) -> Result<&PoolingConfig, ApiError> {
    let missing = || ApiError::not_implemented("The model does not support pooling");
    app.model.pooling.as_ref().ok_or_else(missing)
}

/// Runs the prompts side by side; one vector `[H]` each, in order.
///
/// # Errors
/// A prompt does not fit the model, or the engine refuses; nothing runs then.
async fn vectors(app: &App, request: &Request, prompts: &[Arc<[TokenId]>]) -> Result<Vec<Vec<f32>>, ApiError> {
    let pooling = config(app)?.pooling;
    if prompts.len() > MAX_INPUTS {
        return Err(ApiError::invalid(
            "input",
            format!("at most {MAX_INPUTS} inputs are allowed"),
        ));
    }
    let mut running = Vec::with_capacity(prompts.len());
    for (i, prompt) in prompts.iter().enumerate() {
        running.push(app.text().pool(PoolRequest {
            id: format!("{}-{i}", request.id),
            prompt: prompt.clone(),
            pooling,
            priority: request.priority,
            cache_salt: request.cache_salt.clone(),
        })?);
    }
    Ok(try_join_all(running.into_iter().map(|prompt| prompt.vector())).await?)
}

/// The vector's first `dimensions` values, then, if it is to be, its length 1.
fn finished(mut vector: Vec<f32>, dimensions: Option<usize>, normalize: bool) -> Vec<f32> {
    if let Some(dimensions) = dimensions {
        vector.truncate(dimensions);
    }
    if normalize {
        let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
        // A vector of zeros stays one, as torch's normalize leaves it.
        let scale = 1.0 / length.max(1e-12);
        vector.iter_mut().for_each(|value| *value *= scale);
    }
    vector
}

/// # Errors
/// 400: the model was not trained for vectors of this size.
fn check_dimensions(app: &App, field: &str, asked: Option<i64>) -> Result<Option<usize>, ApiError> {
    let Some(asked) = asked else { return Ok(None) };
    let model = app.model.served_names.first().map_or("", String::as_str);
    let refused = |message: String| Err(ApiError::invalid_value(field, message, asked));
    let Some(size) = usize::try_from(asked).ok().filter(|size| *size > 0) else {
        return refused("Dimensions must be greater than 0".to_owned());
    };
    match &config(app)?.dimensions {
        Dimensions::Full => refused(format!(
            "Model \"{model}\" does not support matryoshka representation, changing output dimensions will lead to poor \
             results."
        )),
        Dimensions::Listed(sizes) if !sizes.contains(&size) => refused(format!(
            "Model \"{model}\" only supports {sizes:?} matryoshka dimensions, use other output dimensions will lead to \
             poor results."
        )),
        Dimensions::Listed(_) | Dimensions::Any => Ok(Some(size)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_cut_and_then_normalised() {
        assert_eq!(finished(vec![3.0, 4.0, 9.0], Some(2), true), [0.6, 0.8]);
        assert_eq!(finished(vec![3.0, 4.0], None, false), [3.0, 4.0]);
        assert_eq!(finished(vec![0.0, 0.0], None, true), [0.0, 0.0]);
    }
}
