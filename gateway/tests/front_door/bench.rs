//! A whole site for one test: gateway, provider, and a service that says what it was sent.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use gateway::https::{HttpClient, HttpsClient};
use gateway::idp::{Client, Idp, IdpConfig, users};
use gateway::login::{self, Person};
use gateway::{
    Algorithm, Gateway, GatewayConfig, Issuer, IssuerConfig, Rate, Route, SESSION_COOKIE, SealKey, Service,
    SessionLimits, SharedRandom, Trust,
};
use http::header::{ACCEPT, LOCATION, SET_COOKIE, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use identity::clock::{ManualClock, SharedClock};
use identity::testing::{TestAuthority, ago, ahead};
use identity::tls::{ALPN_H2, ClientAuth};
use identity::txn::{Arrival, RequestBinding, Verifier};
use identity::{BundleSet, IdentitySource, Scope, SpiffeId, TrustDomain, X509Svid};
use policy::{MemoryRecorder, Policies};
use rcgen::SanType;
use ring::rand::SystemRandom;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use sidecar::otlp::TracesConfig;
use sidecar::proxy_protocol::Networks;
use sidecar::server::{Connection, Handler, Limits};
use sidecar::traffic::config::Traffic;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc;
use url::Url;

pub(crate) const PASSWORD: &str = "correct horse battery staple";
pub(crate) const ACCESS_LIFE: Duration = Duration::from_secs(300);
pub(crate) const HTML: &str = "text/html,application/xhtml+xml";

/// Everything that was logged in this process, to see what is in it and what is not.
#[derive(Default)]
pub(crate) struct Log(pub(crate) Mutex<String>);

pub(crate) static LOG: OnceLock<Arc<Log>> = OnceLock::new();

pub(crate) struct Collector(Arc<Log>);

impl tracing::Subscriber for Collector {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Fields<'a>(&'a mut String);
        impl tracing::field::Visit for Fields<'_> {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                write!(self.0, "{field}={value:?} ").unwrap();
            }
        }
        let mut line = format!("{} ", event.metadata().target());
        event.record(&mut Fields(&mut line));
        line.push('\n');
        self.0.0.lock().unwrap().push_str(&line);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

pub(crate) fn log() -> Arc<Log> {
    let log = LOG.get_or_init(|| {
        let log = Arc::new(Log::default());
        tracing::subscriber::set_global_default(Collector(Arc::clone(&log))).unwrap();
        log
    });
    Arc::clone(log)
}

/// The service behind: tells what it received, and checks the transaction token as a sidecar does.
pub(crate) struct Echo {
    source: IdentitySource,
    clock: SharedClock,
    verifier: Verifier,
    /// What came as a copy.
    copies: mpsc::UnboundedSender<Value>,
}

