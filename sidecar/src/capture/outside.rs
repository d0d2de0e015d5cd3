//! Captured connections whose destination is no service of the mesh: where the egress rules let them out, and how.
//!
//! A destination that is listed by address passes without being read. Otherwise the client has to say a name that
//! is listed, in its ClientHello or in the `Host` of each of its requests, and is brought to the address that *we*
//! find under that name: what it dialled is its word alone.

use std::future::pending;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::header::HOST;
use http::uri::Authority;
use http::{Request, Response, StatusCode};
use identity::Scope;
use identity::clock::SharedClock;
use thiserror::Error;

use super::egress::EgressError;
use super::origin::{Origin, Origins, WayOut};
use super::{Captured, OutsideNames, Refused};
use crate::detect::{Protocol, detect_on};
use crate::http1::ClientError;
use crate::live::Traffic;
use crate::server::Limits;
use crate::tcp::{Side as _, Stream, both_ways};
use crate::traffic::egress::{HelloReader, MAX_HELLO_BYTES, Speech};
use crate::{Body, answer, headers, http1};

/// Who speaks first says its name with its first packets; who waits for the server is listed by address.
const NAME_TIMEOUT: Duration = Duration::from_secs(5);
/// From the request to the head of its answer, a connection to its host included.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// The way out of the mesh.
#[derive(Debug)]
pub(super) struct Outside {
    way: Arc<WayOut>,
    origins: Origins,
    scope: Scope,
}

/// Why a connection was not carried to its end.
#[derive(Debug, Error)]
pub(super) enum NotCarried {
    /// It may not be.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It may, and failed on its way.
    #[error("{0}")]
    Failed(String),
}

impl NotCarried {
    fn rule(&self) -> Option<&'static str> {
        match self {
            Self::Refused(refused) => Some(refused.rule()),
            Self::Failed(_) => None,
        }
    }
}

impl From<EgressError> for NotCarried {
    fn from(error: EgressError) -> Self {
        match error {
            EgressError::Refused(refused) => Self::Refused(refused),
            EgressError::Connect(error) => Self::Failed(format!("cannot connect: {error}")),
        }
    }
}

impl Outside {
    pub(super) fn new(names: OutsideNames, clock: SharedClock, scope: Scope) -> Arc<Self> {
        let OutsideNames { allowed, tls } = names;
        let way = Arc::new(WayOut { names: allowed, tls, clock });
        Arc::new(Self { origins: Origins::new(Arc::clone(&way), scope.clone()), way, scope })
    }

    /// Carries a connection whose destination is listed by address.
    pub(super) async fn pass(&self, captured: Captured) -> Result<(), NotCarried> {
        self.carry(Stream::new(captured.stream), [captured.destination]).await
    }

    /// Carries a connection whose destination is not, by the name that its client says.
    pub(super) async fn by_name(self: &Arc<Self>, captured: Captured) -> Result<(), NotCarried> {
        let Captured { stream, destination, .. } = captured;
        if self.way.names.decide(Speech::Tcp, &as_host(destination.ip()), destination.port()).is_ok() {
            return self.carry(Stream::new(stream), [destination]).await;
        }
        if !self.way.names.may_be_named(destination.port()) {
            return Err(Refused::EgressDenied(destination).into());
        }
        let mut stream = Stream::new(stream);
        let protocol = detect_on(&mut stream, &self.way.clock, NAME_TIMEOUT)
            .await
            .map_err(|error| NotCarried::Failed(error.to_string()))?;
        match protocol {
            Protocol::Tls => {
                let name = self.server_name(&mut stream, destination).await?;
                let port = destination.port();
                let allowed = self.way.names.decide(Speech::Tls, &name, port);
                let named = |refusal| Refused::EgressName { host: name.clone(), port, refusal };
                let addresses = self.way.find(&allowed.map_err(named)?, &name, port).await?;
                self.carry(stream, addresses).await
            }
            Protocol::Http1 => {
                self.requests(stream, destination).await;
                Ok(())
            }
            _ => Err(Refused::EgressDenied(destination).into()),
        }
    }

    /// The name in the ClientHello that begins `stream`, which stays unread.
    async fn server_name(&self, stream: &mut Stream, destination: SocketAddr) -> Result<String, NotCarried> {
        let mut reader = HelloReader::default();
        let mut seen = 0;
        let mut late = self.way.clock.sleep(NAME_TIMEOUT);
        let nameless = || Refused::EgressDenied(destination);
        loop {
            let news = stream.unread().get(seen..).unwrap_or_default();
            seen += news.len();
            if let Some(name) = reader.read(news).map_err(|_| nameless())? {
                return Ok(name);
            }
            tokio::select! {
                biased;
                more = stream.read_more(MAX_HELLO_BYTES) => match more {
                    Ok(true) => {}
                    Ok(false) => return Err(nameless().into()),
                    Err(error) => return Err(NotCarried::Failed(error.to_string())),
                },
                () = &mut late => return Err(nameless().into()),
            }
        }
    }

