//! Checkpoints from the Hugging Face hub, in its standard cache layout.
//!
//! [`Hub::snapshot`] turns a repository's name into a directory. A volume shared with vLLM or any `huggingface_hub` client
//! works both ways: `models--org--name/{blobs,refs,snapshots/<commit>}` with relative links, partial files under
//! `<blob>.incomplete`, locks under `.locks/`.
//!
//! Downloads resume where they were cut off and every file is compared with the hash the hub names for it. The token is
//! sent to the hub alone, never to the hosts it redirects to.

mod cache;
mod progress;
mod select;
mod transfer;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde::Deserialize;
use tracing::{info, warn};

pub use select::Selection;

use cache::RepoCache;
use progress::Progress;
use transfer::Client;

/// Files that are downloaded at once.
const PARALLEL_DOWNLOADS: usize = 4;

/// Where models come from and where they are kept.
#[derive(Clone)]
pub struct HubSettings {
    /// Without a trailing slash.
    pub endpoint: String,
    pub token: Option<String>,
    /// The directory that holds `models--…`.
    pub cache_dir: PathBuf,
    /// Use the cache alone.
    pub offline: bool,
    /// Pause before the first retry; doubles each time.
    pub retry_pause: Duration,
    pub timeout: Duration,
}

impl std::fmt::Debug for HubSettings {
    /// Leaves the token out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            endpoint,
            cache_dir,
            offline,
            ..
        } = self;
        f.debug_struct("HubSettings")
            .field("endpoint", endpoint)
            .field("cache_dir", cache_dir)
            .field("offline", offline)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("'{0}' is no hub id (organisation/name) and no directory")]
    InvalidRepo(String),
    #[error("'{0}' is no revision")]
    InvalidRevision(String),
    #[error(
        "{repo} does not exist on {endpoint}, or is private and the token (HF_TOKEN, --hf-token) gives no access to it"
    )]
    RepoNotFound { repo: String, endpoint: String },
    #[error("{repo} has no revision '{revision}'")]
    RevisionNotFound { repo: String, revision: String },
    #[error("{repo} is gated: accept its conditions on {endpoint}/{repo} and set HF_TOKEN or --hf-token")]
    Gated { repo: String, endpoint: String },
    #[error("{endpoint} refuses access to {repo} ({status}); check HF_TOKEN or --hf-token")]
    Refused {
        repo: String,
        endpoint: String,
        status: u16,
    },
    #[error("{repo} at '{revision}' is not in the cache ({}) and HF_HUB_OFFLINE is set", cache_dir.display())]
    Offline {
        repo: String,
        revision: String,
        cache_dir: PathBuf,
    },
    #[error("{repo}: the cached snapshot lacks {file}, and HF_HUB_OFFLINE is set")]
    Incomplete { repo: String, file: String },
    #[error("{url}: {message}")]
    Network { url: String, message: String },
    #[error("{url}: the hub answered with status {status}")]
    Status { url: String, status: u16 },
    #[error("{file}: the download has the hash {actual}, the hub says {expected}; it was discarded")]
    WrongHash {
        file: String,
        expected: String,
        actual: String,
    },
    #[error("{file}: {actual} bytes came, the hub says {expected}; it was discarded")]
    WrongSize { file: String, expected: u64, actual: u64 },
    #[error("{repo} lists a file name that leaves its directory: {file:?}")]
    UnsafeName { repo: String, file: String },
    #[error("{url}: {message}")]
    Protocol { url: String, message: String },
    #[error("{}: the disk is full; free some space and start again, the download resumes", path.display())]
    DiskFull { path: PathBuf },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

impl HubError {
    fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => HubError::DiskFull { path },
            _ => HubError::Io { path, source },
        }
    }

    /// Another attempt may succeed.
    fn is_transient(&self) -> bool {
        match self {
            HubError::Network { .. } => true,
            HubError::Status { status, .. } => matches!(status, 408 | 429 | 500..=599),
            _ => false,
        }
    }
}

/// `GET /api/models/{repo}/revision/{revision}`, as far as it matters.
#[derive(Debug, Deserialize)]
struct RepoInfo {
    /// The commit.
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

pub struct Hub {
    settings: HubSettings,
    client: Client,
}

impl Hub {
    pub fn new(settings: HubSettings) -> Self {
        let client = Client::new(&settings);
        Self { settings, client }
    }

