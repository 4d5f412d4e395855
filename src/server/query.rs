//! Query parameters, read as vLLM's framework reads them: words for booleans, one of a set, failures that name them.

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;

use super::error::ApiError;

/// The decoded pairs of a query string, in order.
pub struct QueryParams(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for QueryParams {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Query::try_from_uri(&parts.uri)
            .map(|Query(pairs)| Self(pairs))
            .map_err(|_| ApiError::bad_request("the query string cannot be read"))
    }
}

impl QueryParams {
    /// Every value of a parameter.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .filter(move |(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// The last value: a repeated parameter overrides itself.
    fn last(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .rev()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// # Errors
    /// 400: no boolean.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool, ApiError> {
        match self.last(name).map(str::to_ascii_lowercase).as_deref() {
            None => Ok(default),
            Some("1" | "on" | "t" | "true" | "y" | "yes") => Ok(true),
            Some("0" | "off" | "f" | "false" | "n" | "no") => Ok(false),
            Some(_) => Err(ApiError::invalid_query(
                name,
                "bool_parsing",
                "Input should be a valid boolean, unable to interpret input",
            )),
        }
    }

    /// # Errors
    /// 400: no integer.
    pub fn integer(&self, name: &str) -> Result<Option<i64>, ApiError> {
        let parse = |text: &str| {
            text.trim().parse().map_err(|_| {
                ApiError::invalid_query(
                    name,
                    "int_parsing",
                    "Input should be a valid integer, unable to parse string as an integer",
                )
            })
        };
        self.last(name).map(parse).transpose()
    }

    /// The meaning of one of a few words; the first is the default.
    ///
    /// # Errors
    /// 400: another word.
    pub fn one_of<T: Copy>(&self, name: &str, words: &[(&str, T)]) -> Result<T, ApiError> {
        let found = match self.last(name) {
            None => words.first(),
            Some(word) => words.iter().find(|(known, _)| *known == word),
        };
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            ApiError::invalid_query(name, "literal_error", &super::field::one_of(&words))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(uri: &str) -> QueryParams {
        QueryParams(Query::try_from_uri(&uri.parse().unwrap()).unwrap().0)
    }

    #[test]
    fn values_are_read_or_named() {
        let query = params("/x?a=Yes&b=0&a=off&tags=x%20y&tags=z&mode=keep");
        assert_eq!((query.flag("a", true), query.flag("b", true)), (Ok(false), Ok(false)));
        assert_eq!(query.flag("c", true), Ok(true));
        assert_eq!(query.all("tags").collect::<Vec<_>>(), ["x y", "z"]);
        assert_eq!(query.one_of("mode", &[("abort", 1), ("keep", 2)]), Ok(2));
        assert_eq!(query.one_of("other", &[("abort", 1), ("keep", 2)]), Ok(1));
        assert_eq!((query.integer("b"), query.integer("c")), (Ok(Some(0)), Ok(None)));
        assert_eq!(query.integer("mode").unwrap_err().param.as_deref(), Some("query.mode"));
        let error = query.flag("mode", true).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("query.mode"));
        let error = query.one_of("mode", &[("abort", 1), ("wait", 2)]).unwrap_err();
        assert!(
            error.message.contains("Input should be 'abort' or 'wait'"),
            "{}",
            error.message
        );
    }
}
