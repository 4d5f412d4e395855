//! `POST /score` and `POST /rerank`: the cosine of the vectors of two texts.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use serde_json::Value;

use super::types::{
    RerankDocument, RerankRequest, RerankResponse, RerankResult, RerankUsage, ScoreData, ScoreRequest, ScoreResponse,
    SharedFields, prompt_usage,
};
use super::{Request, input, vectors};
use crate::server::App;
use crate::server::body::JsonBody;
use crate::server::error::ApiError;
use crate::server::fields;
use crate::server::openai::completions::types::Prompt;
use crate::step::TokenId;
use crate::text::Truncation;

pub async fn score(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<ScoreRequest>,
) -> Result<Json<ScoreResponse>, ApiError> {
    let named = [
        (("queries", &body.queries), ("documents", &body.documents)),
        (("queries", &body.queries), ("items", &body.items)),
        (("data_1", &body.data_1), ("data_2", &body.data_2)),
        (("text_1", &body.text_1), ("text_2", &body.text_2)),
    ];
    let pair = named
        .into_iter()
        .find_map(|((a, first), (b, second))| Some(((a, first.as_ref()?), (b, second.as_ref()?))));
    let Some(((a, first), (b, second))) = pair else {
        return Err(ApiError::missing("queries"));
    };
    let request = Request::new(&app, &headers, "score-", body.model.as_deref(), &body.shared)?;
    check_instruction(body.instruction.as_deref())?;
    let limits = (body.max_tokens_per_query, body.max_tokens_per_doc);
    let pairs = Pairs::new(texts(a, first)?, texts(b, second)?)?;
    let scored = pairs.score(&app, &request, &body.shared, limits).await?;
    let usage = prompt_usage(scored.iter().map(|pair| pair.tokens).sum());
    let data = scored.into_iter().enumerate().map(|(index, pair)| ScoreData {
        index,
        object: "score",
        score: f64::from(pair.score),
    });
    Ok(Json(ScoreResponse {
        data: data.collect(),
        id: request.id,
        object: "list",
        created: request.created,
        model: request.model,
        usage,
    }))
}

pub async fn rerank(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<RerankRequest>,
) -> Result<Json<RerankResponse>, ApiError> {
    let query = body.query.as_ref().ok_or_else(|| ApiError::missing("query"))?;
    let documents = body.documents.as_ref().ok_or_else(|| ApiError::missing("documents"))?;
    if query.is_array() {
        return Err(ApiError::invalid("query", "the query must be one text"));
    }
    let top_n = usize::try_from(body.top_n.unwrap_or(0))
        .map_err(|_| ApiError::invalid("top_n", "top_n must not be negative"))?;
    let request = Request::new(&app, &headers, "score-", body.model.as_deref(), &body.shared)?;
    check_instruction(body.instruction.as_deref())?;
    let limits = (body.max_tokens_per_query, body.max_tokens_per_doc);
    let documents = texts("documents", documents)?;
    let pairs = Pairs::new(texts("query", query)?, documents.clone())?;
    let scored = pairs.score(&app, &request, &body.shared, limits).await?;
    let tokens = scored.iter().map(|pair| pair.tokens).sum();
    let mut results: Vec<RerankResult> = documents
        .into_iter()
        .zip(scored)
        .enumerate()
        .map(|(index, (text, pair))| RerankResult {
            index,
            document: RerankDocument {
                text,
                multi_modal: None,
            },
            relevance_score: f64::from(pair.score),
        })
        .collect();
    results.sort_by(|a, b| b.relevance_score.total_cmp(&a.relevance_score));
    if top_n > 0 {
        results.truncate(top_n);
    }
    Ok(Json(RerankResponse {
        id: request.id,
        model: request.model,
        usage: RerankUsage {
            prompt_tokens: tokens,
            total_tokens: tokens,
        },
        results,
    }))
}

/// # Errors
/// 400: nothing says where in a prompt it would stand.
fn check_instruction(instruction: Option<&str>) -> Result<(), ApiError> {
    match instruction {
        None | Some("") => Ok(()),
        Some(_) => Err(fields::refused("instruction")),
    }
}

