//! Anthropic's Messages API, as vLLM serves it: the request becomes a chat request, the chat's events become messages.
//!
//! Differs from vLLM: thinking blocks of earlier turns also reach the template as `thinking`, the name that LFM2 templates
//! read; a stream of an empty answer has the one empty text block that the whole answer has.

pub mod count_tokens;
pub mod messages;
