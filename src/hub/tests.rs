//! The hub's behaviour against a small server of our own.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as the server saw it: `GET /path`, and its headers in lower case.
#[derive(Clone, Debug)]
struct Seen {
    line: String,
    headers: HashMap<String, String>,
}

struct Reply {
    head: String,
    body: Vec<u8>,
}

fn reply(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let mut head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !headers
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("content-length"))
    {
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    Reply {
        head: head + "\r\n",
        body: body.to_vec(),
    }
}

/// Serves until the test process ends; one connection per request.
struct Server {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    fn start(handler: impl Fn(&Seen) -> Reply + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                // A client that goes away is the client's affair.
                let _ = Self::answer(stream, &handler, &log);
            }
        });
        Self { url, seen }
    }

    fn answer(mut stream: TcpStream, handler: &impl Fn(&Seen) -> Reply, log: &Mutex<Vec<Seen>>) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut headers = HashMap::new();
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let Some((name, value)) = header.trim_end().split_once(": ") else {
                break;
            };
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        let line = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
        let seen = Seen { line, headers };
        let reply = handler(&seen);
        log.lock().unwrap().push(seen.clone());
        stream.write_all(reply.head.as_bytes())?;
        if !seen.line.starts_with("HEAD") {
            stream.write_all(&reply.body)?;
        }
        Ok(())
    }

    fn requests(&self, beginning: &str) -> Vec<Seen> {
        self.seen
            .lock()
            .unwrap()
            .iter()
            .filter(|seen| seen.line.starts_with(beginning))
            .cloned()
            .collect()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn git_sha1(bytes: &[u8]) -> String {
    hex(&Sha1::new_with_prefix(format!("blob {}\0", bytes.len()))
        .chain_update(bytes)
        .finalize())
}

fn listing(files: &[&str]) -> Reply {
    let siblings: Vec<_> = files.iter().map(|f| serde_json::json!({"rfilename": f})).collect();
    let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
    reply("200 OK", &[], body.as_bytes())
}

fn hub(url: &str, cache: &Path) -> Hub {
    Hub::new(settings(url, cache))
}

fn settings(url: &str, cache: &Path) -> HubSettings {
    HubSettings {
        endpoint: url.to_owned(),
        token: Some("secret".into()),
        cache_dir: cache.to_path_buf(),
        offline: false,
        retry_pause: Duration::from_millis(1),
        timeout: Duration::from_secs(5),
    }
}

fn everything() -> Selection {
    Selection {
        weights: true,
        ignore_patterns: Vec::new(),
    }
}

const CONFIG: &[u8] = b"{\"a\": 1}";

fn weights() -> Vec<u8> {
    (0..100_000u32).flat_map(|n| n.to_le_bytes()).collect()
}

/// A hub with config.json and model.safetensors; the latter's bytes come from `store`.
fn hub_server(store_url: String, etag: String) -> Server {
    let size = weights().len().to_string();
    Server::start(move |seen| {
        if seen.line.contains("/api/models/") {
            return listing(&["config.json", "model.safetensors", "README.md", "sub/dir/x.bin"]);
        }
        if seen.line.ends_with("config.json") {
            let tag = format!("\"{}\"", git_sha1(CONFIG));
            return reply("200 OK", &[("ETag", &tag)], CONFIG);
        }
        let location = format!("{store_url}/blob?sig=1");
        let tag = format!("\"{etag}\"");
        reply(
            "302 Found",
            &[
                ("Location", &location),
                ("X-Linked-Etag", &tag),
                ("X-Linked-Size", &size),
            ],
            b"a redirect's body",
        )
    })
}

/// Sends the weights, honouring Range, but at most `most_bytes` at once before it cuts the connection.
fn store_server(most_bytes: usize) -> Server {
    Server::start(move |seen| {
        let bytes = weights();
        let range = seen
            .headers
            .get("range")
            .and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let from: usize = range.unwrap_or(0);
        let rest = &bytes[from..];
        let length = rest.len().to_string();
        let content_range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        let status = if range.is_some() {
            "206 Partial Content"
        } else {
            "200 OK"
        };
        let headers = [
            ("Content-Length", length.as_str()),
            ("Content-Range", content_range.as_str()),
        ];
        reply(status, &headers, &rest[..rest.len().min(most_bytes)])
    })
}

#[test]
fn a_cut_download_resumes_and_lands_in_the_standard_layout() {
    let store = store_server(150_000);
    let server = hub_server(store.url.clone(), sha256(&weights()));
    let cache = tempfile::tempdir().unwrap();
    let directory = hub(&server.url, cache.path())
        .snapshot("org/m", "main", &everything())
        .unwrap();

    assert_eq!(directory, cache.path().join("models--org--m/snapshots").join(COMMIT));
    assert_eq!(std::fs::read(directory.join("model.safetensors")).unwrap(), weights());
    assert_eq!(std::fs::read(directory.join("config.json")).unwrap(), CONFIG);
    assert!(!directory.join("README.md").exists());
    let link = std::fs::read_link(directory.join("config.json")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(git_sha1(CONFIG)));
    let reference = std::fs::read_to_string(cache.path().join("models--org--m/refs/main")).unwrap();
    assert_eq!(reference, COMMIT);
    let ranges: Vec<_> = store
        .requests("GET")
        .iter()
        .map(|s| s.headers.get("range").cloned())
        .collect();
    assert_eq!(
        ranges,
        [None, Some("bytes=150000-".into()), Some("bytes=300000-".into())]
    );
}

#[test]
fn the_token_stays_with_the_hub() {
    let store = store_server(usize::MAX);
    let server = hub_server(store.url.clone(), sha256(&weights()));
    let cache = tempfile::tempdir().unwrap();
    hub(&server.url, cache.path())
        .snapshot("org/m", "main", &everything())
        .unwrap();
    let hub_requests = server.requests("");
    assert!(
        hub_requests
            .iter()
            .all(|s| s.headers["authorization"] == "Bearer secret")
    );
    assert!(!store.requests("GET").is_empty());
    assert!(
        store
            .requests("")
            .iter()
            .all(|s| !s.headers.contains_key("authorization"))
    );
}

#[test]
fn what_an_earlier_run_left_is_continued() {
    let store = store_server(usize::MAX);
    let etag = sha256(&weights());
    let server = hub_server(store.url.clone(), etag.clone());
    let cache = tempfile::tempdir().unwrap();
    let blobs = cache.path().join("models--org--m/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{etag}.incomplete")), &weights()[..1000]).unwrap();
    let hub = hub(&server.url, cache.path());
    hub.snapshot("org/m", "main", &everything()).unwrap();
    assert_eq!(store.requests("GET")[0].headers["range"], "bytes=1000-");
    assert!(!blobs.join(format!("{etag}.incomplete")).exists());
}

