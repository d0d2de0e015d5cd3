//! Where the collector is.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use http::HeaderValue;
use http::uri::{InvalidUri, PathAndQuery};
use serde::{Serialize, Serializer};
use thiserror::Error;
use url::{Host, Url};

/// The URL that spans are posted to, on this machine, such as `http://127.0.0.1:4318/v1/traces`.
///
/// Spans name paths and peers, so they leave the machine through no door but the mesh's own: for a collector
/// elsewhere, this is the address at which this machine's sidecar takes calls to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    url: Url,
    pub(super) address: SocketAddr,
    pub(super) host: HeaderValue,
    pub(super) target: PathAndQuery,
}

/// Why a text is no [`Endpoint`].
#[derive(Debug, Error)]
pub enum EndpointError {
    /// Not a URL.
    #[error("it is no URL: {0}")]
    Url(#[from] url::ParseError),
    /// Not `http`.
    #[error("it does not start with http://")]
    Scheme,
    /// Another machine.
    #[error("it is not on this machine: its host is neither a loopback address nor localhost")]
    NotLocal,
    /// A user, a password or a fragment, which mean nothing here.
    #[error("it holds more than host, port and path")]
    Surplus,
    /// Not sendable.
    #[error("its path cannot be asked for: {0}")]
    Target(#[from] InvalidUri),
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let url = Url::parse(text)?;
        if url.scheme() != "http" {
            return Err(EndpointError::Scheme);
        }
        if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
            return Err(EndpointError::Surplus);
        }
        let ip = match url.host() {
            Some(Host::Ipv4(ip)) => IpAddr::V4(ip),
            Some(Host::Ipv6(ip)) => IpAddr::V6(ip),
            Some(Host::Domain("localhost")) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Some(Host::Domain(_)) | None => return Err(EndpointError::NotLocal),
        };
        if !ip.is_loopback() {
            return Err(EndpointError::NotLocal);
        }
        let host = HeaderValue::try_from(url.authority()).map_err(|_| EndpointError::NotLocal)?;
        let address = SocketAddr::new(ip, url.port_or_known_default().ok_or(EndpointError::Scheme)?);
        let target = match url.query() {
            Some(query) => PathAndQuery::try_from(format!("{}?{query}", url.path()))?,
            None => PathAndQuery::try_from(url.path())?,
        };
        Ok(Self { address, host, target, url })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.url.fmt(f)
    }
}

impl Serialize for Endpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn collectors_on_this_machine_are_read() {
        for (text, address, host, target) in [
            ("http://127.0.0.1:4318/v1/traces", "127.0.0.1:4318", "127.0.0.1:4318", "/v1/traces"),
            ("http://localhost:4318/v1/traces", "127.0.0.1:4318", "localhost:4318", "/v1/traces"),
            ("http://[::1]:4318/v1/traces?tenant=a", "[::1]:4318", "[::1]:4318", "/v1/traces?tenant=a"),
            ("http://127.0.0.1", "127.0.0.1:80", "127.0.0.1", "/"),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.address.to_string(), address);
            assert_eq!(endpoint.host, host);
            assert_eq!(endpoint.target, target);
        }
    }

    #[test]
    fn other_places_are_refused() {
        for (text, why) in [
            ("127.0.0.1:4318", "it is no URL"),
            ("https://127.0.0.1:4318/v1/traces", "it does not start with http://"),
            ("http://10.0.0.7:4318/v1/traces", "not on this machine"),
            ("http://collector:4318/v1/traces", "not on this machine"),
            ("http://localhost.example:4318/", "not on this machine"),
            ("http://0.0.0.0:4318/", "not on this machine"),
            ("http://user@127.0.0.1:4318/v1/traces", "more than"),
            ("http://127.0.0.1:4318/v1/traces#a", "more than"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