/// What the sidecar in front of a service says by itself, and an error of the service's own.
fn refusal(path: &str) -> Option<(u16, &'static str)> {
    Some(match path {
        "/refused" => (403, r#"{"error":"denied","receipt":"r-0123456789abcdef"}"#),
        "/down" => (502, r#"{"error":"bad_gateway","service":"web"}"#),
        "/own-error" => (403, r#"{"error":"denied","why":"the service says so"}"#),
        _ => return None,
    })
}

impl Handler for Echo {
    async fn handle(
        self: Arc<Self>,
        connection: Arc<Connection>,
        request: Request<sidecar::Body>,
    ) -> Response<sidecar::Body> {
        if let Some((status, said)) = refusal(request.uri().path()) {
            let response = Response::builder().status(status).header("content-type", "application/json");
            return response.body(sidecar::full(said)).unwrap();
        }
        let identity = self.source.current().unwrap();
        let target = request.uri().path_and_query().unwrap().as_str();
        let token = request.headers()[identity::txn::HEADER].to_str().unwrap();
        let chain = self.verifier.verify(
            token,
            Arrival {
                me: identity.svid.id(),
                presenter: connection.peer.as_ref().unwrap().id(),
                bundles: &identity.bundles,
                generation: identity.generation,
                binding: RequestBinding::new(request.method().as_str(), target),
                now: self.clock.now(),
            },
        );
        let headers: Vec<[String; 2]> = request
            .headers()
            .iter()
            .map(|(name, value)| [name.to_string(), value.to_str().unwrap().to_owned()])
            .collect();
        let told = json!({
            "target": target,
            "peer": connection.peer.as_ref().unwrap().id(),
            "user": chain.as_ref().map(|chain| chain.user().as_ref().clone()).map_err(ToString::to_string),
            "headers": headers,
        });
        if request.headers().contains_key(sidecar::traffic::split::MIRRORED) {
            self.copies.send(told.clone()).unwrap();
        }
        if let Some(protocol) = request.headers().get(UPGRADE).cloned() {
            // Says what it hears.
            let switched =
                Response::builder().status(StatusCode::SWITCHING_PROTOCOLS).header(UPGRADE, protocol);
            return switched.body(request.into_body()).unwrap();
        }
        Response::builder()
            .header("set-cookie", "basket=1")
            .header("set-cookie", format!("{SESSION_COOKIE}=planted; Path=/; Secure"))
            .header("txn-token", "leaked")
            .body(sidecar::full(told.to_string()))
            .unwrap()
    }
}

/// Ports and keys stay the same when the processes are started again.
pub(crate) struct Site {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) authority: TestAuthority,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) random: SharedRandom,
    /// Who says before a connection where it comes from.
    pub(crate) proxies: Networks,
    /// How requests go to the services.
    pub(crate) traffic: Traffic,
    /// Where its spans go.
    pub(crate) traces: Option<TracesConfig>,
}

pub(crate) struct Bench {
    pub(crate) site: Site,
    pub(crate) gateway: Url,
    pub(crate) issuer: Issuer,
    pub(crate) recorder: Arc<MemoryRecorder>,
    pub(crate) http: Arc<HttpsClient>,
    pub(crate) trust: Trust,
    pub(crate) copies: tokio::sync::Mutex<mpsc::UnboundedReceiver<Value>>,
    pub(crate) scope: Scope,
}

pub(crate) fn svid(authority: &TestAuthority, path: &str) -> X509Svid {
    let (leaf, key) = authority.issue_with(path, |params| {
        params.subject_alt_names.push(SanType::DnsName("localhost".try_into().unwrap()));
        params.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        params.not_after = identity::testing::offset(ahead(48 * 3600));
    });
    X509Svid::new(vec![leaf], key).unwrap()
}

pub(crate) fn listen(port: u16) -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

pub(crate) fn policies(directory: &Path) -> Arc<Policies> {
    let gateway = directory.join("services/gateway");
    std::fs::create_dir_all(&gateway).unwrap();
    let write = |path: std::path::PathBuf, text: &str| std::fs::write(path, text).unwrap();
    write(
        directory.join("mesh.cedarschema"),
        r"namespace Mesh {
            entity Workload = { service: String, trust_domain: String };
            entity Client;
            type User = { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long };
            type Context = { user?: User, chain: Set<String>, now: Long };
        }",
    );
    write(
        gateway.join("gateway.cedarschema"),
        r"namespace Gateway {
            entity Route;
            action UseRoute appliesTo { principal: [Mesh::Client], resource: [Route], context: Mesh::Context };
        }",
    );
    write(gateway.join("map.toml"), "mapping = \"none\"\n");
    write(
        gateway.join("gateway.cedar"),
        r#"@id("customers-use-web")
        permit (principal is Mesh::Client, action == Gateway::Action::"UseRoute", resource == Gateway::Route::"web")
        when { context has user && context.user.scopes.contains("bank") };"#,
    );
    Policies::load(directory, &TrustDomain::new("bank.example").unwrap()).unwrap()
}

pub(crate) fn client_secret() -> SecretString {
    "s".repeat(43).into()
}

