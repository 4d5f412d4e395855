//! A completion request on its way down: prompts become token ids, one [`GenerateRequest`] each.

use std::sync::Arc;

use super::reply::{CompletionReply, EchoedPrompt};
use super::types::{CompletionRequest, Prompt};
use crate::grammar::{Constraint, Grammar, Start};
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::openai::convert::{EndpointSampling, RequestContext, generate_request, resolve, thinking_budget};
use crate::server::openai::reply::ReplyOptions;
use crate::server::openai::truncate::truncation;
use crate::step::TokenId;
use crate::text::{GenerateRequest, TokenText};

/// `max_tokens` where the request names none.
const DEFAULT_MAX_TOKENS: u32 = 16;
/// Most choices of one request, over all its prompts.
const MAX_CHOICES: usize = 16_384;

/// A request that passed `validate`, ready to run.
pub struct Conversion {
    /// One per prompt, in order.
    pub requests: Vec<GenerateRequest>,
    pub reply: CompletionReply,
}

/// Tokenizes: call it where blocking is allowed.
///
/// # Errors
/// 400 for a sampling value out of bounds or a prompt that does not fit the model.
pub fn convert(
    request: CompletionRequest,
    app: &App,
    context: RequestContext,
    grammar: Option<Arc<Grammar>>,
) -> Result<Conversion, ApiError> {
    let fields = &request.sampling;
    let echo = request.echo.unwrap_or(false);
    let prompt_only = echo && fields.max_tokens == Some(0);
    let prompt_logprobs = fields.prompt_logprobs.or(request.logprobs.filter(|_| echo));
    let endpoint = EndpointSampling {
        logprobs: request.logprobs,
        // Nothing runs without sampling once; what comes of it is not shown.
        max_tokens: prompt_only.then_some(1),
        prompt_logprobs,
        default_max_tokens: Some(DEFAULT_MAX_TOKENS),
        ..EndpointSampling::default()
    };
    let resolved = resolve(fields, endpoint, app)?;
    let output_tokens = fields.max_tokens.unwrap_or(i64::from(DEFAULT_MAX_TOKENS));
    let output_tokens = usize::try_from(output_tokens).unwrap_or(0);
    let truncation = truncation(fields, app.model.max_model_len, output_tokens)?;
    let add_special_tokens = request.add_special_tokens.unwrap_or(true);
    let mut options = ReplyOptions::new(fields, &app.config, false);
    let thinking_budget = thinking_budget(fields, app)?;
    let constraint = grammar.map(|grammar| Constraint {
        grammar,
        start: Start::Now,
    });

    let prompts = request.prompt.map(|prompts| prompts.0).unwrap_or_default();
    options.request_metrics &= prompts.len() == 1;
    let num_choices = prompts.len() * resolved.n as usize;
    if num_choices > MAX_CHOICES {
        return Err(ApiError::bad_request(format!(
            "the prompts times n give {num_choices} choices, at most {MAX_CHOICES} are allowed"
        )));
    }
    let mut requests = Vec::with_capacity(prompts.len());
    let mut echoed = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let (mut ids, text) = match prompt {
            Prompt::Tokens(ids) => (ids, None),
            Prompt::Text(text) if truncation.is_some() => (app.text().encode(&text, add_special_tokens)?, Some(text)),
            Prompt::Text(text) => (app.text().encode_prompt(&text, add_special_tokens)?, Some(text)),
        };
        let cut = truncation.as_ref().is_some_and(|truncation| truncation.apply(&mut ids));
        app.text().check_prompt(&ids)?;
        // As vLLM: who gets the prompt's ids gets it once.
        let text = match (echo && !options.return_token_ids, text) {
            (false, _) => String::new(),
            (true, Some(text)) if !cut => text,
            (true, _) => app.tokenizer().decode(&ids, false),
        };
        let first = if echo && request.logprobs.is_some() {
            ids.first().map(|id| token_text(app, *id))
        } else {
            None
        };
        let ids: Arc<[TokenId]> = ids.into();
        let mut request = generate_request(fields, resolved.clone(), ids.clone(), &context, app);
        request.extensions.constraint.clone_from(&constraint);
        request.extensions.thinking_budget = thinking_budget;
        requests.push(request);
        echoed.push(EchoedPrompt { ids, text, first });
    }
    let reply = CompletionReply {
        head: context.head,
        options,
        logprobs: request.logprobs,
        prompt_logprobs: prompt_logprobs.is_some(),
        n: resolved.n,
        echo,
        prompt_only,
        prompts: echoed,
    };
    Ok(Conversion { requests, reply })
}

fn token_text(app: &App, id: TokenId) -> TokenText {
    let bytes = app.tokenizer().token_bytes(id).to_vec();
    TokenText {
        id,
        text: String::from_utf8_lossy(&bytes).into_owned(),
        bytes,
    }
}
