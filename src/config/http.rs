//! How the server is reached: the socket, TLS, and what one connection may send.

use std::path::PathBuf;

use super::args::HttpArgs;
use super::environment::Environment;
use super::resolve::{ConfigError, not_negative, positive};

/// Least bytes that a request's head may have; below them no real client gets through.
const MIN_HEAD_BYTES: usize = 8192;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpConfig {
    /// A Unix socket in place of host and port.
    pub uds: Option<PathBuf>,
    /// None = plain HTTP.
    pub tls: Option<TlsConfig>,
    pub limits: HttpLimits,
}

/// What one connection may send, and for how long it may be silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpLimits {
    /// Bytes of one request's line and headers.
    pub max_head_bytes: usize,
    pub max_headers: usize,
    /// Idle seconds after which a connection is closed, which is also what a head may take to arrive; 0 = one request
    /// per connection.
    pub keep_alive_s: u64,
}

impl Default for HttpLimits {
    /// vLLM's.
    fn default() -> Self {
        Self {
            max_head_bytes: 4 << 20,
            max_headers: 256,
            keep_alive_s: 5,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// PEM: the server's certificate, then what leads to its root.
    pub cert_file: PathBuf,
    /// PEM, not encrypted; the same file as `cert_file` where no other was named.
    pub key_file: PathBuf,
    /// PEM: whom client certificates must come from.
    pub ca_file: Option<PathBuf>,
    pub client_certs: ClientCerts,
    /// In OpenSSL's notation.
    pub ciphers: Option<String>,
    /// Files are read again when they change.
    pub refresh: bool,
}

/// `--ssl-cert-reqs`, by Python's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientCerts {
    /// 0: not asked for.
    None,
    /// 1: checked when one is sent.
    Optional,
    /// 2: no connection without one.
    Required,
}

/// # Errors
/// A limit is out of range, or TLS flags do not fit together.
pub fn resolve(args: &HttpArgs, env: &Environment) -> Result<HttpConfig, ConfigError> {
    let head_flag = "--h11-max-incomplete-event-size";
    let max_head_bytes = positive(head_flag, args.h11_max_incomplete_event_size)?;
    if max_head_bytes < MIN_HEAD_BYTES {
        let message = format!("{max_head_bytes} is less than {MIN_HEAD_BYTES} bytes");
        return Err(ConfigError::new(head_flag, message));
    }
    let defaults = HttpLimits::default();
    Ok(HttpConfig {
        uds: args.uds.as_deref().filter(|path| !path.is_empty()).map(PathBuf::from),
        tls: tls(args)?,
        limits: HttpLimits {
            max_head_bytes,
            max_headers: positive("--h11-max-header-count", args.h11_max_header_count)?,
            keep_alive_s: match env.parsed::<i64>("VLLM_HTTP_TIMEOUT_KEEP_ALIVE")? {
                Some(seconds) => not_negative("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", seconds)?,
                None => defaults.keep_alive_s,
            },
        },
    })
}

fn tls(args: &HttpArgs) -> Result<Option<TlsConfig>, ConfigError> {
    let path = |path: &Option<String>| path.as_deref().filter(|path| !path.is_empty()).map(PathBuf::from);
    let Some(cert_file) = path(&args.ssl_certfile) else {
        let needs_it = [
            ("--ssl-keyfile", args.ssl_keyfile.is_some()),
            ("--ssl-ca-certs", args.ssl_ca_certs.is_some()),
            ("--ssl-cert-reqs", args.ssl_cert_reqs != 0),
            ("--ssl-ciphers", args.ssl_ciphers.is_some()),
            ("--enable-ssl-refresh", args.enable_ssl_refresh),
        ];
        return match needs_it.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(ConfigError::new(*flag, "needs --ssl-certfile")),
            None => Ok(None),
        };
    };
    let client_certs = match args.ssl_cert_reqs {
        0 => ClientCerts::None,
        1 => ClientCerts::Optional,
        2 => ClientCerts::Required,
        other => {
            let message = format!("{other} is not 0 (none), 1 (optional) or 2 (required)");
            return Err(ConfigError::new("--ssl-cert-reqs", message));
        }
    };
    let ca_file = path(&args.ssl_ca_certs);
    if client_certs != ClientCerts::None && ca_file.is_none() {
        return Err(ConfigError::new("--ssl-cert-reqs", "needs --ssl-ca-certs"));
    }
    Ok(Some(TlsConfig {
        key_file: path(&args.ssl_keyfile).unwrap_or_else(|| cert_file.clone()),
        cert_file,
        ca_file,
        client_certs,
        ciphers: args.ssl_ciphers.clone().filter(|ciphers| !ciphers.is_empty()),
        refresh: args.enable_ssl_refresh,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> HttpArgs {
        HttpArgs {
            uds: None,
            ssl_keyfile: None,
            ssl_certfile: None,
            ssl_ca_certs: None,
            enable_ssl_refresh: false,
            ssl_cert_reqs: 0,
            ssl_ciphers: None,
            h11_max_incomplete_event_size: 4_194_304,
            h11_max_header_count: 256,
        }
    }

    fn refused(args: HttpArgs) -> String {
        resolve(&args, &Environment::default()).unwrap_err().parameter
    }

    #[test]
    fn the_defaults_are_vllms() {
        assert_eq!(
            resolve(&args(), &Environment::default()).unwrap(),
            HttpConfig::default()
        );
    }

    #[test]
    fn one_file_may_hold_certificate_and_key() {
        let given = HttpArgs {
            ssl_certfile: Some("both.pem".into()),
            ..args()
        };
        let tls = resolve(&given, &Environment::default()).unwrap().tls.unwrap();
        assert_eq!(tls.key_file, tls.cert_file);
        assert_eq!(tls.client_certs, ClientCerts::None);
    }

    #[test]
    fn flags_that_do_not_fit_together_are_named() {
        let cert = Some("c.pem".to_owned());
        for (given, flag) in [
            (
                HttpArgs {
                    ssl_keyfile: cert.clone(),
                    ..args()
                },
                "--ssl-keyfile",
            ),
            (
                HttpArgs {
                    enable_ssl_refresh: true,
                    ..args()
                },
                "--enable-ssl-refresh",
            ),
            (
                HttpArgs {
                    ssl_certfile: cert.clone(),
                    ssl_cert_reqs: 3,
                    ..args()
                },
                "--ssl-cert-reqs",
            ),
            (
                HttpArgs {
                    ssl_certfile: cert.clone(),
                    ssl_cert_reqs: 2,
                    ..args()
                },
                "--ssl-cert-reqs",
            ),
            (
                HttpArgs {
                    h11_max_header_count: 0,
                    ..args()
                },
                "--h11-max-header-count",
            ),
            (
                HttpArgs {
                    h11_max_incomplete_event_size: 10,
                    ..args()
                },
                "--h11-max-incomplete-event-size",
            ),
        ] {
            assert_eq!(refused(given), flag);
        }
        let env: Environment = [("VLLM_HTTP_TIMEOUT_KEEP_ALIVE".to_owned(), "-1".to_owned())]
            .into_iter()
            .collect();
        assert_eq!(
            resolve(&args(), &env).unwrap_err().parameter,
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
        );
    }
}
