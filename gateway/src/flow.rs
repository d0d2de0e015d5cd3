//! State that travels through a browser and must come back from the same browser, soon and unchanged.
//!
//! Each flow has a cookie of its own (a random secret under a random name) and a sealed token (in the
//! `state` parameter, or a hidden form field) that names the cookie. Twenty tabs that log in at once do
//! not disturb each other, and nothing is kept on the server.

use std::time::Duration;

use http::HeaderMap;
use http::header::HeaderValue;
use identity::clock::Clock;
use identity::jws;
use ring::digest::{SHA256, digest};
use ring::rand::SecureRandom;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::cookie;
use crate::seal::Sealer;

/// Long enough to find a password manager, short enough that a token seen in a log is of no use.
pub(crate) const LIFETIME: Duration = Duration::from_secs(600);
/// Flows begun and not finished that one browser may hold; more are abandoned tabs, and cleared.
const MAX_OPEN: usize = 40;
/// Longest sealed token looked at.
const MAX_TOKEN_BYTES: usize = 16 * 1024;
const TAG_BYTES: usize = 6;
const SECRET_BYTES: usize = 16;

/// A flow's parts.
#[derive(Debug)]
pub(crate) struct Begun {
    /// The sealed token, URL-safe.
    pub token: String,
    /// `Set-Cookie` values: the flow's own, and the clearing of abandoned ones.
    pub cookies: Vec<HeaderValue>,
}

/// Why a flow cannot be begun or finished. Callers learn only that it is so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum FlowError {
    /// No randomness, or sealing failed.
    #[error("a flow cannot be begun")]
    Begin,
    /// The token was not made here, or changed.
    #[error("the flow's token is not ours")]
    Token,
    /// Over [`LIFETIME`].
    #[error("the flow is too old")]
    Expired,
    /// The browser does not hold the flow's cookie.
    #[error("the flow belongs to another browser")]
    Cookie,
}

#[derive(Serialize, Deserialize)]
struct Sealed<T> {
    tag: String,
    secret_hash: String,
    begun: u64,
    payload: T,
}

/// What flows of one kind have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flows<'a> {
    pub sealer: &'a Sealer,
    pub random: &'a dyn SecureRandom,
    pub clock: &'a dyn Clock,
    /// Begins the cookies' names.
    pub cookie_prefix: &'a str,
    /// Keeps flows of one kind from serving as another.
    pub purpose: &'a str,
}

impl Flows<'_> {
    /// Begins a flow that carries `payload`.
    pub(crate) fn begin<T: Serialize>(&self, request: &HeaderMap, payload: T) -> Result<Begun, FlowError> {
        let tag = self.random_text(TAG_BYTES)?;
        let secret = self.random_text(SECRET_BYTES)?;
        let sealed =
            Sealed { tag: tag.clone(), secret_hash: hash(&secret), begun: self.clock.now_seconds(), payload };
        let plain = serde_json::to_vec(&sealed).map_err(|_| FlowError::Begin)?;
        let sealed = self
            .sealer
            .seal(self.random, self.purpose.as_bytes(), b"", &plain)
            .map_err(|_| FlowError::Begin)?;
        let mut cookies = self.clear_abandoned(request);
        let name = format!("{}{tag}", self.cookie_prefix);
        cookies.push(cookie::set(&name, &secret, Some(LIFETIME.as_secs())).ok_or(FlowError::Begin)?);
        Ok(Begun { token: jws::encode(sealed), cookies })
    }

    /// Finishes a flow: its payload, and the `Set-Cookie` that ends it.
    pub(crate) fn finish<T: DeserializeOwned>(
        &self,
        request: &HeaderMap,
        token: &str,
    ) -> Result<(T, HeaderValue), FlowError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(FlowError::Token);
        }
        let sealed = jws::decode(token).map_err(|_| FlowError::Token)?;
        let plain = self.sealer.open(self.purpose.as_bytes(), b"", &sealed).map_err(|_| FlowError::Token)?;
        let sealed: Sealed<T> = serde_json::from_slice(&plain).map_err(|_| FlowError::Token)?;
        let age = self.clock.now_seconds().checked_sub(sealed.begun).ok_or(FlowError::Expired)?;
        if age >= LIFETIME.as_secs() {
            return Err(FlowError::Expired);
        }
        let name = format!("{}{}", self.cookie_prefix, sealed.tag);
        let secret = cookie::single(request, &name).ok().flatten().ok_or(FlowError::Cookie)?;
        // Hashes are compared, so the time that it takes tells nothing of the secret.
        if hash(secret) != sealed.secret_hash {
            return Err(FlowError::Cookie);
        }
        Ok((sealed.payload, cookie::clear(&name).ok_or(FlowError::Begin)?))
    }

    fn clear_abandoned(&self, request: &HeaderMap) -> Vec<HeaderValue> {
        let open: Vec<&str> = cookie::pairs(request)
            .map(|(name, _)| name)
            .filter(|name| name.starts_with(self.cookie_prefix))
            .collect();
        if open.len() < MAX_OPEN { Vec::new() } else { open.into_iter().filter_map(cookie::clear).collect() }
    }

    fn random_text(&self, bytes: usize) -> Result<String, FlowError> {
        let mut buffer = vec![0; bytes];
        self.random.fill(&mut buffer).map_err(|_| FlowError::Begin)?;
        Ok(jws::encode(buffer))
    }
}

