//! `POST /v1/embeddings` and `POST /pooling`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::encode::{Encoding, Format};
use super::types::{EmbeddingData, EmbeddingRequest, EmbeddingResponse, prompt_usage};
use super::{Request, check_dimensions, config, finished, input, vectors};
use crate::server::App;
use crate::server::body::JsonBody;
use crate::server::error::ApiError;

pub async fn embeddings(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(request): JsonBody<EmbeddingRequest>,
) -> Result<Response, ApiError> {
    let dimensions = check_dimensions(&app, "dimensions", request.dimensions)?;
    answer(&app, &headers, &request, dimensions, Kind::Embedding).await
}

pub async fn pooling(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(request): JsonBody<EmbeddingRequest>,
) -> Result<Response, ApiError> {
    if let Some(dimensions) = request.dimensions {
        return Err(ApiError::invalid_value(
            "dimensions",
            "dimensions is currently not supported",
            dimensions,
        ));
    }
    match request.task.as_ref().map(|task| task.0.as_str()) {
        None | Some("embed") => answer(&app, &headers, &request, None, Kind::Pooling).await,
        Some(task) => Err(ApiError::invalid_value(
            "task",
            "Unsupported task. Supported tasks: ('embed',)",
            task,
        )),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Embedding,
    Pooling,
}

async fn answer(
    app: &Arc<App>,
    headers: &HeaderMap,
    body: &EmbeddingRequest,
    dimensions: Option<usize>,
    kind: Kind,
) -> Result<Response, ApiError> {
    let prefix = match kind {
        Kind::Embedding => "embd-",
        Kind::Pooling => "pooling-",
    };
    let request = Request::new(app, headers, prefix, body.model.as_deref(), &body.shared)?;
    let encoding = Encoding::new(
        body.encoding_format.as_ref(),
        body.embed_dtype.as_ref(),
        body.endianness.as_ref(),
    )?;
    let normalize = body.shared.use_activation.unwrap_or(config(app)?.normalize);
    let prompts = input::prompts(app, body).await?;
    let prompt_tokens = prompts.iter().map(|prompt| prompt.len()).sum();
    let vectors: Vec<Vec<f32>> = vectors(app, &request, &prompts)
        .await?
        .into_iter()
        .map(|vector| finished(vector, dimensions, normalize))
        .collect();
    if matches!(encoding.format, Format::Bytes | Format::BytesOnly) {
        return Ok(raw(&request, &encoding, &vectors, prompt_tokens));
    }
    let data = vectors.iter().enumerate().map(|(index, vector)| {
        let encoded = Some(encoding.json(vector));
        let (object, embedding, data) = match kind {
            Kind::Embedding => ("embedding", encoded, None),
            Kind::Pooling => ("pooling", None, encoded),
        };
        EmbeddingData {
            index,
            object,
            embedding,
            data,
        }
    });
    let data = data.collect();
    Ok(Json(EmbeddingResponse {
        id: request.id,
        object: "list",
        created: request.created,
        model: request.model,
        data,
        usage: prompt_usage(prompt_tokens),
    })
    .into_response())
}

/// All vectors one after the other; the header `metadata` tells where each lies.
fn raw(request: &Request, encoding: &Encoding, vectors: &[Vec<f32>], prompt_tokens: usize) -> Response {
    let mut bytes = Vec::new();
    let mut items = Vec::new();
    for (index, vector) in vectors.iter().enumerate() {
        let start = bytes.len();
        bytes.extend(encoding.bytes(vector));
        items.push(json!({
            "index": index,
            "embed_dtype": encoding.element.name(),
            "endianness": if encoding.big_endian { "big" } else { "little" },
            "start": start,
            "end": bytes.len(),
            "shape": [vector.len()],
        }));
    }
    let mut response = bytes.into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    if encoding.format == Format::Bytes {
        let metadata: Value = json!({
            "id": request.id,
            "created": request.created,
            "model": request.model,
            "data": items,
            "usage": { "prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens },
        });
        // An id of the client's may have characters that no header can carry.
        if let Ok(metadata) = HeaderValue::from_str(&metadata.to_string()) {
            headers.insert("metadata", metadata);
        }
    }
    response
}
