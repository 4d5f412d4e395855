//! The conversation with the hub: what a file is, then its bytes, as often as it takes.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sha1::Sha1;
use sha2::{Digest, Sha256};
use tracing::warn;
use ureq::Agent;
use ureq::http::{HeaderMap, Response, StatusCode, Uri, header};

use super::cache::RepoCache;
use super::progress::{FileProgress, Progress};
use super::{HubError, HubSettings, RepoInfo};

/// Attempts without progress before a download is given up.
const ATTEMPTS: u32 = 5;
const MAX_REDIRECTS: usize = 5;
const CHUNK_BYTES: usize = 256 << 10;
/// A repository listing is far smaller.
const MAX_INFO_BYTES: u64 = 64 << 20;

pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    retry_pause: Duration,
}

/// What the hub says about a file before it sends it.
struct Remote {
    /// The blob's name in the cache: SHA-256 of a large file, git's SHA-1 of a small one.
    etag: String,
    size_bytes: Option<u64>,
}

/// The end of one attempt.
enum Outcome {
    Complete,
    /// More is to come, after `received_bytes` in this attempt.
    Cut {
        error: HubError,
        received_bytes: u64,
    },
}

impl Client {
    pub fn new(settings: &HubSettings) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("rvllm/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(settings.timeout))
            .timeout_recv_response(Some(settings.timeout))
            .timeout_per_read(Some(settings.timeout))
            .build();
        Self {
            agent: config.new_agent(),
            endpoint: settings.endpoint.trim_end_matches('/').to_owned(),
            token: settings.token.clone(),
            retry_pause: settings.retry_pause,
        }
    }

    /// # Errors
    /// The repository or revision does not exist, access is refused, or the hub cannot be reached.
    pub fn repo_info(&self, repo: &str, revision: &str) -> Result<RepoInfo, HubError> {
        let url = format!(
            "{}/api/models/{repo}/revision/{}",
            self.endpoint,
            escape(revision, false)
        );
        self.retried(|| {
            let mut response = self.follow("GET", &url, None)?;
            self.check(&response, repo, revision, &url)?;
            let network = |error: ureq::Error| HubError::Network {
                url: url.clone(),
                message: error.to_string(),
            };
            let bytes = response
                .body_mut()
                .with_config()
                .limit(MAX_INFO_BYTES)
                .read_to_vec()
                .map_err(network)?;
            let parsed = serde_json::from_slice(&bytes);
            parsed.map_err(|error| HubError::Protocol {
                url: url.clone(),
                message: error.to_string(),
            })
        })
    }

    /// Brings one file into the cache and links it into the snapshot.
    ///
    /// # Errors
    /// The file cannot be had, or what came is not what the hub says it is.
    pub fn fetch(
        &self,
        repo: &str,
        commit: &str,
        file: &str,
        cache: &RepoCache,
        progress: &Progress,
        stop: &AtomicBool,
    ) -> Result<(), HubError> {
        let url = format!("{}/{repo}/resolve/{commit}/{}", self.endpoint, escape(file, true));
        let remote = self.retried(|| self.remote(repo, commit, &url))?;
        let _lock = cache.lock(&remote.etag)?;
        let blob = cache.blob(&remote.etag);
        let is_there = fs::metadata(&blob).is_ok_and(|m| remote.size_bytes.is_none_or(|size| size == m.len()));
        if !is_there {
            let partial = cache.incomplete(&remote.etag);
            let bar = progress.file(file, remote.size_bytes);
            self.fetch_blob(&url, file, &remote, &partial, &bar, stop)?;
            fs::rename(&partial, &blob).map_err(|error| HubError::io(&blob, error))?;
            bar.done();
        }
        cache.link(commit, file, &remote.etag)
    }