impl Site {
    pub(crate) fn new() -> Self {
        log();
        let authority = TestAuthority::valid_between("bank.example", ago(3600), ahead(48 * 3600));
        let clock = ManualClock::at(ago(0));
        let directory = tempfile::tempdir().unwrap();
        let random: SharedRandom = Arc::new(SystemRandom::new());
        let user = |name: &str| users::User {
            name: name.into(),
            password: users::hash_password(&PASSWORD.to_owned().into(), random.as_ref()).unwrap(),
            display_name: name.to_uppercase(),
            groups: vec!["customers".into()],
        };
        let users = users::to_toml(vec![user("alice"), user("bob")]).unwrap();
        std::fs::write(directory.path().join("users.toml"), users).unwrap();
        let (proxies, traffic) = (Networks::default(), Traffic::default());
        Self { directory, authority, clock, random, proxies, traffic, traces: None }
    }

    pub(crate) async fn start(self, ports: (u16, u16), rate: Rate) -> Bench {
        let scope = Scope::new();
        let clock: SharedClock = self.clock.clone();
        let source = |path: &str| {
            IdentitySource::fixed(svid(&self.authority, path), BundleSet::new([self.authority.bundle()]))
        };
        let id = |path: &str| SpiffeId::new(&format!("spiffe://bank.example{path}")).unwrap();
        let (front, front_port) = listen(ports.0);
        let (back, back_port) = listen(ports.1);
        let gateway: Url = format!("https://127.0.0.1:{front_port}").parse().unwrap();
        let issuer: Issuer = format!("https://127.0.0.1:{back_port}").parse().unwrap();

        let state = self.directory.path();
        let callback = gateway.join("/.palisade/callback").unwrap();
        let mut web = Client::confidential("gateway", &client_secret(), callback, "bank");
        web.scopes = vec!["bank".into()];
        web.post_logout_redirect_uris = vec![gateway.join(gateway::LOGGED_OUT).unwrap()];
        let mut cli = Client::public("palisade-cli", "http://127.0.0.1/callback".parse().unwrap(), "bank");
        cli.scopes = vec!["bank".into()];
        let other = Client::public("other-cli", "http://127.0.0.1/callback".parse().unwrap(), "another-api");
        let idp = IdpConfig {
            listen: back,
            issuer: issuer.clone(),
            users: state.join("users.toml"),
            clients: vec![web, cli, other],
            state: state.join("idp"),
            access_token_ttl: ACCESS_LIFE,
            logins: Rate { per_second: 1.0, burst: 60 },
        };
        let random = Arc::clone(&self.random);
        Idp::start(idp, source("/palisade/idp"), Arc::clone(&clock), Arc::clone(&random), &scope)
            .await
            .unwrap();

        let web_source = source("/service/web");
        let (service, _) = listen(0);
        service.set_nonblocking(true).unwrap();
        let service = tokio::net::TcpListener::from_std(service).unwrap();
        let endpoint = service.local_addr().unwrap();
        let tls = identity::tls::server_config(
            &web_source,
            ClientAuth::Required,
            &[b"palisade-mux/1", ALPN_H2],
            &clock,
        )
        .unwrap();
        let verifier = Verifier::new(vec![id("/palisade/gateway")]);
        let (copied, copies) = mpsc::unbounded_channel();
        let echo = Arc::new(Echo { source: web_source, clock: Arc::clone(&clock), verifier, copies: copied });
        sidecar::server::serve(
            "web",
            service,
            Some(tls),
            Limits::default(),
            &scope,
            Arc::clone(&clock),
            echo,
        );

        let gateway_source = source("/palisade/gateway");
        let trust = Trust::Mesh { source: gateway_source.clone(), expected: None };
        let recorder = Arc::new(MemoryRecorder::default());
        let route = |prefix: &str, service: &str| Route { prefix: prefix.into(), service: service.into() };
        let service = |name: &str| Service {
            name: name.into(),
            id: id(&format!("/service/{name}")),
            endpoints: vec![endpoint].into(),
            traffic: self.traffic.clone(),
        };
        let config = GatewayConfig {
            listen: front,
            proxies: self.proxies.clone(),
            public_url: gateway.clone(),
            issuers: vec![IssuerConfig {
                issuer: issuer.clone(),
                client_id: "gateway".into(),
                client_secret: client_secret(),
                audience: "bank".into(),
                algorithms: vec![Algorithm::Es256],
                require_at_jwt_typ: true,
                scopes: ["profile", "groups", "offline_access", "bank"].map(Into::into).into(),
                refresh_retry_safe: true,
                trust: Trust::Mesh { source: gateway_source.clone(), expected: Some(id("/palisade/idp")) },
            }],
            routes: vec![route("/", "web"), route("/pay", "payments")],
            services: vec![service("web"), service("payments")],
            sessions: SessionLimits::default(),
            requests: rate,
            failed_authentications: Rate { per_second: 1.0, burst: 20 },
            state: state.join("gateway"),
            seal_keys: vec![SealKey::new("k".repeat(32).into()).unwrap()],
            cookie: SESSION_COOKIE.into(),
            traces: self.traces.clone(),
        };
        let policy = policies(&state.join("policies")).service("gateway").unwrap().into();
        Gateway::start(config, gateway_source, policy, recorder.clone(), Arc::clone(&clock), random, &scope)
            .await
            .unwrap();
        let http = HttpsClient::new(trust.clone(), &clock).unwrap();
        let copies = tokio::sync::Mutex::new(copies);
        Bench { site: self, gateway, issuer, recorder, http, trust, copies, scope }
    }
}

