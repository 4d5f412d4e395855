//! TLS on accepted connections: certificates from PEM files, client certificates, and a reload when the files change.
//!
//! rustls with the `ring` provider, the one that model downloads use too. TLS 1.2 and 1.3; HTTP/1.1 by ALPN.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoClientAuth, WebPkiClientVerifier, danger::ClientCertVerifier};
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use super::ciphers;
use crate::config::http::{ClientCerts, TlsConfig};

/// How often the files are looked at. A poll sees every kind of change, also of a mounted secret, whose links are swapped.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// TLS cannot be set up; the message names the flag and the file.
#[derive(Debug, thiserror::Error)]
#[error("{flag}: {message}")]
pub struct TlsError {
    flag: &'static str,
    message: String,
}

/// The certificates in use.
#[derive(Debug)]
pub struct Tls {
    config: TlsConfig,
    current: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// A file cannot be read, holds no such thing, or the key does not belong to the certificate.
    pub fn load(config: TlsConfig) -> Result<Self, TlsError> {
        let current = RwLock::new(Arc::new(server_config(&config)?));
        Ok(Self { config, current })
    }

    /// For the next connection.
    pub fn acceptor(&self) -> TlsAcceptor {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        TlsAcceptor::from(current.clone())
    }

    /// `--enable-ssl-refresh`: takes over changed files for new connections, for ever; returns at once without the flag. Files
    /// that do not load, half written perhaps, change nothing.
    pub async fn refresh(self: Arc<Self>) {
        if !self.config.refresh {
            return;
        }
        let mut seen = fingerprints(&self.config);
        loop {
            tokio::time::sleep(REFRESH_INTERVAL).await;
            let now = fingerprints(&self.config);
            if now == seen {
                continue;
            }
            match server_config(&self.config) {
                Ok(fresh) => {
                    *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
                    tracing::info!("the TLS certificate was reloaded");
                }
                Err(error) => tracing::warn!("the changed TLS files are not used: {error}"),
            }
            seen = now;
        }
    }
}

fn paths(config: &TlsConfig) -> impl Iterator<Item = &PathBuf> {
    [Some(&config.cert_file), Some(&config.key_file), config.ca_file.as_ref()]
        .into_iter()
        .flatten()
}

/// What changes when a file does: its inode, its time, its size. None where it cannot be looked at.
fn fingerprints(config: &TlsConfig) -> Vec<Option<(u64, i64, i64, u64)>> {
    let of = |path: &PathBuf| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len()))
    };
    paths(config).map(of).collect()
}

fn server_config(config: &TlsConfig) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(CryptoProvider {
        cipher_suites: cipher_suites(config)?,
        ..ring::default_provider()
    });
    let chain = certificates("--ssl-certfile", &config.cert_file)?;
    let key_error = |error: &dyn std::fmt::Display| TlsError {
        flag: "--ssl-keyfile",
        message: format!(
            "{}: no usable private key (it must be PEM and not encrypted): {error}",
            config.key_file.display()
        ),
    };
    let key = PrivateKeyDer::from_pem_file(&config.key_file).map_err(|error| key_error(&error))?;
    let verifier = client_verifier(config, &provider)?;
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError {
            flag: "--ssl-ciphers",
            message: error.to_string(),
        })?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| key_error(&error))?;
    server.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(server)
}

fn cipher_suites(config: &TlsConfig) -> Result<Vec<rustls::SupportedCipherSuite>, TlsError> {
    let Some(text) = &config.ciphers else {
        return Ok(ring::DEFAULT_CIPHER_SUITES.to_vec());
    };
    let choice = ciphers::choose(text);
    if !choice.unknown.is_empty() {
        tracing::warn!("--ssl-ciphers: not available: {}", choice.unknown.join(", "));
    }
    if choice.suites.is_empty() {
        return Err(TlsError {
            flag: "--ssl-ciphers",
            message: format!("'{text}' selects none of {}", ciphers::NAMES.join(":")),
        });
    }
    // As with OpenSSL, the list does not touch TLS 1.3.
    let chosen =
        |suite: &&rustls::SupportedCipherSuite| suite.tls13().is_some() || choice.suites.contains(&suite.suite());
    Ok(ring::DEFAULT_CIPHER_SUITES.iter().filter(chosen).copied().collect())
}

fn client_verifier(
    config: &TlsConfig,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let flag = "--ssl-ca-certs";
    let (Some(ca_file), ClientCerts::Optional | ClientCerts::Required) = (&config.ca_file, config.client_certs) else {
        return Ok(Arc::new(NoClientAuth));
    };
    let fail = |error: &dyn std::fmt::Display| TlsError {
        flag,
        message: format!("{}: {error}", ca_file.display()),
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(flag, ca_file)? {
        roots.add(certificate).map_err(|error| fail(&error))?;
    }
    let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    if config.client_certs == ClientCerts::Optional {
        builder = builder.allow_unauthenticated();
    }
    builder.build().map_err(|error| fail(&error))
}

/// All certificates of a PEM file, at least one.
fn certificates(flag: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fail = |error: &dyn std::fmt::Display| TlsError {
        flag,
        message: format!("{}: {error}", path.display()),
    };
    let found = CertificateDer::pem_file_iter(path)
        .map_err(|error| fail(&error))?
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| fail(&error))?;
    if found.is_empty() {
        return Err(fail(&"there is no PEM certificate in it"));
    }
    Ok(found)
}