    /// Asks for the file's hash and size without its bytes.
    fn remote(&self, repo: &str, commit: &str, url: &str) -> Result<Remote, HubError> {
        let mut url = url.to_owned();
        let mut linked = HeaderMap::new();
        for _ in 0..MAX_REDIRECTS {
            let response = self.request("HEAD", &url, None)?;
            let status = response.status();
            if !status.is_redirection() {
                self.check(&response, repo, commit, &url)?;
            }
            // The first answer that names the file counts: after a redirect, sizes and tags are the store's.
            for name in ["x-linked-etag", "x-linked-size", "etag"] {
                if let Some(value) = response.headers().get(name).filter(|_| !linked.contains_key(name)) {
                    linked.insert(name, value.clone());
                }
            }
            let next = status.is_redirection().then(|| location(&url, &response)).transpose()?;
            match next {
                Some(next) if same_origin(&next, &self.endpoint) && !linked.contains_key("x-linked-etag") => url = next,
                next => {
                    let length = next
                        .is_none()
                        .then(|| text(response.headers(), "content-length"))
                        .flatten();
                    return remote_of(&linked, length, &url);
                }
            }
        }
        Err(HubError::Protocol {
            url,
            message: "too many redirects".into(),
        })
    }

    /// Downloads into `partial`, resuming after cuts, until it is whole and has the right hash.
    fn fetch_blob(
        &self,
        url: &str,
        file: &str,
        remote: &Remote,
        partial: &Path,
        bar: &FileProgress,
        stop: &AtomicBool,
    ) -> Result<(), HubError> {
        let resumed = fs::metadata(partial).is_ok_and(|m| m.len() > 0);
        let mut attempts_left = ATTEMPTS;
        let mut pause = self.retry_pause;
        loop {
            match self.attempt(url, remote, partial, bar, stop)? {
                Outcome::Complete => break,
                Outcome::Cut { error, received_bytes } => {
                    if received_bytes > 0 {
                        (attempts_left, pause) = (ATTEMPTS, self.retry_pause);
                    }
                    attempts_left -= 1;
                    if attempts_left == 0 || stop.load(Ordering::Relaxed) {
                        return Err(error);
                    }
                    warn!("{file}: {error}; trying again");
                    std::thread::sleep(pause);
                    pause *= 2;
                }
            }
        }
        match verify(file, remote, partial) {
            Ok(()) => Ok(()),
            Err(error @ (HubError::WrongHash { .. } | HubError::WrongSize { .. })) => {
                fs::remove_file(partial).map_err(|e| HubError::io(partial, e))?;
                if !resumed {
                    return Err(error);
                }
                // What an earlier run left behind may be at fault: once more from the start.
                warn!("{error}; downloading it again");
                self.fetch_blob(url, file, remote, partial, bar, stop)
            }
            Err(error) => Err(error),
        }
    }