pub(crate) async fn bench() -> Bench {
    Site::new().start((0, 0), Rate { per_second: 100.0, burst: 1000 }).await
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{:?}", self.body))
    }

    pub(crate) fn header(&self, name: impl http::header::AsHeaderName) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn location(&self) -> Url {
        self.header(LOCATION).parse().unwrap()
    }

    pub(crate) fn sent(&self, name: &str) -> Vec<String> {
        let told = self.json();
        let all = told["headers"].as_array().unwrap().clone();
        all.iter().filter(|pair| pair[0] == name).map(|pair| pair[1].as_str().unwrap().to_owned()).collect()
    }
}

impl Bench {
    /// A connection as a browser makes one, on which nothing was said.
    pub(crate) async fn connection(&self) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
        self.connection_after("").await.unwrap()
    }

    /// The same, with something said before TLS.
    pub(crate) async fn connection_after(
        &self,
        before: &str,
    ) -> std::io::Result<tokio_rustls::client::TlsStream<tokio::net::TcpStream>> {
        let mut roots = rustls::RootCertStore::empty();
        for authority in self.site.authority.bundle().authorities() {
            roots.add(authority.clone()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider);
        let builder = builder.with_safe_default_protocol_versions().unwrap();
        let tls = Arc::new(builder.with_root_certificates(roots).with_no_client_auth());
        let port = self.gateway.port().unwrap();
        let mut stream = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        stream.write_all(before.as_bytes()).await.unwrap();
        let name = rustls_pki_types::ServerName::from(IpAddr::V4(Ipv4Addr::LOCALHOST));
        tokio_rustls::TlsConnector::from(tls).connect(name, stream).await
    }

    pub(crate) fn clock(&self) -> SharedClock {
        self.site.clock.clone()
    }

    pub(crate) async fn request(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if !body.is_empty() {
            request = request
                .header("content-length", body.len())
                .header("content-type", "application/x-www-form-urlencoded");
        }
        let answer = self.http.send(request.body(body.to_owned().into()).unwrap()).await.unwrap();
        let (parts, body) = answer.into_parts();
        Answer { status: parts.status, headers: parts.headers, body }
    }

    pub(crate) async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let origin = self.gateway.as_str().trim_end_matches('/');
        self.request(Method::GET, &format!("{origin}{path}"), headers, "").await
    }

    pub(crate) async fn post(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let origin = self.gateway.as_str().trim_end_matches('/');
        self.request(Method::POST, &format!("{origin}{path}"), headers, "a=b").await
    }

    pub(crate) async fn cookie(&self, name: &str) -> String {
        let password: SecretString = PASSWORD.to_owned().into();
        let person = Person { name, password: &password };
        let clock = self.clock();
        let cookie = login::browser_session(&self.gateway, person, self.trust.clone(), &clock).await.unwrap();
        cookie.expose_secret().to_owned()
    }

    pub(crate) async fn tokens(
        &self,
        client: &str,
        name: &str,
        password: &str,
    ) -> Result<login::Tokens, login::LoginError> {
        let password: SecretString = password.to_owned().into();
        let person = Person { name, password: &password };
        let redirect = "http://127.0.0.1:4711/callback".parse().unwrap();
        let (trust, clock) = (self.trust.clone(), self.clock());
        let scope = "openid profile groups offline_access bank";
        login::access_token(&self.issuer, client, &redirect, scope, person, trust, &clock, &self.site.random)
            .await
    }

    pub(crate) async fn bearer(&self) -> String {
        let tokens = self.tokens("palisade-cli", "alice", PASSWORD).await.unwrap();
        format!("Bearer {}", tokens.access_token.expose_secret())
    }

    pub(crate) fn idp(&self, path: &str) -> String {
        format!("{}{path}", self.issuer)
    }

    pub(crate) async fn stop(self) -> Site {
        self.scope.drain();
        drop(self.http);
        self.scope.finished(Duration::from_secs(20)).await.unwrap();
        self.site
    }
}

