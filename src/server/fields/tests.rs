use std::collections::BTreeSet;

use super::*;
use crate::config::document;
use crate::server::anthropic::messages::types::{MessagesRequest, PromptFields};
use crate::server::field::Fields;
use crate::server::openai::chat_completions::types::ChatCompletionRequest;
use crate::server::openai::completions::types::CompletionRequest;
use crate::server::openai::responses::types::ResponsesRequest;
use crate::server::openai::tokenize::types::{DetokenizeRequest, TokenizeRequest};
use crate::server::pooling::types::{CohereEmbedRequest, EmbeddingRequest, RerankRequest, ScoreRequest};
use crate::server::scale_out::types::GenerateBody;
use crate::server::vllm::generative_scoring::GenerativeScoringRequest;

/// The fields that vLLM 0.33 reads, by request type.
const VLLM: &str = include_str!("vllm.json");

/// The fields that are read here, by vLLM's name of the type. One type may stand for several of vLLM's.
fn declared() -> Vec<(&'static [&'static str], Map<String, Value>)> {
    vec![
        (&["ChatCompletionRequest"], ChatCompletionRequest::properties()),
        (&["CompletionRequest"], CompletionRequest::properties()),
        (
            &["TokenizeCompletionRequest", "TokenizeChatRequest"],
            TokenizeRequest::properties(),
        ),
        (&["DetokenizeRequest"], DetokenizeRequest::properties()),
        (&["AnthropicMessagesRequest"], MessagesRequest::properties()),
        (&["AnthropicCountTokensRequest"], PromptFields::properties()),
        (&["ResponsesRequest"], ResponsesRequest::properties()),
        (
            &[
                "EmbeddingCompletionRequest",
                "EmbeddingChatRequest",
                "PoolingCompletionRequest",
                "PoolingChatRequest",
            ],
            EmbeddingRequest::properties(),
        ),
        (
            &[
                "ScoreQueriesDocumentsRequest",
                "ScoreQueriesItemsRequest",
                "ScoreDataRequest",
                "ScoreTextRequest",
            ],
            ScoreRequest::properties(),
        ),
        (&["RerankRequest"], RerankRequest::properties()),
        (&["CohereEmbedRequest"], CohereEmbedRequest::properties()),
        (&["GenerateRequest"], GenerateBody::properties()),
        (&["GenerativeScoringRequest"], GenerativeScoringRequest::properties()),
    ]
}

fn names(request: &RequestFields) -> BTreeSet<String> {
    let rows = TABLE.rows(request);
    let names: BTreeSet<String> = rows.iter().map(|row| row.name.clone()).collect();
    assert_eq!(names.len(), rows.len(), "{}: a field has two rows", request.name);
    names
}

#[test]
fn every_field_of_vllm_has_a_row() {
    let vllm: Map<String, Value> = serde_json::from_str(VLLM).unwrap();
    for request in &TABLE.requests {
        let known: BTreeSet<String> = serde_json::from_value(vllm[&request.name].clone()).unwrap();
        assert_eq!(names(request), known, "{}", request.name);
    }
}

/// A field with a row that no request type declares would be skipped in silence.
#[test]
fn every_row_is_a_field_that_is_read() {
    let declared = declared();
    for (types, fields) in &declared {
        let rows: BTreeSet<String> = TABLE
            .requests
            .iter()
            .filter(|request| types.contains(&request.name.as_str()))
            .flat_map(names)
            .collect();
        let fields: BTreeSet<String> = fields.keys().cloned().collect();
        assert_eq!(rows, fields, "{types:?}");
    }
    let listed: usize = declared.iter().map(|(types, _)| types.len()).sum();
    assert_eq!(listed, TABLE.requests.len());
}

#[test]
fn rows_that_differ_say_why() {
    for request in &TABLE.requests {
        for row in TABLE.rows(request) {
            assert!(
                row.here == Verdict::Same || !row.text.is_empty(),
                "{}.{}",
                request.name,
                row.name
            );
        }
    }
}

#[test]
fn a_refusal_names_the_field_and_says_why() {
    let error = refused("watermarking");
    assert_eq!(
        (error.status.as_u16(), error.param.as_deref()),
        (400, Some("watermarking"))
    );
    assert!(error.message.contains("there is no watermark"), "{}", error.message);
}

#[test]
fn the_document_is_up_to_date() {
    document::assert_current(BEGIN, END, &markdown());
}

#[test]
#[ignore = "writes docs/compatibility.md"]
fn write_the_document() {
    document::write(BEGIN, END, &markdown());
}
