//! An issuer for unit tests that signs whatever it is told to, and a network that is a closure.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response, StatusCode};
use identity::Scope;
use identity::clock::ManualClock;
use identity::jws;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::{Value, json};

use crate::config::{Algorithm, IssuerConfig};
use crate::https::{HttpClient, HttpsError, Trust};
use crate::issuer::IssuerClient;
use crate::jwk::KeySet;
use crate::jwt::Pins;

pub(crate) const ISSUER: &str = "https://issuer.example";
pub(crate) const NOW: u64 = 1_800_000_000;

pub(crate) fn now() -> Duration {
    Duration::from_secs(NOW)
}

/// A P-256 key that signs anything.
pub(crate) struct TestKey {
    pub kid: String,
    pub pkcs8: Vec<u8>,
    pub public: Vec<u8>,
}

impl TestKey {
    pub(crate) fn new(kid: &str) -> Self {
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let pair =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).unwrap();
        Self { kid: kid.into(), public: pair.public_key().as_ref().to_vec(), pkcs8: pkcs8.as_ref().to_vec() }
    }

    pub(crate) fn jwk(&self) -> Value {
        json!({
            "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.kid,
            "x": jws::encode(&self.public[1..33]), "y": jws::encode(&self.public[33..]),
        })
    }

    pub(crate) fn sign(&self, header: &Value, claims: &Value) -> String {
        jws::sign_es256(header, claims, &self.pkcs8).unwrap()
    }

    pub(crate) fn header(&self) -> Value {
        json!({"typ": "at+jwt", "alg": "ES256", "kid": self.kid})
    }

    /// A good access token, changed as the test wishes.
    pub(crate) fn access(&self, change: impl FnOnce(&mut Value, &mut Value)) -> String {
        let (mut header, mut claims) = (self.header(), access_claims());
        change(&mut header, &mut claims);
        self.sign(&header, &claims)
    }

    pub(crate) fn keys(&self) -> KeySet {
        KeySet::parse(jwks(&[self]).as_bytes()).unwrap()
    }
}

pub(crate) fn jwks(keys: &[&TestKey]) -> String {
    json!({ "keys": keys.iter().map(|key| key.jwk()).collect::<Vec<_>>() }).to_string()
}

pub(crate) fn access_claims() -> Value {
    json!({
        "iss": ISSUER, "sub": "alice", "aud": "bank", "client_id": "cli", "scope": "openid bank",
        "groups": ["customers"], "iat": NOW, "exp": NOW + 300, "jti": "1", "auth_time": NOW - 5,
    })
}

pub(crate) fn pins() -> Pins {
    Pins {
        issuer: ISSUER.parse().unwrap(),
        audience: "bank".into(),
        client_id: "gateway".into(),
        algorithms: vec![Algorithm::Es256],
        require_at_jwt_typ: true,
    }
}

pub(crate) fn config(issuer: &str) -> IssuerConfig {
    IssuerConfig {
        issuer: issuer.parse().unwrap(),
        client_id: "gateway".into(),
        client_secret: "secret".to_owned().into(),
        audience: "bank".into(),
        algorithms: vec![Algorithm::Es256],
        require_at_jwt_typ: true,
        scopes: vec!["bank".into()],
        refresh_retry_safe: false,
        trust: Trust::Roots(Arc::from([])),
    }
}

type Answer = Result<(StatusCode, String), HttpsError>;

type Page = dyn Fn(&str) -> Answer + Send + Sync;

/// A network in which every URL has a closure behind it.
#[derive(Clone, Default)]
pub(crate) struct Network(Arc<Inner>);

#[derive(Default)]
struct Inner {
    pages: Mutex<HashMap<String, Arc<Page>>>,
    requests: AtomicUsize,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Network")
    }
}

impl Network {
    /// A network with one issuer in it.
    pub(crate) fn with_issuer(issuer: &str, keys: &[&TestKey]) -> Self {
        let network = Self::default();
        let discovery = json!({
            "issuer": issuer,
            "authorization_endpoint": format!("{issuer}/authorize"),
            "token_endpoint": format!("{issuer}/token"),
            "jwks_uri": format!("{issuer}/jwks.json"),
        });
        network.page(&format!("{issuer}/.well-known/openid-configuration"), &discovery.to_string());
        network.page(&format!("{issuer}/jwks.json"), &jwks(keys));
        network
    }

    pub(crate) fn page(&self, url: &str, text: &str) {
        let text = text.to_owned();
        self.serve(url, move |_| Ok((StatusCode::OK, text.clone())));
    }

    /// The closure gets the request's body.
    pub(crate) fn serve(&self, url: &str, answer: impl Fn(&str) -> Answer + Send + Sync + 'static) {
        self.0.pages.lock().unwrap().insert(url.into(), Arc::new(answer));
    }

    pub(crate) fn requests(&self) -> usize {
        self.0.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn issuer(&self, config: &IssuerConfig, clock: &Arc<ManualClock>) -> Arc<IssuerClient> {
        IssuerClient::new(config, Arc::new(self.clone()), clock.clone(), Scope::new())
    }
}

impl HttpClient for Network {
    fn send(&self, request: Request<Bytes>) -> BoxFuture<'_, Result<Response<Bytes>, HttpsError>> {
        Box::pin(async move {
            self.0.requests.fetch_add(1, Ordering::SeqCst);
            // Others get their turn while this one is on the wire.
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
            let page = self.0.pages.lock().unwrap().get(&request.uri().to_string()).cloned();
            let body = String::from_utf8_lossy(request.body()).into_owned();
            let (status, text) =
                page.map_or(Ok((StatusCode::NOT_FOUND, String::new())), |page| page(&body))?;
            Ok(Response::builder().status(status).body(text.into()).unwrap())
        })
    }
}