#[test]
fn a_damaged_partial_file_is_replaced() {
    let store = store_server(usize::MAX);
    let etag = sha256(&weights());
    let server = hub_server(store.url.clone(), etag.clone());
    let cache = tempfile::tempdir().unwrap();
    let blobs = cache.path().join("models--org--m/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{etag}.incomplete")), [7; 1000]).unwrap();
    let directory = hub(&server.url, cache.path())
        .snapshot("org/m", "main", &everything())
        .unwrap();
    assert_eq!(std::fs::read(directory.join("model.safetensors")).unwrap(), weights());
    assert_eq!(store.requests("GET").len(), 2);
}

#[test]
fn a_wrong_hash_is_refused_and_nothing_is_kept() {
    let store = store_server(usize::MAX);
    let wrong = sha256(b"other bytes");
    let server = hub_server(store.url.clone(), wrong.clone());
    let cache = tempfile::tempdir().unwrap();
    let error = hub(&server.url, cache.path())
        .snapshot("org/m", "main", &everything())
        .unwrap_err();
    assert!(
        matches!(&error, HubError::WrongHash { file, expected, .. } if file == "model.safetensors" && *expected == wrong)
    );
    let blobs = cache.path().join("models--org--m/blobs");
    assert!(!blobs.join(&wrong).exists() && !blobs.join(format!("{wrong}.incomplete")).exists());
    assert!(!cache.path().join("models--org--m/refs/main").exists());
}