    /// Copies both ways between `near` and the first of `addresses` that answers.
    async fn carry(
        &self,
        mut near: Stream,
        addresses: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<(), NotCarried> {
        let stream = match self.way.connect(addresses).await {
            Ok(stream) => stream,
            Err(error) => {
                near.abort();
                return Err(error);
            }
        };
        let mut far = Stream::new(stream);
        both_ways(&mut near, &mut far, &self.way.clock, &Traffic::default()).await.map_err(|error| {
            // Resets, not orderly ends: neither side has got the whole.
            near.abort();
            far.abort();
            NotCarried::Failed(error.to_string())
        })
    }

    /// Serves requests in clear text, each of which names its host.
    async fn requests(self: &Arc<Self>, stream: Stream, destination: SocketAddr) {
        let limits = Limits::default();
        let (reader, writer) = tokio::io::split(stream);
        let ended = http1::serve(reader, writer, &limits, &self.scope, pending(), |request| {
            let this = Arc::clone(self);
            async move {
                let outcome = this.forward(request, destination).await;
                outcome.unwrap_or_else(|(status, error)| {
                    let rule = error.rule();
                    tracing::info!(%destination, rule, reason = %error, "captured request refused");
                    answer::failed(status, "outside", &error)
                })
            }
        })
        .await;
        tracing::debug!(%destination, ?ended, "connection ended");
    }

    async fn forward(
        &self,
        request: Request<Body>,
        destination: SocketAddr,
    ) -> Result<Response<Body>, (StatusCode, NotCarried)> {
        let (mut parts, body) = request.into_parts();
        let bad = |rule: &str| {
            (StatusCode::BAD_REQUEST, NotCarried::Failed(format!("the request is refused: {rule}")))
        };
        let upgrade = headers::check_framing_of_upgrade(&parts).map_err(bad)?;
        if parts.uri.authority().is_some() {
            return Err(bad("request.target"));
        }
        let port = destination.port();
        let host = named_host(&parts.headers, port).ok_or_else(|| bad("request.host"))?;
        let (speech, to) = self.way.names.decide_request(&host, port).map_err(|refusal| {
            (StatusCode::FORBIDDEN, Refused::EgressName { host: host.clone(), port, refusal }.into())
        })?;
        let origin = Origin::new(&host, to, speech);
        headers::strip_hop_by_hop(&mut parts.headers);
        headers::strip_identity(&mut parts.headers);
        headers::ask_upgrade(&mut parts.headers, upgrade.as_ref());
        if let Some(host) = origin.host_over_tls() {
            parts.headers.insert(HOST, host);
        }
        let client = self.origins.client(origin);
        let sent = tokio::select! {
            sent = client.send(Request::from_parts(parts, body)) => sent,
            () = self.way.clock.sleep(RESPONSE_TIMEOUT) => {
                return Err((StatusCode::GATEWAY_TIMEOUT, NotCarried::Failed("no answer in time".to_owned())));
            }
        };
        let mut response = sent.map_err(unanswered)?;
        headers::strip_answer(&mut response, upgrade.as_ref());
        Ok(response)
    }
}

/// What the app is told of a request that has no answer.
fn unanswered(error: ClientError) -> (StatusCode, NotCarried) {
    let ClientError::Connect(error) = error else {
        return (StatusCode::BAD_GATEWAY, NotCarried::Failed(error.to_string()));
    };
    match error.downcast::<NotCarried>() {
        Ok(refused @ NotCarried::Refused(_)) => (StatusCode::FORBIDDEN, refused),
        Ok(failed) => (StatusCode::SERVICE_UNAVAILABLE, failed),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, NotCarried::Failed(error.to_string())),
    }
}

/// The one `Host`, without its port, which must be the one that was dialled.
fn named_host(headers: &http::HeaderMap, port: u16) -> Option<String> {
    let mut hosts = headers.get_all(HOST).iter();
    let (host, None) = (hosts.next()?, hosts.next()) else { return None };
    let authority: Authority = host.to_str().ok()?.parse().ok()?;
    let name = authority.host();
    // Nothing beside the host and that port: no user, no port that is no number.
    let port = format!(":{port}");
    let rest = authority.as_str().strip_prefix(name)?;
    (rest.is_empty() || rest == port).then(|| name.to_owned())
}

/// An address as the egress rules write hosts.
fn as_host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue};

    use super::*;

    #[test]
    fn a_request_names_one_host_at_the_port_that_was_dialled() {
        let named = |hosts: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for host in hosts {
                headers.append(HOST, HeaderValue::from_static(host));
            }
            named_host(&headers, 8080)
        };
        assert_eq!(named(&["api.example.org"]).as_deref(), Some("api.example.org"));
        assert_eq!(named(&["api.example.org:8080"]).as_deref(), Some("api.example.org"));
        assert_eq!(named(&["[2001:db8::1]:8080"]).as_deref(), Some("[2001:db8::1]"));
        for refused in [
            &[][..],
            &["a.example.org", "b.example.org"],
            &["api.example.org:80"],
            &["api.example.org:x"],
            &["user@api.example.org"],
            &[""],
            &["a b"],
        ] {
            assert_eq!(named(refused), None, "{refused:?}");
        }
    }
}
