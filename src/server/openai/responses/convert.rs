//! A Responses request becomes a chat request and the frame of its answer.

use serde_json::Value;

use super::items::Conversation;
use super::output::{OutputItem, Response, Status};
use super::tools::{Tools, convert_tools};
use super::types::ResponsesRequest;
use super::validate::{Options, includes_logprobs};
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::openai::chat_completions::convert::Conversion;
use crate::server::openai::chat_completions::types::ChatCompletionRequest;
use crate::server::openai::types::SamplingFields;

/// What a stored response leaves to the one that names it.
pub struct Previous {
    pub messages: Vec<Value>,
    pub output: Vec<OutputItem>,
}

/// The conversation to answer, without the instructions: those are each request's own.
///
/// # Errors
/// 400 that names the item.
pub fn conversation(request: &mut ResponsesRequest, previous: Option<Previous>) -> Result<Conversation, ApiError> {
    let mut conversation = Conversation::default();
    if let Some(previous) = previous {
        conversation.messages = previous.messages;
        conversation.push_output(previous.output)?;
    }
    if let Some(input) = request.input.take() {
        conversation.push_input(input)?;
    }
    Ok(conversation)
}

/// # Errors
/// 400 that names the field.
pub fn chat_request(
    request: &ResponsesRequest,
    options: Options,
    conversation: &Conversation,
    max_model_len: usize,
) -> Result<ChatCompletionRequest, ApiError> {
    let mut messages = conversation.messages.clone();
    if let Some(instructions) = &request.instructions {
        messages.insert(0, serde_json::json!({"role": "system", "content": instructions}));
    }
    let Tools { tools, choice } = convert_tools(
        request.tools.as_deref().unwrap_or_default(),
        request.tool_choice.as_ref(),
    )?;
    let sampling = request.sampling.clone();
    // What is asked beyond the context is cut to it, as in vLLM.
    let longest = i64::try_from(max_model_len).unwrap_or(i64::MAX);
    let truncates = request
        .truncation
        .as_ref()
        .is_some_and(|truncation| truncation.0 == "auto");
    Ok(ChatCompletionRequest {
        model: request.model.clone(),
        messages: Some(messages),
        logprobs: Some(includes_logprobs(request)),
        top_logprobs: request.top_logprobs,
        tools,
        tool_choice: choice,
        parallel_tool_calls: request.parallel_tool_calls,
        reasoning_effort: options.effort,
        include_reasoning: request.include_reasoning,
        add_generation_prompt: Some(!conversation.continues),
        continue_final_message: Some(conversation.continues),
        chat_template_kwargs: request.chat_template_kwargs.clone(),
        media_io_kwargs: request.media_io_kwargs.clone(),
        mm_processor_kwargs: request.mm_processor_kwargs.clone(),
        sampling: SamplingFields {
            max_tokens: request.max_output_tokens.map(|count| count.min(longest)),
            stream: request.stream,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            repetition_penalty: sampling.repetition_penalty,
            seed: sampling.seed,
            stop: sampling.stop,
            stop_token_ids: sampling.stop_token_ids,
            include_stop_str_in_output: sampling.include_stop_str_in_output,
            ignore_eos: sampling.ignore_eos,
            skip_special_tokens: sampling.skip_special_tokens,
            spaces_between_special_tokens: sampling.spaces_between_special_tokens,
            logit_bias: request.logit_bias.clone(),
            priority: sampling.priority,
            cache_salt: sampling.cache_salt,
            watermarking: sampling.watermarking,
            structured_outputs: sampling.structured_outputs,
            response_format: options.response_format,
            // -1: whatever does not fit, from the start of the conversation.
            truncate_prompt_tokens: truncates.then_some(-1),
            truncation_side: truncates.then(|| crate::server::field::Choice::known("left")).flatten(),
            ..SamplingFields::default()
        },
        ..ChatCompletionRequest::default()
    })
}

/// The answer before it is made; what the request said is repeated in it.
pub fn response(request: ResponsesRequest, conversion: &Conversion, app: &App) -> Response {
    let head = &conversion.reply.head;
    let generate = &conversion.request.generate;
    let word = |word: Option<String>, default: &str| word.unwrap_or_else(|| default.to_owned());
    let tools = request.tools.unwrap_or_default();
    let tool_choice = match request.tool_choice {
        Some(choice) if !tools.is_empty() => choice,
        _ if tools.is_empty() => "none".into(),
        _ => "auto".into(),
    };
    Response {
        id: head.id.clone(),
        created_at: head.created,
        error: None,
        incomplete_details: None,
        instructions: request.instructions,
        metadata: request.metadata,
        model: head.model.clone(),
        object: "response",
        output: Vec::new(),
        parallel_tool_calls: request.parallel_tool_calls.unwrap_or(true),
        temperature: generate.sampling.temperature,
        tool_choice,
        tools,
        top_p: generate.sampling.top_p,
        background: request.background.unwrap_or(false),
        max_output_tokens: generate
            .max_tokens
            .map_or(app.model.max_model_len, |count| count as usize),
        max_tool_calls: request.max_tool_calls,
        previous_response_id: request.previous_response_id,
        prompt: None,
        prompt_cache_options: request.prompt_cache_options,
        prompt_cache_key: request.prompt_cache_key,
        prompt_cache_retention: request.prompt_cache_retention.map(|retention| retention.0),
        reasoning: request.reasoning,
        safety_identifier: request.safety_identifier,
        service_tier: word(request.service_tier.map(|tier| tier.0), "auto"),
        status: Status::InProgress,
        text: request.text,
        top_logprobs: conversion.reply.top_logprobs,
        truncation: word(request.truncation.map(|truncation| truncation.0), "disabled"),
        usage: None,
        user: request.user,
        metrics: None,
        presence_penalty: request.sampling.presence_penalty,
        frequency_penalty: request.sampling.frequency_penalty,
        kv_transfer_params: None,
        ec_transfer_params: None,
        input_messages: None,
        output_messages: None,
    }
}
