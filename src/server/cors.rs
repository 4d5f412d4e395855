//! Cross-origin rules as Starlette's middleware applies them; with vLLM's defaults no origin is allowed.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::Response;

use crate::config::ServerConfig;

const ALL_METHODS: &str = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT";
/// Headers that a page may always send.
const SAFE_HEADERS: [&str; 4] = ["Accept", "Accept-Language", "Content-Language", "Content-Type"];
const PREFLIGHT_MAX_AGE_S: &str = "600";

/// The `--allowed-*` flags.
#[derive(Clone, Debug)]
pub struct Cors {
    /// None = every origin.
    origins: Option<Vec<String>>,
    /// None = every method.
    methods: Option<Vec<String>>,
    /// None = every header.
    headers: Option<Vec<String>>,
    credentials: bool,
}

impl Cors {
    pub fn new(config: &ServerConfig) -> Self {
        let listed = |list: &[String]| (!list.iter().any(|item| item == "*")).then(|| list.to_vec());
        Self {
            origins: listed(&config.allowed_origins),
            methods: listed(&config.allowed_methods),
            headers: listed(&config.allowed_headers),
            credentials: config.allow_credentials,
        }
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        match &self.origins {
            None => true,
            Some(origins) => origins.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes()),
        }
    }

    /// Names the page's origin instead of `*`: with a list, and where cookies are involved.
    fn names_origin(&self, with_cookies: bool) -> bool {
        self.origins.is_some() || with_cookies
    }

    /// The answer to a preflight request; none when the request is not one.
    pub fn preflight(&self, method: &Method, headers: &HeaderMap) -> Option<Response> {
        let origin = headers.get(header::ORIGIN)?;
        let wanted_method = headers.get(header::ACCESS_CONTROL_REQUEST_METHOD)?;
        if method != Method::OPTIONS {
            return None;
        }
        let mut failures = Vec::new();
        let mut response = Response::new(Body::empty());
        let out = response.headers_mut();

        if self.names_origin(self.credentials) {
            out.insert(header::VARY, HeaderValue::from_static("Origin"));
        }
        if !self.allows(origin) {
            failures.push("origin");
        } else if self.names_origin(self.credentials) {
            out.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        } else {
            out.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        }

        let methods = self
            .methods
            .as_ref()
            .map_or_else(|| ALL_METHODS.to_owned(), |methods| methods.join(", "));
        if !methods
            .split(", ")
            .any(|allowed| allowed.as_bytes() == wanted_method.as_bytes())
        {
            failures.push("method");
        }
        insert(out, header::ACCESS_CONTROL_ALLOW_METHODS, &methods);
        out.insert(
            header::ACCESS_CONTROL_MAX_AGE,
            HeaderValue::from_static(PREFLIGHT_MAX_AGE_S),
        );

        let wanted_headers = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS);
        match (&self.headers, wanted_headers) {
            (None, Some(wanted)) => {
                out.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
            }
            (None, None) => {}
            (Some(allowed), wanted) => {
                let mut allowed: Vec<&str> = allowed.iter().map(String::as_str).chain(SAFE_HEADERS).collect();
                allowed.sort_unstable();
                allowed.dedup();
                insert(out, header::ACCESS_CONTROL_ALLOW_HEADERS, &allowed.join(", "));
                let wanted = wanted.and_then(|value| value.to_str().ok()).unwrap_or_default();
                let unknown = |name: &str| !allowed.iter().any(|allowed| allowed.eq_ignore_ascii_case(name));
                if wanted
                    .split(',')
                    .map(str::trim)
                    .any(|name| !name.is_empty() && unknown(name))
                {
                    failures.push("headers");
                }
            }
        }
        if self.credentials {
            out.insert(
                header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
                HeaderValue::from_static("true"),
            );
        }

        out.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        if failures.is_empty() {
            *response.body_mut() = Body::from("OK");
        } else {
            *response.status_mut() = StatusCode::BAD_REQUEST;
            *response.body_mut() = Body::from(format!("Disallowed CORS {}", failures.join(", ")));
        }
        Some(response)
    }

    /// Marks an ordinary response. `request` are the request's headers.
    pub fn mark(&self, request: &HeaderMap, response: &mut HeaderMap) {
        if self.origins.is_some() {
            response.append(header::VARY, HeaderValue::from_static("Origin"));
        }
        let Some(origin) = request.get(header::ORIGIN) else {
            return;
        };
        if !self.allows(origin) {
            return;
        }
        if self.credentials {
            response.insert(
                header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
                HeaderValue::from_static("true"),
            );
        }
        if self.names_origin(request.contains_key(header::COOKIE)) {
            response.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        } else {
            response.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        }
    }
}

/// Leaves the header out when the flag's text is no header value.
fn insert(headers: &mut HeaderMap, name: header::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cors(origins: Option<&[&str]>, headers: Option<&[&str]>, credentials: bool) -> Cors {
        let owned = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        Cors {
            origins: origins.map(owned),
            methods: None,
            headers: headers.map(owned),
            credentials,
        }
    }

    fn preflight(cors: &Cors, origin: &str, headers: Option<&str>) -> Response {
        let mut request = HeaderMap::new();
        request.insert("origin", origin.parse().unwrap());
        request.insert("access-control-request-method", "POST".parse().unwrap());
        if let Some(headers) = headers {
            request.insert("access-control-request-headers", headers.parse().unwrap());
        }
        cors.preflight(&Method::OPTIONS, &request).unwrap()
    }

    #[test]
    fn by_default_no_origin_is_allowed() {
        let closed = cors(Some(&[]), None, false);
        let response = preflight(&closed, "http://a", None);
        assert_eq!(response.status(), 400);
        assert!(!response.headers().contains_key("access-control-allow-origin"));
        let mut out = HeaderMap::new();
        closed.mark(&HeaderMap::new(), &mut out);
        assert_eq!(out["vary"], "Origin");
    }

    #[test]
    fn a_star_allows_all_and_credentials_name_the_origin() {
        assert_eq!(
            preflight(&cors(None, None, false), "http://a", Some("x-a")).headers()["access-control-allow-origin"],
            "*"
        );
        let response = preflight(&cors(None, None, true), "http://a", Some("x-a"));
        assert_eq!(response.headers()["access-control-allow-origin"], "http://a");
        assert_eq!(response.headers()["access-control-allow-headers"], "x-a");
    }

    #[test]
    fn unlisted_headers_are_refused() {
        let listed = cors(Some(&["http://a"]), Some(&["X-Ok"]), false);
        assert_eq!(preflight(&listed, "http://a", Some("x-ok, content-type")).status(), 200);
        assert_eq!(preflight(&listed, "http://a", Some("x-other")).status(), 400);
        assert_eq!(preflight(&listed, "http://b", None).status(), 400);
    }

    #[test]
    fn only_options_with_both_headers_is_a_preflight() {
        let open = cors(None, None, false);
        let mut request = HeaderMap::new();
        request.insert("origin", "http://a".parse().unwrap());
        assert!(open.preflight(&Method::OPTIONS, &request).is_none());
        request.insert("access-control-request-method", "POST".parse().unwrap());
        assert!(open.preflight(&Method::POST, &request).is_none());
    }
}
