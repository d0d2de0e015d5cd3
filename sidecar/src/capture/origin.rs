//! Hosts outside the mesh that the app sends requests to: where each of them is, and connections to it, in clear
//! text or in TLS that is made here.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use identity::Scope;
use identity::clock::SharedClock;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf, split};
use tokio::net::{TcpStream, lookup_host};
use tokio_rustls::TlsConnector;

use super::outside::NotCarried;
use super::{Egress, Refused};
use crate::http1::{Client, Connect};
use crate::traffic::egress::{AllowList, Allowed, HTTPS_PORT, Speech};

/// A resolver asks its servers for longer; an app would not wait for it.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// As for endpoints of the mesh: a SYN and its first two repetitions.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Two round trips, and a signature on a busy machine.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Hosts with a pool of their own. Names below a wildcard are without number.
const MAX_ORIGINS: usize = 256;

/// Where names lead, and how what is there is dialled.
#[derive(Debug)]
pub(super) struct WayOut {
    pub(super) names: AllowList,
    /// By which authorities hosts are known, where TLS is made for the app.
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) clock: SharedClock,
}

impl WayOut {
    /// Where `host` is, if all of `allowed` lets it be there.
    pub(super) async fn find(
        &self,
        allowed: &Allowed,
        host: &str,
        port: u16,
    ) -> Result<Vec<SocketAddr>, NotCarried> {
        let found =
            self.resolve(host, port).await.map_err(|error| NotCarried::Failed(format!("{host}: {error}")))?;
        let (mut addresses, mut refusal) = (Vec::new(), None);
        for address in found {
            match allowed.leads_to(address.ip()) {
                Ok(()) => addresses.push(address),
                Err(error) => refusal = Some(error),
            }
        }
        match refusal {
            Some(refusal) if addresses.is_empty() => {
                Err(Refused::EgressName { host: host.to_owned(), port, refusal }.into())
            }
            _ => Ok(addresses),
        }
    }

