//! Where a batch comes from and where its answers go: files, or http(s) URLs.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use uuid::Uuid;

/// How often an upload is tried, and the pause between.
const UPLOAD_ATTEMPTS: u32 = 5;
const UPLOAD_PAUSE: Duration = Duration::from_secs(5);

fn is_url(name: &str) -> bool {
    name.starts_with("http://") || name.starts_with("https://")
}

/// Opens the input for reading, line by line.
///
/// # Errors
/// The file cannot be read, or the server does not give it.
pub fn open_input(name: &str) -> anyhow::Result<Box<dyn BufRead>> {
    let failed = || format!("--input-file {name}");
    if is_url(name) {
        let response = ureq::get(name).call().with_context(failed)?;
        return Ok(Box::new(BufReader::new(response.into_body().into_reader())));
    }
    Ok(Box::new(BufReader::new(File::open(name).with_context(failed)?)))
}

/// The answers' file.
pub struct Output {
    file: BufWriter<File>,
    path: PathBuf,
    /// Where the file goes when it is complete.
    upload_to: Option<String>,
}

impl Output {
    /// Creates the file; for a URL a temporary one in `tmp_dir`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(name: &str, tmp_dir: Option<&str>) -> anyhow::Result<Self> {
        let upload_to = is_url(name).then(|| name.to_owned());
        let path = match &upload_to {
            None => PathBuf::from(name),
            Some(_) => {
                let directory = tmp_dir.map_or_else(std::env::temp_dir, PathBuf::from);
                directory.join(format!("tmp_batch_output_{}.jsonl", Uuid::new_v4().simple()))
            }
        };
        let file = File::create(&path).with_context(|| format!("--output-file: {}", path.display()))?;
        Ok(Self {
            file: BufWriter::new(file),
            path,
            upload_to,
        })
    }

    /// Completes the file, and uploads it if it is to be.
    ///
    /// # Errors
    /// The disk is full, or the upload failed; the temporary file is kept then, and the message names it.
    pub fn finish(mut self) -> anyhow::Result<()> {
        self.file.flush().context("--output-file")?;
        let Some(url) = &self.upload_to else { return Ok(()) };
        tracing::info!("Uploading outputs to {url}");
        upload(url, &self.path, UPLOAD_PAUSE)
            .with_context(|| format!("--output-file {url}; the answers are kept in {}", self.path.display()))?;
        let _ = std::fs::remove_file(&self.path);
        Ok(())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

fn upload(url: &str, path: &Path, pause: Duration) -> anyhow::Result<()> {
    let mut attempt = 1;
    loop {
        match ureq::put(url).send(File::open(path)?) {
            Ok(_) => return Ok(()),
            Err(error) if attempt < UPLOAD_ATTEMPTS => {
                tracing::error!(
                    "upload failed (attempt {attempt}): {error}; again in {} s",
                    pause.as_secs()
                );
                std::thread::sleep(pause);
                attempt += 1;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    /// Answers one request after the other; returns what was sent.
    fn server(replies: Vec<&'static str>) -> (String, std::thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/batch.jsonl", listener.local_addr().unwrap());
        let thread = std::thread::spawn(move || {
            let answer = |reply: &str| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut seen = Vec::new();
                let mut buffer = [0; 4096];
                // The bodies of these tests end with this word; a GET has none.
                while !(seen.ends_with(b"end\n") || seen.starts_with(b"GET") && seen.ends_with(b"\r\n\r\n")) {
                    let count = stream.read(&mut buffer).unwrap();
                    assert!(count > 0, "the request ended early");
                    seen.extend_from_slice(&buffer[..count]);
                }
                stream.write_all(reply.as_bytes()).unwrap();
                String::from_utf8(seen).unwrap()
            };
            replies.into_iter().map(answer).collect()
        });
        (url, thread)
    }

    #[test]
    fn a_batch_can_be_fetched() {
        let (url, thread) = server(vec![
            "HTTP/1.1 200 OK\r\ncontent-length: 8\r\nconnection: close\r\n\r\none\ntwo\n",
        ]);
        let lines: Vec<String> = open_input(&url).unwrap().lines().map(Result::unwrap).collect();
        assert_eq!(lines, ["one", "two"]);
        assert!(thread.join().unwrap()[0].starts_with("GET /batch.jsonl "));
    }

    #[test]
    fn an_upload_is_tried_again() {
        let failure = "HTTP/1.1 503 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        let success = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        let (url, thread) = server(vec![failure, success]);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out.jsonl");
        std::fs::write(&path, "answers\nend\n").unwrap();
        upload(&url, &path, Duration::ZERO).unwrap();
        let seen = thread.join().unwrap();
        assert_eq!(seen.len(), 2);
        assert!(
            seen[1].starts_with("PUT /batch.jsonl ") && seen[1].ends_with("answers\nend\n"),
            "{seen:?}"
        );
        assert!(seen[1].to_lowercase().contains("content-length: 12"), "{seen:?}");
    }

    #[test]
    fn missing_files_are_named() {
        let message = |error: anyhow::Error| format!("{error:#}");
        assert!(message(open_input("/nowhere/x").err().unwrap()).contains("--input-file /nowhere/x"));
        assert!(message(Output::create("/nowhere/x", None).err().unwrap()).contains("--output-file"));
    }
}
