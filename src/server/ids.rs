//! Identifiers and times on the wire.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::HeaderMap;

use super::middleware::REQUEST_ID;

/// Longest request id that is taken over; longer ones are cut.
const MAX_ID_CHARS: usize = 256;

/// 16 random hexadecimal digits.
pub fn random() -> String {
    let mut id = uuid::Uuid::new_v4().simple().to_string();
    id.truncate(16);
    id
}

/// `prefix` and 16 random hexadecimal digits.
pub fn prefixed(prefix: &str) -> String {
    format!("{prefix}{}", random())
}

/// A response's id without its prefix: the `X-Request-Id` header, else the body's `request_id`, else random.
pub fn of_request(headers: &HeaderMap, body: Option<&str>) -> String {
    let header = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    match header.or(body).filter(|id| !id.is_empty()) {
        Some(id) => id.chars().filter(|c| !c.is_control()).take(MAX_ID_CHARS).collect(),
        None => random(),
    }
}

/// 0 before 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_beats_the_body() {
        let mut headers = HeaderMap::new();
        assert_eq!(of_request(&headers, Some("b\n1")), "b1");
        let fresh = of_request(&headers, None);
        assert!(fresh.len() == 16 && fresh.bytes().all(|b| b.is_ascii_hexdigit()));
        headers.insert(REQUEST_ID, "h".parse().unwrap());
        assert_eq!(of_request(&headers, Some("b")), "h");
    }
}