    async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        if let Ok(address) = bare(host).parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        tokio::select! {
            found = lookup_host((host, port)) => Ok(found?.collect()),
            () = self.clock.sleep(LOOKUP_TIMEOUT) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// The first of `addresses` that answers.
    pub(super) async fn connect(
        &self,
        addresses: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<TcpStream, NotCarried> {
        let mut failure = NotCarried::Failed("the name leads nowhere".to_owned());
        for address in addresses {
            let connected = tokio::select! {
                connected = Egress::connect(address) => connected.map_err(NotCarried::from),
                () = self.clock.sleep(CONNECT_TIMEOUT) => {
                    Err(NotCarried::Failed(format!("{address} does not answer within {CONNECT_TIMEOUT:?}")))
                }
            };
            match connected {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// TLS over `stream`, with whoever proves to be `host`.
    async fn secured(&self, stream: TcpStream, host: &str) -> Result<Box<dyn Duplex>, NotCarried> {
        let failed = |why: &dyn fmt::Display| NotCarried::Failed(format!("TLS with {host}: {why}"));
        let config = self.tls.as_ref().ok_or_else(|| failed(&"no authorities are configured"))?;
        let name = ServerName::try_from(bare(host).to_owned()).map_err(|error| failed(&error))?;
        tokio::select! {
            stream = TlsConnector::from(Arc::clone(config)).connect(name, stream) => match stream {
                Ok(stream) => Ok(Box::new(stream)),
                Err(error) => Err(failed(&error)),
            },
            () = self.clock.sleep(HANDSHAKE_TIMEOUT) => {
                Err(failed(&format_args!("no handshake within {HANDSHAKE_TIMEOUT:?}")))
            }
        }
    }
}

/// An address without the brackets that hosts have around IPv6.
fn bare(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
}

/// Whom requests are for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Origin {
    host: Box<str>,
    port: u16,
    speech: Speech,
}

impl Origin {
    /// `host` as the request has it, `port` and `speech` as the list has them.
    pub(super) fn new(host: &str, port: u16, speech: Speech) -> Self {
        Self { host: host.to_ascii_lowercase().into(), port, speech }
    }

    /// `Host` for requests that go over TLS although they were written for clear text: the port may be another,
    /// and the default one is not named.
    pub(super) fn host_over_tls(&self) -> Option<HeaderValue> {
        let named = match (self.speech, self.port) {
            (Speech::Https, HTTPS_PORT) => HeaderValue::from_str(&self.host),
            (Speech::Https, port) => HeaderValue::try_from(format!("{}:{port}", self.host)),
            _ => return None,
        };
        // A host that the list allows has no byte that a header could not have.
        named.ok()
    }
}

/// A stream of either kind. What leaves the mesh is not the hot path: one dynamic call a read is not seen there.
pub(super) trait Duplex: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin> Duplex for S {}

/// How connections to one origin are made.
#[derive(Debug)]
pub(super) struct ToOrigin {
    way: Arc<WayOut>,
    origin: Origin,
}

impl ToOrigin {
    async fn dial(&self) -> Result<Box<dyn Duplex>, NotCarried> {
        let Origin { host, port, speech } = &self.origin;
        let allowed = self.way.names.decide(*speech, host, *port).map_err(|refusal| Refused::EgressName {
            host: host.clone().into(),
            port: *port,
            refusal,
        })?;
        let addresses = self.way.find(&allowed, host, *port).await?;
        let stream = self.way.connect(addresses).await?;
        if let Err(error) = stream.set_nodelay(true) {
            return Err(NotCarried::Failed(error.to_string()));
        }
        match speech {
            Speech::Https => self.way.secured(stream, host).await,
            _ => Ok(Box::new(stream)),
        }
    }
}

impl Connect for ToOrigin {
    type Reader = ReadHalf<Box<dyn Duplex>>;
    type Writer = WriteHalf<Box<dyn Duplex>>;

    async fn connect(&self) -> io::Result<(Self::Reader, Self::Writer)> {
        self.dial().await.map(split).map_err(io::Error::other)
    }
}

/// A pool of connections for each origin.
#[derive(Debug)]
pub(super) struct Origins {
    way: Arc<WayOut>,
    clients: Mutex<HashMap<Origin, Arc<Client<ToOrigin>>>>,
    scope: Scope,
}

impl Origins {
    pub(super) fn new(way: Arc<WayOut>, scope: Scope) -> Self {
        Self { way, clients: Mutex::default(), scope }
    }

    /// The client of this origin.
    pub(super) fn client(&self, origin: Origin) -> Arc<Client<ToOrigin>> {
        // Nothing that runs under the lock can panic; if it did, the map would still be whole.
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&origin) {
            return Arc::clone(client);
        }
        if clients.len() >= MAX_ORIGINS {
            // Requests under way keep theirs; only idle connections are lost.
            clients.clear();
        }
        let server = ToOrigin { way: Arc::clone(&self.way), origin: origin.clone() };
        let client = Arc::new(Client::new(server, &self.scope));
        clients.insert(origin, Arc::clone(&client));
        client
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use identity::SystemClock;

    use super::*;

    #[test]
    fn host_names_the_port_that_the_request_goes_to() {
        let host = |host, port, speech| Origin::new(host, port, speech).host_over_tls();
        assert_eq!(host("API.example.org", 443, Speech::Https).unwrap(), "api.example.org");
        assert_eq!(host("api.example.org", 8443, Speech::Https).unwrap(), "api.example.org:8443");
        assert_eq!(host("[2001:db8::1]", 443, Speech::Https).unwrap(), "[2001:db8::1]");
        assert_eq!(host("api.example.org", 80, Speech::Http), None, "as the app wrote it");
    }

    #[test]
    fn names_without_number_hold_no_pools_without_number() {
        let way = WayOut { names: AllowList::default(), tls: None, clock: Arc::new(SystemClock) };
        let origins = Origins::new(Arc::new(way), Scope::new());
        let of = |number: usize| origins.client(Origin::new(&format!("a{number}.b.c"), 443, Speech::Https));
        let first = of(0);
        assert!(Arc::ptr_eq(&first, &of(0)), "one client an origin");
        for number in 0..3 * MAX_ORIGINS {
            drop(of(number));
            assert!(origins.clients.lock().unwrap().len() <= MAX_ORIGINS);
        }
    }
}