    /// One request for the rest of the file. Cuts are outcomes; what no retry can mend is an error.
    fn attempt(
        &self,
        url: &str,
        remote: &Remote,
        partial: &Path,
        bar: &FileProgress,
        stop: &AtomicBool,
    ) -> Result<Outcome, HubError> {
        let io = |error| HubError::io(partial, error);
        let mut output = File::options().create(true).append(true).open(partial).map_err(io)?;
        let mut at = output.metadata().map_err(io)?.len();
        if remote.size_bytes == Some(at) && at > 0 {
            return Ok(Outcome::Complete);
        }
        let cut = |error, received_bytes| Ok(Outcome::Cut { error, received_bytes });
        let mut response = match self.follow("GET", url, Some(at)) {
            Ok(response) => response,
            Err(error) if error.is_transient() => return cut(error, 0),
            Err(error) => return Err(error),
        };
        match response.status() {
            StatusCode::PARTIAL_CONTENT if range_start(response.headers()) == Some(at) => {}
            // The whole file, or a part that was not asked for, or nothing after what is there: from the start.
            StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                output.set_len(0).map_err(io)?;
                at = 0;
                if response.status() != StatusCode::OK {
                    return cut(
                        HubError::Status {
                            url: url.into(),
                            status: response.status().as_u16(),
                        },
                        0,
                    );
                }
            }
            status => {
                let error = HubError::Status {
                    url: url.into(),
                    status: status.as_u16(),
                };
                return if error.is_transient() {
                    cut(error, 0)
                } else {
                    Err(error)
                };
            }
        }
        let started_at = at;
        let mut body = response.body_mut().as_reader();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(HubError::Network {
                    url: url.into(),
                    message: "stopped".into(),
                });
            }
            match body.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) => {
                    output.write_all(&chunk[..count]).map_err(io)?;
                    at += count as u64;
                    bar.at(at);
                }
                Err(error) => {
                    let error = HubError::Network {
                        url: url.into(),
                        message: error.to_string(),
                    };
                    return cut(error, at - started_at);
                }
            }
        }
        output.sync_all().map_err(io)?;
        match remote.size_bytes {
            Some(size) if at < size => {
                let message = format!("the connection ended after {at} of {size} bytes");
                cut(
                    HubError::Network {
                        url: url.into(),
                        message,
                    },
                    at - started_at,
                )
            }
            _ => Ok(Outcome::Complete),
        }
    }

    /// Follows redirects by hand, so that the token goes to the hub alone.
    fn follow(&self, method: &str, url: &str, from: Option<u64>) -> Result<Response<ureq::Body>, HubError> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.request(method, &url, from)?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            url = location(&url, &response)?;
        }
        Err(HubError::Protocol {
            url,
            message: "too many redirects".into(),
        })
    }

    fn request(&self, method: &str, url: &str, from: Option<u64>) -> Result<Response<ureq::Body>, HubError> {
        let mut request = match method {
            "HEAD" => self.agent.head(url),
            _ => self.agent.get(url),
        };
        if let Some(token) = self.token.as_ref().filter(|_| same_origin(url, &self.endpoint)) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(from) = from.filter(|at| *at > 0) {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        request.call().map_err(|error| match error {
            ureq::Error::Http(_) | ureq::Error::BadUri(_) => HubError::Protocol {
                url: without_query(url),
                message: error.to_string(),
            },
            _ => HubError::Network {
                url: without_query(url),
                message: error.to_string(),
            },
        })
    }

    /// Turns a refusal into what it means.
    fn check(&self, response: &Response<ureq::Body>, repo: &str, revision: &str, url: &str) -> Result<(), HubError> {
        let status = response.status().as_u16();
        if response.status().is_success() {
            return Ok(());
        }
        let (repo, endpoint) = (repo.to_owned(), self.endpoint.clone());
        Err(match (status, text(response.headers(), "x-error-code").as_deref()) {
            (_, Some("GatedRepo")) => HubError::Gated { repo, endpoint },
            (_, Some("RevisionNotFound")) => HubError::RevisionNotFound {
                repo,
                revision: revision.to_owned(),
            },
            (_, Some("RepoNotFound")) | (404, None) => HubError::RepoNotFound { repo, endpoint },
            (401, None) if self.token.is_none() => HubError::RepoNotFound { repo, endpoint },
            (401 | 403, _) => HubError::Refused { repo, endpoint, status },
            _ => HubError::Status {
                url: without_query(url),
                status,
            },
        })
    }

    fn retried<T>(&self, mut attempt: impl FnMut() -> Result<T, HubError>) -> Result<T, HubError> {
        let mut pause = self.retry_pause;
        for _ in 1..ATTEMPTS {
            match attempt() {
                Err(error) if error.is_transient() => warn!("{error}; trying again"),
                result => return result,
            }
            std::thread::sleep(pause);
            pause *= 2;
        }
        attempt()
    }
}

