//! The cache's layout, shared with `huggingface_hub`.

use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use super::HubError;

/// The part of the cache that belongs to one repository.
pub struct RepoCache {
    /// `<cache>/models--org--name`.
    root: PathBuf,
    /// `<cache>/.locks/models--org--name`.
    locks: PathBuf,
}

impl RepoCache {
    pub fn new(cache_dir: &Path, repo: &str) -> Self {
        let folder = format!("models--{}", repo.replace('/', "--"));
        Self {
            root: cache_dir.join(&folder),
            locks: cache_dir.join(".locks").join(folder),
        }
    }

    pub fn snapshot_dir(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The cached snapshot of a branch, tag or commit.
    pub fn snapshot(&self, revision: &str) -> Option<PathBuf> {
        let named = fs::read_to_string(self.root.join("refs").join(revision)).ok();
        let commit = named.as_deref().map_or(revision, str::trim);
        Some(commit)
            .filter(|commit| is_commit(commit))
            .map(|c| self.snapshot_dir(c))
            .filter(|d| d.is_dir())
    }

    /// The snapshot has the file, and the link leads to something.
    pub fn has(&self, commit: &str, file: &str) -> bool {
        self.snapshot_dir(commit).join(file).exists()
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    pub fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Waits until no other process downloads this blob. The lock ends when the file is dropped.
    ///
    /// # Errors
    /// The cache is not writable.
    pub fn lock(&self, etag: &str) -> Result<File, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        let lock = || {
            fs::create_dir_all(&self.locks)?;
            fs::create_dir_all(self.root.join("blobs"))?;
            let file = File::options().create(true).write(true).truncate(false).open(&path)?;
            file.lock()?;
            Ok(file)
        };
        lock().map_err(|error| HubError::io(&path, error))
    }

    /// Makes `file` of the snapshot lead to the blob.
    ///
    /// # Errors
    /// The cache is not writable.
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let path = self.snapshot_dir(commit).join(file);
        let up = "../".repeat(2 + Path::new(file).components().count() - 1);
        let target = format!("{up}blobs/{etag}");
        let link = || {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let temporary = path.with_file_name(format!(".{etag}.{}.link", std::process::id()));
            match fs::remove_file(&temporary) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            std::os::unix::fs::symlink(&target, &temporary)?;
            fs::rename(&temporary, &path)
        };
        link().map_err(|error| HubError::io(&path, error))
    }

    /// Remembers which commit a branch or tag is.
    ///
    /// # Errors
    /// The cache is not writable.
    pub fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        if fs::read_to_string(&path).is_ok_and(|known| known == commit) {
            return Ok(());
        }
        let write = || {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&path, commit)
        };
        write().map_err(|error| HubError::io(&path, error))
    }
}

/// A full commit hash.
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A relative path that stays below where it starts.
pub fn is_safe_path(path: &str) -> bool {
    let plain = |component: Component<'_>| matches!(component, Component::Normal(_));
    !path.is_empty()
        && !path.contains(['\\', '\0'])
        && !path.split('/').any(|part| part.is_empty() || part == ".")
        && Path::new(path).components().all(plain)
}