impl Bench {
    /// One request over HTTP/2, as browsers send them.
    pub(crate) async fn h2(&self, request: Request<()>) -> Answer {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.site.authority.bundle().authorities()[0].clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        let stream =
            tokio::net::TcpStream::connect(("127.0.0.1", self.gateway.port().unwrap())).await.unwrap();
        let name = rustls_pki_types::ServerName::try_from("127.0.0.1").unwrap();
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        let executor = hyper_util::rt::TokioExecutor::new();
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(executor, hyper_util::rt::TokioIo::new(stream))
                .await
                .unwrap();
        let exchange = async move {
            let (parts, body) =
                sender.send_request(request.map(|()| sidecar::empty())).await.unwrap().into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            Answer { status: parts.status, headers: parts.headers, body }
        };
        match futures::future::select(Box::pin(exchange), Box::pin(connection)).await {
            futures::future::Either::Left((answer, _)) => answer,
            futures::future::Either::Right((_, answer)) => answer.await,
        }
    }
}

/// A browser's cookies, shared by all its tabs.
#[derive(Default)]
pub(crate) struct Jar(Mutex<HashMap<String, String>>);

impl Jar {
    pub(crate) fn header(&self) -> String {
        let jar = self.0.lock().unwrap();
        jar.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("; ")
    }

    pub(crate) fn keep(&self, answer: &Answer) {
        for set in answer.headers.get_all(SET_COOKIE) {
            let (name, rest) = set.to_str().unwrap().split_once('=').unwrap();
            let value = rest.split(';').next().unwrap();
            let mut jar = self.0.lock().unwrap();
            if rest.contains("Max-Age=0") {
                jar.remove(name)
            } else {
                jar.insert(name.into(), value.into())
            };
        }
    }

    pub(crate) async fn visit(&self, bench: &Bench, url: &str) -> Answer {
        let answer =
            bench.request(Method::GET, url, &[(ACCEPT.as_str(), HTML), ("cookie", &self.header())], "").await;
        self.keep(&answer);
        answer
    }

    pub(crate) async fn submit(&self, bench: &Bench, page: &Answer, name: &str, password: &str) -> Answer {
        let text = String::from_utf8(page.body.to_vec()).unwrap();
        let token = text.split("name=\"request\" value=\"").nth(1).unwrap().split('"').next().unwrap();
        let body: String = url::form_urlencoded::Serializer::new(String::new())
            .extend_pairs([("request", token), ("username", name), ("password", password)])
            .finish();
        let headers = [("accept", HTML), ("cookie", &self.header()), ("origin", bench.issuer.as_str())];
        let answer = bench.request(Method::POST, &bench.idp("/login"), &headers, &body).await;
        self.keep(&answer);
        answer
    }
}
