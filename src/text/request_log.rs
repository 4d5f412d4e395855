//! `--enable-log-requests` and `--enable-log-outputs`: vLLM's lines about each request and what was generated.

use super::{GenerateRequest, TextDelta, TextFinish, Tokenizer};
use crate::config::observability::RequestLogConfig;
use crate::step::TokenId;

/// A text cut after this many characters; quoted, so that it cannot forge a line.
fn cut(text: &str, max_len: Option<usize>) -> &str {
    match max_len.and_then(|max_len| text.char_indices().nth(max_len)) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

fn cut_ids(ids: &[TokenId], max_len: Option<usize>) -> &[TokenId] {
    &ids[..max_len.map_or(ids.len(), |max_len| max_len.min(ids.len()))]
}

/// A request arrives. Its prompt is shown at DEBUG only.
pub fn received(config: RequestLogConfig, request: &GenerateRequest, max_tokens: u32, tokenizer: &Tokenizer) {
    if !config.requests {
        return;
    }
    if tracing::enabled!(tracing::Level::DEBUG) {
        let text = tokenizer.decode(&request.prompt, false);
        tracing::debug!(
            "Request {} details: prompt: {:?}, prompt_token_ids: {:?}, prompt_embeds shape: None.",
            request.id,
            cut(&text, config.max_len),
            cut_ids(&request.prompt, config.max_len)
        );
    }
    let sampling = &request.sampling;
    tracing::info!(
        "Received request {}: params: SamplingParams(n={}, presence_penalty={:?}, frequency_penalty={:?}, repetition_penalty={:?}, \
         temperature={:?}, top_p={:?}, top_k={}, min_p={:?}, seed={}, stop={:?}, stop_token_ids={:?}, bad_words={}, \
         include_stop_str_in_output={}, ignore_eos={}, max_tokens={max_tokens}, min_tokens={}, logprobs={}, \
         prompt_logprobs={}, skip_special_tokens={}, spaces_between_special_tokens={}), prompt tokens: {}, lora_request: None.",
        request.id,
        request.n,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.min_p,
        sampling.seed,
        request.stop,
        request.stop_token_ids,
        sampling.bad_words.len(),
        python_bool(request.include_stop_str_in_output),
        python_bool(request.ignore_eos),
        request.min_tokens,
        option(sampling.logprobs),
        option(sampling.prompt_logprobs),
        python_bool(request.skip_special_tokens),
        python_bool(request.spaces_between_special_tokens),
        request.prompt.len(),
    );
}

fn python_bool(value: bool) -> &'static str {
    if value { "True" } else { "False" }
}

fn option(value: Option<u32>) -> String {
    value.map_or_else(|| "None".into(), |value| value.to_string())
}

/// Logs one choice while it is generated.
#[derive(Debug)]
pub struct OutputLog {
    id: String,
    streaming: bool,
    /// Each delta is logged too.
    deltas: bool,
    max_len: Option<usize>,
    text: String,
    token_ids: Vec<TokenId>,
}

impl OutputLog {
    /// None where outputs are not logged.
    pub fn new(config: RequestLogConfig, request: &GenerateRequest) -> Option<Self> {
        config.outputs.then(|| Self {
            id: request.id.clone(),
            streaming: request.extensions.stream,
            deltas: config.deltas && request.extensions.stream,
            max_len: config.max_len,
            text: String::new(),
            token_ids: Vec::new(),
        })
    }

    pub fn delta(&mut self, delta: &TextDelta) {
        if self.deltas && !delta.text.is_empty() {
            self.line(" (streaming delta)", &delta.text, &delta.token_ids, None);
        }
        self.text.push_str(&delta.text);
        self.token_ids.extend(&delta.token_ids);
        if let Some(finish) = &delta.finish {
            let kind = if self.streaming { " (streaming complete)" } else { "" };
            self.line(kind, &self.text, &self.token_ids, Some(finish));
        }
    }

    fn line(&self, kind: &str, text: &str, ids: &[TokenId], finish: Option<&TextFinish>) {
        let reason = match finish {
            None => "None",
            Some(TextFinish::Length) => "length",
            Some(TextFinish::Abort) => "abort",
            Some(TextFinish::Repetition) => "repetition",
            Some(TextFinish::Eos | TextFinish::StopToken(_) | TextFinish::StopString(_)) => "stop",
        };
        tracing::info!(
            "Generated response {}{kind}: output: {:?}, output_token_ids: {:?}, finish_reason: {reason}",
            self.id,
            cut(text, self.max_len),
            cut_ids(ids, self.max_len)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_at_characters() {
        assert_eq!(cut("añb", Some(2)), "añ");
        assert_eq!(cut("añb", Some(9)), "añb");
        assert_eq!(cut("añb", None), "añb");
        assert_eq!(cut_ids(&[1, 2, 3], Some(2)), [1, 2]);
        assert_eq!(cut_ids(&[1, 2, 3], Some(7)), [1, 2, 3]);
    }
}
