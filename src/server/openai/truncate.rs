//! `truncate_prompt_tokens` and `truncation_side`.

use super::types::SamplingFields;
use crate::server::error::ApiError;
use crate::text::Truncation;

/// None: the request does not ask for it. -1 leaves room for the `max_output_tokens` (or for one).
///
/// # Errors
/// 400: longer than the context.
pub fn truncation(
    fields: &SamplingFields,
    max_model_len: usize,
    max_output_tokens: Option<u32>,
) -> Result<Option<Truncation>, ApiError> {
    let Some(asked) = fields.truncate_prompt_tokens else {
        return Ok(None);
    };
    let max_tokens = match usize::try_from(asked) {
        Ok(count) if count > max_model_len => {
            return Err(ApiError::invalid_value(
                "truncate_prompt_tokens",
                format!("truncate_prompt_tokens value ({count}) is greater than max_model_len ({max_model_len})."),
                count,
            ));
        }
        Ok(count) => count,
        Err(_) => max_model_len
            .saturating_sub(max_output_tokens.map_or(1, |count| count as usize))
            .max(1),
    };
    let keep_end = fields.truncation_side.as_ref().is_some_and(|side| side.0 == "left");
    Ok(Some(Truncation { max_tokens, keep_end }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::body::parse;
    use crate::step::TokenId;

    fn cut(json: &str, max_output: Option<u32>) -> Vec<TokenId> {
        let fields: SamplingFields = parse(json.as_bytes()).unwrap();
        let mut ids = vec![1, 2, 3, 4, 5];
        if let Some(cut) = truncation(&fields, 5, max_output).unwrap() {
            cut.apply(&mut ids);
        }
        ids
    }

    #[test]
    fn the_side_named_is_cut_off() {
        assert_eq!(cut("{}", None), [1, 2, 3, 4, 5]);
        assert_eq!(cut(r#"{"truncate_prompt_tokens":2}"#, None), [1, 2]);
        assert_eq!(
            cut(r#"{"truncate_prompt_tokens":2,"truncation_side":"left"}"#, None),
            [4, 5]
        );
        assert_eq!(cut(r#"{"truncate_prompt_tokens":-1}"#, Some(3)), [1, 2]);
        assert_eq!(cut(r#"{"truncate_prompt_tokens":-1}"#, None), [1, 2, 3, 4]);
    }

    #[test]
    fn more_than_the_context_is_refused() {
        let fields: SamplingFields = parse(br#"{"truncate_prompt_tokens":6}"#).unwrap();
        let error = truncation(&fields, 5, None).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("truncate_prompt_tokens"));
    }
}