/// A text or a list of texts.
fn texts(field: &str, value: &Value) -> Result<Vec<String>, ApiError> {
    let text = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Object(_) => Err(ApiError::invalid(field, "the model is not a multimodal model")),
        _ => Err(ApiError::invalid(field, "a text or a list of texts is needed")),
    };
    match value {
        Value::Array(items) => items.iter().map(text).collect(),
        one => Ok(vec![text(one)?]),
    }
}

struct Pairs {
    first: Vec<String>,
    second: Vec<String>,
}

struct ScoredPair {
    score: f32,
    tokens: usize,
}

impl Pairs {
    /// One with each, or each with its own.
    fn new(first: Vec<String>, second: Vec<String>) -> Result<Self, ApiError> {
        if first.is_empty() || second.is_empty() {
            return Err(ApiError::bad_request("At least one text element must be given"));
        }
        if first.len() != 1 && first.len() != second.len() {
            return Err(ApiError::bad_request("Input lengths must be either 1:1, 1:N or N:N"));
        }
        Ok(Self { first, second })
    }

    async fn score(
        self,
        app: &Arc<App>,
        request: &Request,
        fields: &SharedFields,
        (per_query, per_document): (Option<i64>, Option<i64>),
    ) -> Result<Vec<ScoredPair>, ApiError> {
        let whole = input::truncation(app, fields)?;
        let num_queries = self.first.len();
        let limits = [
            text_limit(app, "max_tokens_per_query", per_query)?,
            text_limit(app, "max_tokens_per_doc", per_document)?,
        ];
        let all: Vec<Prompt> = self.first.into_iter().chain(self.second).map(Prompt::Text).collect();
        let prompts: Vec<Arc<[TokenId]>> = input::texts_and_ids(app, all, true, true)
            .await?
            .into_iter()
            .enumerate()
            .map(|(i, mut ids)| {
                let own = limits[usize::from(i >= num_queries)];
                for cut in [own, whole].into_iter().flatten() {
                    cut.apply(&mut ids);
                }
                ids.into()
            })
            .collect();
        let vectors = vectors(app, request, &prompts).await?;
        let (queries, documents) = vectors.split_at(num_queries);
        let separator = usize::from(app.tokenizer().special_names().contains_key("pad_token"));
        let pairs = documents.iter().enumerate().map(|(i, document)| {
            let query = if num_queries == 1 { 0 } else { i };
            ScoredPair {
                score: cosine(&queries[query], document),
                tokens: prompts[query].len() + separator + prompts[num_queries + i].len(),
            }
        });
        Ok(pairs.collect())
    }
}

/// 0 = no limit.
fn text_limit(app: &App, field: &str, asked: Option<i64>) -> Result<Option<Truncation>, ApiError> {
    let Some(asked) = asked.filter(|asked| *asked != 0) else {
        return Ok(None);
    };
    let context = app.model.max_model_len;
    match usize::try_from(asked) {
        Ok(max_tokens) if max_tokens < context => Ok(Some(Truncation {
            max_tokens,
            keep_end: false,
        })),
        _ => Err(ApiError::invalid_value(
            field,
            format!("{field} must not be negative and less than max_model_len ({context})"),
            asked,
        )),
    }
}

/// 0 where a vector is zero, as torch's.
fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
    dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt()).max(1e-8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosines_do_not_depend_on_lengths() {
        assert!((cosine(&[1.0, 0.0], &[3.0, 3.0]) - 0.5f32.sqrt()).abs() < 1e-6);
        assert_eq!(cosine(&[1.0, 0.0], &[-2.0, 0.0]), -1.0);
        assert_eq!(cosine(&[0.0], &[1.0]), 0.0);
    }

    #[test]
    fn pairs_are_one_to_many_or_each_to_its_own() {
        let texts = |n: usize| vec!["a".to_owned(); n];
        for (first, second, fits) in [(1, 1, true), (1, 3, true), (3, 3, true), (2, 3, false), (0, 1, false)] {
            assert_eq!(
                Pairs::new(texts(first), texts(second)).is_ok(),
                fits,
                "{first}:{second}"
            );
        }
    }
}