fn hash(text: &str) -> String {
    jws::encode(digest(&SHA256, text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::header::COOKIE;
    use identity::clock::ManualClock;
    use ring::rand::SystemRandom;

    use super::*;

    fn back(cookie: &HeaderValue) -> String {
        cookie.to_str().unwrap().split(';').next().unwrap().to_owned()
    }

    fn request(cookies: &[String]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(COOKIE, HeaderValue::try_from(cookies.join("; ")).unwrap());
        headers
    }

    fn parts() -> (Sealer, SystemRandom, Arc<ManualClock>) {
        let clock = ManualClock::at(Duration::from_secs(1000));
        (Sealer::from_bytes(&[7; 32]).unwrap(), SystemRandom::new(), clock)
    }

    fn flows<'a>(sealer: &'a Sealer, random: &'a SystemRandom, clock: &'a ManualClock) -> Flows<'a> {
        Flows { sealer, random, clock, cookie_prefix: "__Host-f-", purpose: "login" }
    }

    #[test]
    fn gateway_21_each_flow_needs_its_own_browser_purpose_and_time() {
        let (sealer, random, clock) = parts();
        let flows = flows(&sealer, &random, &clock);
        let begun: Vec<Begun> = (0..20).map(|n| flows.begin(&HeaderMap::new(), n).unwrap()).collect();
        let all: Vec<String> = begun.iter().map(|flow| back(&flow.cookies[0])).collect();
        for (n, flow) in begun.iter().enumerate() {
            assert_eq!(flows.finish::<usize>(&request(&all), &flow.token).unwrap().0, n);
        }
        let first = &begun[0].token;
        assert_eq!(flows.finish::<usize>(&request(&all[1..]), first).unwrap_err(), FlowError::Cookie);
        let planted = format!("{}x", all[0]);
        assert_eq!(flows.finish::<usize>(&request(&[planted]), first).unwrap_err(), FlowError::Cookie);
        assert_eq!(flows.finish::<usize>(&HeaderMap::new(), first).unwrap_err(), FlowError::Cookie);
        let other = Flows { purpose: "form", ..flows };
        assert_eq!(other.finish::<usize>(&request(&all), first).unwrap_err(), FlowError::Token);
        assert_eq!(flows.finish::<usize>(&request(&all), "x").unwrap_err(), FlowError::Token);
        clock.advance(LIFETIME);
        assert_eq!(flows.finish::<usize>(&request(&all), first).unwrap_err(), FlowError::Expired);
    }

    #[test]
    fn abandoned_flows_do_not_fill_the_cookie_header() {
        let (sealer, random, clock) = parts();
        let flows = flows(&sealer, &random, &clock);
        let open: Vec<String> = (0..MAX_OPEN).map(|n| format!("__Host-f-{n}=x")).collect();
        assert_eq!(flows.begin(&request(&open[1..]), ()).unwrap().cookies.len(), 1);
        assert_eq!(flows.begin(&request(&open), ()).unwrap().cookies.len(), MAX_OPEN + 1);
    }
}