#[test]
fn a_complete_cache_needs_no_hub() {
    let store = store_server(usize::MAX);
    let server = hub_server(store.url.clone(), sha256(&weights()));
    let cache = tempfile::tempdir().unwrap();
    let first = hub(&server.url, cache.path())
        .snapshot("org/m", "main", &everything())
        .unwrap();
    let asked = server.requests("").len();

    // A commit is what it is; a branch costs one question and no file.
    assert_eq!(
        hub(&server.url, cache.path())
            .snapshot("org/m", COMMIT, &everything())
            .unwrap(),
        first
    );
    assert_eq!(server.requests("").len(), asked);
    assert_eq!(
        hub(&server.url, cache.path())
            .snapshot("org/m", "main", &everything())
            .unwrap(),
        first
    );
    assert_eq!(server.requests("").len(), asked + 1);

    // Nobody listens on this port.
    let nowhere = "http://127.0.0.1:1";
    let offline = Hub::new(HubSettings {
        offline: true,
        ..settings(nowhere, cache.path())
    });
    assert_eq!(offline.snapshot("org/m", "main", &everything()).unwrap(), first);
    assert_eq!(
        hub(nowhere, cache.path())
            .snapshot("org/m", "main", &everything())
            .unwrap(),
        first
    );

    let error = offline.snapshot("org/other", "main", &everything()).unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }), "{error}");
    std::fs::remove_file(first.join("model.safetensors")).unwrap();
    let error = offline.snapshot("org/m", "main", &everything()).unwrap_err();
    assert!(
        matches!(&error, HubError::Incomplete { file, .. } if file == "model.safetensors"),
        "{error}"
    );
    let error = hub(nowhere, cache.path())
        .snapshot("org/m", "main", &everything())
        .unwrap_err();
    assert!(matches!(error, HubError::Network { .. }), "{error}");
}

#[test]
fn refusals_say_what_to_do() {
    for (status, code, expected) in [
        ("403 Forbidden", Some("GatedRepo"), "is gated: accept its conditions"),
        ("401 Unauthorized", Some("RepoNotFound"), "does not exist on"),
        ("404 Not Found", Some("RevisionNotFound"), "has no revision 'v9'"),
        ("404 Not Found", None, "does not exist on"),
        ("403 Forbidden", None, "refuses access to org/m (403)"),
    ] {
        let server = Server::start(move |_| match code {
            Some(code) => reply(status, &[("X-Error-Code", code)], b"{}"),
            None => reply(status, &[], b"{}"),
        });
        let cache = tempfile::tempdir().unwrap();
        let error = hub(&server.url, cache.path())
            .snapshot("org/m", "v9", &everything())
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{status} {code:?}: {error}");
        assert_eq!(server.requests("").len(), 1, "a refusal is not retried");
    }
}

#[test]
fn busy_hubs_are_asked_again() {
    let count = Arc::new(AtomicUsize::new(0));
    let server = Server::start(move |_| match count.fetch_add(1, Ordering::Relaxed) {
        0 | 1 => reply("503 Service Unavailable", &[], b""),
        _ => listing(&[]),
    });
    let cache = tempfile::tempdir().unwrap();
    hub(&server.url, cache.path())
        .snapshot("org/m", "main", &everything())
        .unwrap();
    assert_eq!(server.requests("").len(), 3);
}

#[test]
fn names_that_leave_the_cache_are_refused() {
    let cache = tempfile::tempdir().unwrap();
    for name in ["../x.safetensors", "/etc/x.safetensors", "a/../../x", "a\\..\\x", ""] {
        let server = Server::start(move |_| listing(&["config.json", name]));
        let error = hub(&server.url, cache.path())
            .snapshot("org/m", "main", &everything())
            .unwrap_err();
        assert!(matches!(error, HubError::UnsafeName { .. }), "{name}: {error}");
    }
    let hub = hub("http://127.0.0.1:1", cache.path());
    for repo in ["../m", "a/b/c", "a/..", "a--b/c", "", "a b", "a/b?"] {
        let error = hub.snapshot(repo, "main", &everything()).unwrap_err();
        assert!(matches!(error, HubError::InvalidRepo(_)), "{repo}");
    }
    for revision in ["../main", "/main", "a/../b", ""] {
        let error = hub.snapshot("a/b", revision, &everything()).unwrap_err();
        assert!(matches!(error, HubError::InvalidRevision(_)), "{revision}");
    }
}

#[test]
fn an_etag_that_is_no_file_name_is_refused() {
    let server = Server::start(|seen| {
        if seen.line.contains("/api/") {
            listing(&["config.json"])
        } else {
            reply("200 OK", &[("ETag", "\"../../x\"")], b"{}")
        }
    });
    let cache = tempfile::tempdir().unwrap();
    let error = hub(&server.url, cache.path())
        .snapshot("org/m", "main", &everything())
        .unwrap_err();
    assert!(error.to_string().contains("the ETag is no file name"), "{error}");
}

#[test]
fn debug_output_has_no_token() {
    let text = format!("{:?}", settings("http://x", Path::new("/c")));
    assert!(!text.contains("secret"), "{text}");
}