    /// The directory with the files of `repo` that `selection` wants, downloaded if need be.
    ///
    /// A full commit hash that is cached needs no network. Otherwise the hub is asked what the revision is now; when it
    /// cannot be reached, a complete cached snapshot serves, with a warning.
    ///
    /// # Errors
    /// See [`HubError`]: the user's (names, access), the network's, the disk's.
    pub fn snapshot(&self, repo: &str, revision: &str, selection: &Selection) -> Result<PathBuf, HubError> {
        if !is_repo_id(repo) {
            return Err(HubError::InvalidRepo(repo.to_owned()));
        }
        if !cache::is_safe_path(revision) {
            return Err(HubError::InvalidRevision(revision.to_owned()));
        }
        let cache = RepoCache::new(&self.settings.cache_dir, repo);
        let cached = cache.snapshot(revision);
        let missing = cached.as_ref().map(|directory| selection.missing(directory));
        if self.settings.offline {
            return match (cached, missing.flatten()) {
                (Some(directory), None) => Ok(directory),
                (Some(_), Some(file)) => Err(HubError::Incomplete {
                    repo: repo.to_owned(),
                    file,
                }),
                (None, _) => Err(HubError::Offline {
                    repo: repo.to_owned(),
                    revision: revision.to_owned(),
                    cache_dir: self.settings.cache_dir.clone(),
                }),
            };
        }
        let complete = cached.filter(|_| missing == Some(None));
        if let Some(directory) = complete.clone().filter(|_| cache::is_commit(revision)) {
            return Ok(directory);
        }
        match (self.download(repo, revision, selection, &cache), complete) {
            (Err(error), Some(directory)) if error.is_transient() => {
                warn!("{error}; using the cached {}", directory.display());
                Ok(directory)
            }
            (result, _) => result,
        }
    }

    fn download(
        &self,
        repo: &str,
        revision: &str,
        selection: &Selection,
        cache: &RepoCache,
    ) -> Result<PathBuf, HubError> {
        let info: RepoInfo = self.client.repo_info(repo, revision)?;
        if !cache::is_commit(&info.sha) {
            let message = format!("the hub names the commit '{}'", info.sha);
            return Err(HubError::Protocol {
                url: self.settings.endpoint.clone(),
                message,
            });
        }
        let names: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
        if let Some(file) = names.iter().find(|name| !cache::is_safe_path(name)) {
            return Err(HubError::UnsafeName {
                repo: repo.to_owned(),
                file: file.clone(),
            });
        }
        let files = selection.choose(&names);
        let wanted: Vec<&String> = files.iter().filter(|name| !cache.has(&info.sha, name)).collect();
        if !wanted.is_empty() {
            info!(
                "downloading {} of {} files of {repo} at {}",
                wanted.len(),
                files.len(),
                info.sha
            );
            self.fetch_all(repo, &info.sha, &wanted, cache)?;
        }
        cache.write_ref(revision, &info.sha)?;
        Ok(cache.snapshot_dir(&info.sha))
    }

    /// Downloads `files` on a few threads. The first error stops the rest.
    fn fetch_all(&self, repo: &str, commit: &str, files: &[&String], cache: &RepoCache) -> Result<(), HubError> {
        let progress = Progress::new();
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let first_error = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..PARALLEL_DOWNLOADS.min(files.len()) {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) else {
                            return;
                        };
                        if let Err(error) = self.client.fetch(repo, commit, file, cache, &progress, &stop) {
                            stop.store(true, Ordering::Relaxed);
                            first_error
                                .lock()
                                .unwrap_or_else(|e| e.into_inner())
                                .get_or_insert(error);
                        }
                    }
                });
            }
        });
        match first_error.into_inner().unwrap_or_else(|e| e.into_inner()) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// `name` or `organisation/name` in the hub's alphabet.
fn is_repo_id(repo: &str) -> bool {
    let part = |p: &str| {
        let alphabet = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !p.is_empty()
            && p.len() <= 96
            && p.chars().all(alphabet)
            && !p.starts_with(['.', '-'])
            && !p.ends_with(['.', '-'])
    };
    let parts: Vec<&str> = repo.split('/').collect();
    parts.len() <= 2 && parts.iter().all(|p| part(p)) && !repo.contains("--") && !repo.contains("..")
}