fn remote_of(headers: &HeaderMap, content_length: Option<String>, url: &str) -> Result<Remote, HubError> {
    let fail = |message: &str| HubError::Protocol {
        url: without_query(url),
        message: message.into(),
    };
    let tag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
    let tag = tag.ok_or_else(|| fail("the answer has no ETag; is HF_ENDPOINT a hub?"))?;
    let etag = tag.trim_start_matches("W/").trim_matches('"').to_owned();
    let alphabet = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if etag.is_empty() || etag.len() > 128 || etag.starts_with('.') || !etag.chars().all(alphabet) {
        return Err(fail("the ETag is no file name"));
    }
    let size = text(headers, "x-linked-size").or(content_length);
    let size_bytes = size
        .map(|s| s.parse().map_err(|_| fail("the size is no number")))
        .transpose()?;
    Ok(Remote { etag, size_bytes })
}

/// Compares size and hash with what the hub said.
fn verify(file: &str, remote: &Remote, path: &Path) -> Result<(), HubError> {
    let io = |error| HubError::io(path, error);
    let actual = fs::metadata(path).map_err(io)?.len();
    if let Some(expected) = remote.size_bytes.filter(|expected| *expected != actual) {
        return Err(HubError::WrongSize {
            file: file.into(),
            expected,
            actual,
        });
    }
    let is_hex = remote.etag.bytes().all(|b| b.is_ascii_hexdigit());
    let hash = match remote.etag.len() {
        64 if is_hex => digest(Sha256::new(), path).map_err(io)?,
        40 if is_hex => digest(Sha1::new_with_prefix(format!("blob {actual}\0")), path).map_err(io)?,
        // A mirror's own tag: the size is all there is to compare.
        _ => return Ok(()),
    };
    if hash.eq_ignore_ascii_case(&remote.etag) {
        return Ok(());
    }
    Err(HubError::WrongHash {
        file: file.into(),
        expected: remote.etag.clone(),
        actual: hash,
    })
}

fn digest(mut hasher: impl Digest, path: &Path) -> std::io::Result<String> {
    let mut input = File::open(path)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match input.read(&mut chunk)? {
            0 => break,
            count => hasher.update(&chunk[..count]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// First byte of `Content-Range: bytes 5-9/10`.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    text(headers, "content-range")?
        .strip_prefix("bytes ")?
        .split('-')
        .next()?
        .parse()
        .ok()
}

/// Where a redirect leads. Never from https to http.
fn location(from: &str, response: &Response<ureq::Body>) -> Result<String, HubError> {
    let fail = |message: &str| HubError::Protocol {
        url: without_query(from),
        message: message.into(),
    };
    let to = text(response.headers(), "location").ok_or_else(|| fail("a redirect leads nowhere"))?;
    let origin = origin(from).ok_or_else(|| fail("is no URL"))?;
    let to = match to.strip_prefix("//") {
        Some(_) => format!("{}:{to}", origin.split(':').next().unwrap_or("https")),
        None if to.starts_with('/') => format!("{origin}{to}"),
        None => to,
    };
    let is_http = to.starts_with("http://");
    if !(to.starts_with("https://") || is_http && from.starts_with("http://")) {
        return Err(fail("a redirect leads away from https"));
    }
    Ok(to)
}

/// `scheme://host:port`.
fn origin(url: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    Some(format!(
        "{}://{}",
        uri.scheme_str()?,
        uri.authority()?.as_str().to_ascii_lowercase()
    ))
}

fn same_origin(url: &str, endpoint: &str) -> bool {
    origin(url).is_some_and(|o| origin(endpoint).as_deref() == Some(&o))
}

/// For messages: signed addresses carry secrets in their query.
fn without_query(url: &str) -> String {
    url.split('?').next().unwrap_or(url).to_owned()
}

/// Percent-encodes everything that is not plain in a path segment.
fn escape(text: &str, keep_slashes: bool) -> String {
    let plain =
        |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~') || (keep_slashes && b == b'/');
    text.bytes()
        .map(|b| {
            if plain(b) {
                char::from(b).to_string()
            } else {
                format!("%{b:02X}")
            }
        })
        .collect()
}
