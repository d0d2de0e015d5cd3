//! A small client of the operator's listener: for the supervisor of a demo, for the command line, for tests.
//! One connection a request, over plain HTTP to a loopback address, and to no other.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::net::TcpStream;

use crate::path::SecretPath;

/// Largest answer read: a body of the largest size and its envelope.
pub const MAX_ANSWER_BYTES: usize = 2 * 1024 * 1024;
/// Time for one request, connecting included.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Why a request got no useful answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The address is not on loopback: a token would cross the network in the clear.
    #[error("{0} is not a loopback address")]
    Address(SocketAddr),
    /// Nobody answers there.
    #[error("the vault at {address} cannot be reached")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The connection broke, or the answer was too large.
    #[error("the connection to the vault broke")]
    Broken,
    /// No answer within [`TIMEOUT`].
    #[error("the vault did not answer within {} s", TIMEOUT.as_secs())]
    Timeout,
    /// The vault refused.
    #[error("the vault answered {status}: {}", errors.join("; "))]
    Refused {
        /// The status code.
        status: StatusCode,
        /// The vault's own words.
        errors: Vec<String>,
    },
    /// The answer is not what the API promises.
    #[error("the vault's answer cannot be understood")]
    Answer,
    /// The token cannot stand in a header, or a request cannot be written.
    #[error("the request cannot be made")]
    Request,
}

/// What making a vault gives out, once.
#[derive(Deserialize)]
pub struct Keys {
    /// The shares of the unseal key, base64.
    #[serde(rename = "keys_base64")]
    pub shares: Vec<SecretString>,
    /// The first root token.
    pub root_token: SecretString,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("shares", &self.shares.len()).finish_non_exhaustive()
    }
}

/// Where a vault stands.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// Whether it has been made.
    pub initialized: bool,
    /// Whether it has no keys in memory.
    pub sealed: bool,
    /// Shares needed.
    #[serde(rename = "t")]
    pub threshold: u8,
    /// Shares given out.
    #[serde(rename = "n")]
    pub shares: u8,
    /// Shares given so far.
    pub progress: u8,
}

/// One version of a secret.
#[derive(Debug, Clone)]
pub struct Secret {
    /// The data, a JSON object, to the letter.
    pub data: Box<RawValue>,
    /// Its version.
    pub version: u64,
}

/// A client of one vault.
#[derive(Clone)]
pub struct Client {
    address: SocketAddr,
    token: Option<SecretString>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Client {
    /// A client without a token: it can make and unseal a vault, and ask how it is.
    pub fn new(address: SocketAddr) -> Result<Self, ClientError> {
        if !address.ip().is_loopback() {
            return Err(ClientError::Address(address));
        }
        Ok(Self { address, token: None })
    }

    /// The same with a token.
    #[must_use]
    pub fn with_token(self, token: SecretString) -> Self {
        Self { token: Some(token), ..self }
    }

    /// Where the vault stands; works on a sealed one.
    pub async fn seal_status(&self) -> Result<Status, ClientError> {
        self.json(Method::GET, "sys/seal-status", None).await
    }

    /// Whether the vault is unsealed and can serve.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with 501 before `init`, 503 while sealed or while nothing can be audited.
    pub async fn health(&self) -> Result<(), ClientError> {
        self.json::<serde::de::IgnoredAny>(Method::GET, "sys/health", None).await.map(drop)
    }

    /// Makes the vault.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with 400 if it has been made already.
    pub async fn init(&self, shares: u8, threshold: u8) -> Result<Keys, ClientError> {
        let body = json!({ "secret_shares": shares, "secret_threshold": threshold });
        self.json(Method::PUT, "sys/init", Some(body.to_string())).await
    }

    /// Gives one share.
    pub async fn unseal(&self, share: &SecretString) -> Result<Status, ClientError> {
        let body = json!({ "key": share.expose_secret() });
        self.json(Method::PUT, "sys/unseal", Some(body.to_string())).await
    }

    /// Reads the current version of a secret; `None` if there is none, or it is deleted.
    pub async fn kv_get(&self, path: &SecretPath) -> Result<Option<Secret>, ClientError> {
        match self.json::<Enveloped<Versioned>>(Method::GET, &format!("secret/data/{path}"), None).await {
            Ok(answer) => Ok(Some(Secret { data: answer.data.data, version: answer.data.metadata.version })),
            Err(ClientError::Refused { status: StatusCode::NOT_FOUND, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a version of a secret and returns its number. `data` is a JSON object; `cas`, if given, must
    /// be the current version, 0 if there is none yet.
    pub async fn kv_put(
        &self,
        path: &SecretPath,
        data: &Value,
        cas: Option<u64>,
    ) -> Result<u64, ClientError> {
        let options = cas.map_or_else(|| json!({}), |cas| json!({ "cas": cas }));
        let body = json!({ "data": data, "options": options });
        let answer: Enveloped<VersionNumber> =
            self.json(Method::PUT, &format!("secret/data/{path}"), Some(body.to_string())).await?;
        Ok(answer.data.version)
    }

    async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<String>,
    ) -> Result<T, ClientError> {
        let exchange = self.exchange(method, path, body);
        let (status, answer) =
            tokio::time::timeout(TIMEOUT, exchange).await.map_err(|_| ClientError::Timeout)??;
        if !status.is_success() {
            let errors = serde_json::from_slice::<Refusal>(&answer).map(|refusal| refusal.errors);
            return Err(ClientError::Refused { status, errors: errors.unwrap_or_default() });
        }
        serde_json::from_slice(&answer).map_err(|_| ClientError::Answer)
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<String>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("/v1/{path}"))
            .header(http::header::HOST, self.address.to_string());
        if let Some(token) = &self.token {
            request = request.header("x-vault-token", token.expose_secret());
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|_| ClientError::Request)?;
        let stream = TcpStream::connect(self.address)
            .await
            .map_err(|source| ClientError::Connect { address: self.address, source })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|_| ClientError::Broken)?;
        let exchange = async move {
            let answer = sender.send_request(request).await.map_err(|_| ClientError::Broken)?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect().await;
            Ok((status, body.map_err(|_| ClientError::Broken)?.to_bytes()))
        };
        // The connection ends once the sender is dropped; if it breaks, the exchange fails with it.
        futures::future::join(exchange, connection).await.0
    }
}

#[derive(Deserialize)]
struct Refusal {
    errors: Vec<String>,
}

#[derive(Deserialize)]
struct Enveloped<T> {
    data: T,
}

#[derive(Deserialize)]
struct VersionNumber {
    version: u64,
}

#[derive(Deserialize)]
struct Versioned {
    data: Box<RawValue>,
    metadata: VersionNumber,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_never_leaves_the_machine() {
        assert!(matches!(Client::new("192.0.2.1:8200".parse().unwrap()), Err(ClientError::Address(_))));
        assert!(Client::new("[::1]:8200".parse().unwrap()).is_ok());
        let client =
            Client::new("127.0.0.1:1".parse().unwrap()).unwrap().with_token("hvs.secret".to_owned().into());
        assert!(!format!("{client:?}").contains("secret"));
    }
}
