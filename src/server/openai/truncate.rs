//! `truncate_prompt_tokens` and `truncation_side`.

use super::types::SamplingFields;
use crate::server::error::ApiError;
use crate::text::Truncation;

/// None: the request does not ask for it. -1 keeps what leaves room for the `output_tokens` (or for one).
///
/// `output_tokens`: as the request or its endpoint's default says; 0 = no number is given. Without `truncation_side` the
/// prompt's end is kept, as vLLM does for models that generate.
///
/// # Errors
/// 400: what is kept and the output are longer than the context.
pub fn truncation(
    fields: &SamplingFields,
    max_model_len: usize,
    output_tokens: usize,
) -> Result<Option<Truncation>, ApiError> {
    let Some(asked) = fields.truncate_prompt_tokens else {
        return Ok(None);
    };
    let max_input_tokens = max_model_len.saturating_sub(output_tokens);
    let max_tokens = match usize::try_from(asked) {
        Ok(count) if count > max_input_tokens => {
            return Err(ApiError::invalid_value(
                "truncate_prompt_tokens",
                format!(
                    "truncate_prompt_tokens={count} cannot be greater than the context of {max_model_len} tokens less \
                     {output_tokens} for the output."
                ),
                count,
            ));
        }
        Ok(count) => count,
        Err(_) => max_input_tokens.min(max_model_len.saturating_sub(1)).max(1),
    };
    let keep_end = fields.truncation_side.as_ref().is_none_or(|side| side.0 == "left");
    Ok(Some(Truncation { max_tokens, keep_end }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::body::parse;
    use crate::step::TokenId;

    fn cut(json: &str, output_tokens: usize) -> Vec<TokenId> {
        let fields: SamplingFields = parse(json.as_bytes()).unwrap();
        let mut ids = vec![1, 2, 3, 4, 5];
        if let Some(cut) = truncation(&fields, 5, output_tokens).unwrap() {
            cut.apply(&mut ids);
        }
        ids
    }

    #[test]
    fn the_side_named_is_cut_off() {
        assert_eq!(cut("{}", 0), [1, 2, 3, 4, 5]);
        assert_eq!(cut(r#"{"truncate_prompt_tokens":2}"#, 0), [4, 5]);
        assert_eq!(
            cut(r#"{"truncate_prompt_tokens":2,"truncation_side":"left"}"#, 0),
            [4, 5]
        );
        assert_eq!(
            cut(r#"{"truncate_prompt_tokens":2,"truncation_side":"right"}"#, 0),
            [1, 2]
        );
        assert_eq!(cut(r#"{"truncate_prompt_tokens":-1}"#, 3), [4, 5]);
        assert_eq!(cut(r#"{"truncate_prompt_tokens":-1}"#, 0), [2, 3, 4, 5]);
    }

    #[test]
    fn more_than_the_context_is_refused() {
        let fields: SamplingFields = parse(br#"{"truncate_prompt_tokens":4}"#).unwrap();
        assert!(truncation(&fields, 5, 1).is_ok());
        let error = truncation(&fields, 5, 2).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("truncate_prompt_tokens"));
    }
}
