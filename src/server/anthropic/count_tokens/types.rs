//! The wire types of `/v1/messages/count_tokens`; its request is [`PromptFields`](super::super::messages::types::PromptFields).

use serde::Serialize;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CountTokensResponse {
    pub input_tokens: usize,
    pub context_management: ContextManagement,
}

/// Nothing is cut here before it is counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ContextManagement {
    pub original_input_tokens: usize,
}
