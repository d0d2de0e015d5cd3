//! The front door as a whole: a real gateway, a real provider, and a service behind mTLS that says what it
//! was sent. Nothing between them is faked; time is set by hand.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, join_all};
use gateway::https::{HttpClient, HttpsClient};
use gateway::idp::{Client, Idp, IdpConfig, users};
use gateway::login::{self, Person};
use gateway::{
    Algorithm, Gateway, GatewayConfig, Issuer, IssuerConfig, Rate, Route, SESSION_COOKIE, SealKey,
    SessionLimits, SharedRandom, Trust,
};
use http::header::{ACCEPT, AUTHORIZATION, LOCATION, ORIGIN, RETRY_AFTER, SET_COOKIE, WWW_AUTHENTICATE};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use identity::clock::{ManualClock, SharedClock};
use identity::testing::{TestAuthority, ago, ahead};
use identity::tls::{ALPN_H2, ClientAuth};
use identity::txn::{Arrival, RequestBinding, Verifier};
use identity::{BundleSet, IdentitySource, Scope, SpiffeId, TrustDomain, X509Svid, jws};
use policy::{MemoryRecorder, Outcome, Policies};
use rcgen::SanType;
use ring::rand::SystemRandom;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use sidecar::server::{Connection, Handler, Limits};
use url::Url;

const PASSWORD: &str = "correct horse battery staple";
const ACCESS_LIFE: Duration = Duration::from_secs(300);
const HTML: &str = "text/html,application/xhtml+xml";

/// Everything that was logged in this process, to see what is in it and what is not.
#[derive(Default)]
struct Log(Mutex<String>);

static LOG: OnceLock<Arc<Log>> = OnceLock::new();

struct Collector(Arc<Log>);

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

fn log() -> Arc<Log> {
    let log = LOG.get_or_init(|| {
        let log = Arc::new(Log::default());
        tracing::subscriber::set_global_default(Collector(Arc::clone(&log))).unwrap();
        log
    });
    Arc::clone(log)
}

/// The service behind: tells what it received, and checks the transaction token as a sidecar does.
struct Echo {
    source: IdentitySource,
    clock: SharedClock,
    verifier: Verifier,
}

impl Handler for Echo {
    fn handle(
        self: Arc<Self>,
        connection: Arc<Connection>,
        request: Request<Incoming>,
    ) -> BoxFuture<'static, Response<sidecar::Body>> {
        Box::pin(async move {
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
            Response::builder()
                .header("set-cookie", "basket=1")
                .header("set-cookie", format!("{SESSION_COOKIE}=planted; Path=/; Secure"))
                .header("txn-token", "leaked")
                .body(sidecar::full(told.to_string()))
                .unwrap()
        })
    }
}

/// Ports and keys stay the same when the processes are started again.
struct Site {
    directory: tempfile::TempDir,
    authority: TestAuthority,
    clock: Arc<ManualClock>,
    random: SharedRandom,
}

struct Bench {
    site: Site,
    gateway: Url,
    issuer: Issuer,
    recorder: Arc<MemoryRecorder>,
    http: Arc<HttpsClient>,
    trust: Trust,
    scope: Scope,
}

fn svid(authority: &TestAuthority, path: &str) -> X509Svid {
    let (leaf, key) = authority.issue_with(path, |params| {
        params.subject_alt_names.push(SanType::DnsName("localhost".try_into().unwrap()));
        params.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        params.not_after = identity::testing::offset(ahead(48 * 3600));
    });
    X509Svid::new(vec![leaf], key).unwrap()
}

fn listen(port: u16) -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn policies(directory: &Path) -> Arc<Policies> {
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

fn client_secret() -> SecretString {
    "s".repeat(43).into()
}

impl Site {
    fn new() -> Self {
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
        Self { directory, authority, clock, random }
    }

    async fn start(self, ports: (u16, u16), rate: Rate) -> Bench {
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
        web.post_logout_redirect_uris = vec![gateway.clone()];
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
        let tls =
            identity::tls::server_config(&web_source, ClientAuth::Required, &[ALPN_H2], &clock).unwrap();
        let verifier = Verifier::new(vec![id("/palisade/gateway")]);
        let echo = Arc::new(Echo { source: web_source, clock: Arc::clone(&clock), verifier });
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
        let route = |prefix: &str, service: &str| Route {
            prefix: prefix.into(),
            service: service.into(),
            service_id: id(&format!("/service/{service}")),
            endpoints: vec![endpoint],
        };
        let config = GatewayConfig {
            listen: front,
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
            sessions: SessionLimits::default(),
            requests: rate,
            failed_authentications: Rate { per_second: 1.0, burst: 20 },
            state: state.join("gateway"),
            seal_keys: vec![SealKey::new("k".repeat(32).into()).unwrap()],
            cookie: SESSION_COOKIE.into(),
        };
        let policies = policies(&state.join("policies"));
        Gateway::start(
            config,
            gateway_source,
            policies,
            recorder.clone(),
            Arc::clone(&clock),
            random,
            &scope,
        )
        .await
        .unwrap();
        let http = HttpsClient::new(trust.clone(), &clock).unwrap();
        Bench { site: self, gateway, issuer, recorder, http, trust, scope }
    }
}

async fn bench() -> Bench {
    Site::new().start((0, 0), Rate { per_second: 100.0, burst: 1000 }).await
}

struct Answer {
    status: StatusCode,
    headers: http::HeaderMap,
    body: Bytes,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{:?}", self.body))
    }

    fn header(&self, name: impl http::header::AsHeaderName) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    fn location(&self) -> Url {
        self.header(LOCATION).parse().unwrap()
    }

    fn sent(&self, name: &str) -> Vec<String> {
        let told = self.json();
        let all = told["headers"].as_array().unwrap().clone();
        all.iter().filter(|pair| pair[0] == name).map(|pair| pair[1].as_str().unwrap().to_owned()).collect()
    }
}

impl Bench {
    fn clock(&self) -> SharedClock {
        self.site.clock.clone()
    }

    async fn request(&self, method: Method, url: &str, headers: &[(&str, &str)], body: &str) -> Answer {
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

    async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let origin = self.gateway.as_str().trim_end_matches('/');
        self.request(Method::GET, &format!("{origin}{path}"), headers, "").await
    }

    async fn post(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let origin = self.gateway.as_str().trim_end_matches('/');
        self.request(Method::POST, &format!("{origin}{path}"), headers, "a=b").await
    }

    async fn cookie(&self, name: &str) -> String {
        let password: SecretString = PASSWORD.to_owned().into();
        let person = Person { name, password: &password };
        let clock = self.clock();
        let cookie = login::browser_session(&self.gateway, person, self.trust.clone(), &clock).await.unwrap();
        cookie.expose_secret().to_owned()
    }

    async fn tokens(
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

    async fn bearer(&self) -> String {
        let tokens = self.tokens("palisade-cli", "alice", PASSWORD).await.unwrap();
        format!("Bearer {}", tokens.access_token.expose_secret())
    }

    fn idp(&self, path: &str) -> String {
        format!("{}{path}", self.issuer)
    }

    async fn stop(self) -> Site {
        self.scope.drain();
        drop(self.http);
        self.scope.finished(Duration::from_secs(20)).await.unwrap();
        self.site
    }
}

/// A browser's cookies, shared by all its tabs.
#[derive(Default)]
struct Jar(Mutex<HashMap<String, String>>);

impl Jar {
    fn header(&self) -> String {
        let jar = self.0.lock().unwrap();
        jar.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("; ")
    }

    fn keep(&self, answer: &Answer) {
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

    async fn visit(&self, bench: &Bench, url: &str) -> Answer {
        let answer =
            bench.request(Method::GET, url, &[(ACCEPT.as_str(), HTML), ("cookie", &self.header())], "").await;
        self.keep(&answer);
        answer
    }

    async fn submit(&self, bench: &Bench, page: &Answer, name: &str, password: &str) -> Answer {
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_logs_in_through_the_form_and_the_service_sees_who_it_is() {
    let bench = bench().await;
    let jar = Jar::default();
    let start = bench.get("/accounts?sort=date", &[("accept", HTML)]).await;
    assert_eq!(start.status, StatusCode::FOUND);
    jar.keep(&start);
    let form = jar.visit(&bench, start.location().as_str()).await;
    assert_eq!(form.status, StatusCode::OK);
    assert!(form.header("content-security-policy").contains("default-src 'none'"));
    let back = jar.submit(&bench, &form, "alice", PASSWORD).await;
    assert_eq!(back.status, StatusCode::SEE_OTHER);
    let done = jar.visit(&bench, back.location().as_str()).await;
    assert_eq!((done.status, done.header(LOCATION)), (StatusCode::SEE_OTHER, "/accounts?sort=date"));
    let set = done.headers.get_all(SET_COOKIE).iter().map(|value| value.to_str().unwrap());
    let session: Vec<&str> = set.filter(|value| value.starts_with("__Host-palisade=")).collect();
    assert_eq!(session.len(), 1);
    for attribute in ["Secure", "HttpOnly", "SameSite=Lax", "Path=/"] {
        assert!(session[0].split("; ").any(|part| part == attribute), "{attribute} in {}", session[0]);
    }
    assert!(!session[0].contains("Domain"));
    let page = jar.visit(&bench, bench.gateway.join("/accounts?sort=date").unwrap().as_str()).await;
    assert_eq!(page.status, StatusCode::OK);
    let told = page.json();
    assert_eq!(told["target"], "/accounts?sort=date");
    assert_eq!(told["peer"], "spiffe://bank.example/palisade/gateway");
    let user = &told["user"]["Ok"];
    assert_eq!(
        (&user["id"], &user["client"], &user["issuer"]),
        (&json!("alice"), &json!("gateway"), &json!(bench.issuer.as_str()))
    );
    assert_eq!(user["groups"], json!(["customers"]));
    assert!(user["scopes"].as_array().unwrap().contains(&json!("bank")));
    assert!(user["auth_time"].as_u64().unwrap() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_29_the_service_sees_nothing_that_the_caller_claims_about_itself() {
    let bench = bench().await;
    let cookie = format!("theme=dark; {}; __Host-palisade-login-x=y", bench.cookie("alice").await);
    let forged = [
        ("cookie", cookie.as_str()),
        ("x-forwarded-user", "bob"),
        ("x_forwarded_user", "bob"),
        ("x-forwarded-client-cert", "URI=spiffe://bank.example/service/payments"),
        ("x_forwarded-client_cert", "x"),
        ("x-forwarded-for", "192.0.2.1"),
        ("x-forwarded-host", "evil.example"),
        ("forwarded", "for=192.0.2.1"),
        ("txn-token", "forged"),
        ("txn_token", "forged"),
        ("x-palisade-user", "bob"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tracestate", "a=b"),
        ("x-secret", "hop"),
        ("x-kept", "yes"),
        ("connection", "x-secret, txn-token, x-forwarded-proto"),
    ];
    let answer = bench.get("/", &forged).await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
    let authority = bench.gateway.as_str().trim_start_matches("https://").trim_end_matches('/');
    assert_eq!(answer.json()["user"]["Ok"]["id"], "alice");
    assert_eq!(answer.sent("cookie"), ["theme=dark"]);
    assert_eq!(answer.sent("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(answer.sent("x-forwarded-proto"), ["https"]);
    assert_eq!(answer.sent("x-forwarded-host"), [authority]);
    assert_eq!(answer.sent("txn-token").len(), 1);
    assert_eq!(answer.sent("x-kept"), ["yes"]);
    assert_eq!(answer.sent("traceparent").len(), 1);
    assert!(!answer.sent("traceparent")[0].contains("0af7651916cd43dd8448eb211c80319c"));
    for gone in [
        "x-forwarded-user",
        "x_forwarded_user",
        "x-forwarded-client-cert",
        "x_forwarded-client_cert",
        "forwarded",
        "txn_token",
        "x-palisade-user",
        "tracestate",
        "x-secret",
        "connection",
        "authorization",
    ] {
        assert_eq!(answer.sent(gone), Vec::<String>::new(), "{gone}");
    }
    let set: Vec<_> = answer.headers.get_all(SET_COOKIE).iter().collect();
    assert_eq!(set, ["basket=1"], "a service cannot plant a session");
    assert!(!answer.headers.contains_key("txn-token"));
    let bearer = bench.bearer().await;
    let answer = bench.get("/", &[("authorization", &bearer)]).await;
    assert_eq!(answer.sent("authorization"), Vec::<String>::new(), "the access token goes no further");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_1_to_19_forged_and_misused_tokens_are_refused_and_the_good_one_works() {
    let bench = bench().await;
    let tokens = bench.tokens("palisade-cli", "alice", PASSWORD).await.unwrap();
    let good = tokens.access_token.expose_secret().to_owned();
    let (input, signature) = good.rsplit_once('.').unwrap();
    let (header, claims) = input.split_once('.').unwrap();
    let decode = |text: &str| -> Value { serde_json::from_slice(&jws::decode(text).unwrap()).unwrap() };
    let forge = |change: &dyn Fn(&mut Value, &mut Value)| {
        let (mut header, mut claims) = (decode(header), decode(claims));
        change(&mut header, &mut claims);
        format!("{}.{}", jws::encode(header.to_string()), jws::encode(claims.to_string()))
    };
    let jwks = bench.request(Method::GET, &bench.idp("/jwks.json"), &[], "").await.json();
    let none = forge(&|header, _| header["alg"] = json!("none"));
    let hs = forge(&|header, _| header["alg"] = json!("HS256"));
    let hs_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, jwks["keys"][0].to_string().as_bytes());
    let bob = forge(&|_, claims| claims["sub"] = json!("bob"));
    let other_audience = bench.tokens("other-cli", "alice", PASSWORD).await.unwrap();
    let attacks = [
        ("jwt.algorithm", format!("{none}.")),
        ("jwt.algorithm", format!("{none}.{signature}")),
        ("jwt.algorithm", format!("{hs}.{}", jws::encode(ring::hmac::sign(&hs_key, hs.as_bytes())))),
        ("jwt.signature", format!("{bob}.{signature}")),
        ("jwt.audience", other_audience.access_token.expose_secret().to_owned()),
        ("jwt.type", tokens.id_token.unwrap().expose_secret().to_owned()),
        ("jwt.form", tokens.refresh_token.unwrap().expose_secret().to_owned()),
        ("jwt.form", "a.b".into()),
    ];
    let ok = bench.get("/", &[("authorization", &format!("Bearer {good}"))]).await;
    assert_eq!((ok.status, &ok.json()["user"]["Ok"]["id"]), (StatusCode::OK, &json!("alice")));
    for (rule, token) in attacks {
        let answer = bench.get("/", &[("authorization", &format!("Bearer {token}"))]).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{rule}");
        let challenge = answer.header(WWW_AUTHENTICATE);
        assert!(
            challenge.starts_with("Bearer ") && challenge.contains("error=\"invalid_token\""),
            "{challenge}"
        );
        assert!(challenge.contains("resource_metadata=\""), "{challenge}");
        let receipt = answer.json()["receipt"].as_str().unwrap().to_owned();
        assert_eq!(answer.json(), json!({"error": "invalid_token", "receipt": receipt}), "no oracle");
        let records = bench.recorder.records();
        let record = records.iter().find(|record| record.receipt.as_str() == receipt).unwrap();
        assert_eq!(record.rule.name(), rule);
    }
    let bearer = format!("Bearer {good}");
    let cookie = bench.cookie("alice").await;
    for (path, headers) in [
        ("/?access_token=x", vec![("authorization", bearer.as_str())]),
        ("/", vec![("authorization", bearer.as_str()), ("cookie", cookie.as_str())]),
        ("/", vec![("authorization", bearer.as_str()), ("authorization", bearer.as_str())]),
    ] {
        assert_eq!(bench.get(path, &headers).await.status, StatusCode::BAD_REQUEST, "{path} {headers:?}");
    }
    bench.site.clock.advance(ACCESS_LIFE);
    assert_eq!(
        bench.get("/", &[("authorization", &bearer)]).await.status,
        StatusCode::UNAUTHORIZED,
        "expired"
    );
    let log = log();
    let log = log.0.lock().unwrap();
    for secret in [signature, PASSWORD, cookie.split_once('=').unwrap().1] {
        assert!(!log.contains(secret), "a secret was logged");
    }
    assert!(log.contains("jwt.signature"), "and the log was looked at");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_19_21_strangers_are_challenged_and_only_navigations_are_sent_to_log_in() {
    let bench = bench().await;
    let page = bench.get("/x", &[("accept", HTML), ("sec-fetch-mode", "navigate")]).await;
    assert_eq!(page.status, StatusCode::FOUND);
    assert!(page.location().as_str().starts_with(&bench.idp("/authorize?")));
    for headers in [
        vec![],
        vec![("accept", "*/*")],
        vec![("accept", "application/json")],
        vec![("accept", HTML), ("sec-fetch-mode", "cors")],
        vec![("accept", HTML), ("x-requested-with", "XMLHttpRequest")],
    ] {
        let answer = bench.get("/x", &headers).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{headers:?}");
        assert_eq!(answer.json()["error"], "unauthenticated");
        assert!(answer.header(WWW_AUTHENTICATE).starts_with("Bearer resource_metadata="));
    }
    let posted = bench.post("/x", &[("accept", HTML)]).await;
    assert_eq!(posted.status, StatusCode::UNAUTHORIZED, "a lost form is not turned into a login");
    let metadata = bench.get("/.well-known/oauth-protected-resource", &[]).await.json();
    assert_eq!(metadata["authorization_servers"], json!([bench.issuer.as_str()]));
    let dead = format!("{SESSION_COOKIE}={}", "A".repeat(43));
    assert_eq!(
        bench.get("/x", &[("cookie", &dead)]).await.status,
        StatusCode::UNAUTHORIZED,
        "a cookie alone proves nothing"
    );
    let twice = format!("{dead}; {dead}");
    assert_eq!(bench.get("/x", &[("cookie", &twice)]).await.status, StatusCode::BAD_REQUEST);
    assert_eq!(bench.get("/.palisade/unknown", &[]).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_28_unsafe_requests_of_a_session_must_come_from_this_site() {
    let bench = bench().await;
    let cookie = bench.cookie("alice").await;
    let origin = bench.gateway.origin().ascii_serialization();
    let with = |pairs: &[(&'static str, &'static str)]| {
        let mut headers: Vec<(&str, &str)> = pairs.to_vec();
        headers.push(("cookie", &cookie));
        headers
    };
    let mut good = with(&[]);
    good.push((ORIGIN.as_str(), &origin));
    let ok = bench.post("/transfers", &good).await;
    assert_eq!((ok.status, &ok.json()["user"]["Ok"]["id"]), (StatusCode::OK, &json!("alice")));
    for bad in [
        with(&[]),
        with(&[("origin", "https://evil.example")]),
        with(&[("origin", "null")]),
        with(&[("sec-fetch-site", "cross-site")]),
        with(&[("sec-fetch-site", "same-site")]),
    ] {
        let answer = bench.post("/transfers", &bad).await;
        assert_eq!(
            (answer.status, &answer.json()["error"]),
            (StatusCode::FORBIDDEN, &json!("cross_site_request")),
            "{bad:?}"
        );
        assert_eq!(bench.post("/.palisade/logout", &bad).await.status, StatusCode::FORBIDDEN, "{bad:?}");
    }
    assert_eq!(bench.get("/", &[("cookie", &cookie)]).await.status, StatusCode::OK, "still logged in");
    let bearer = bench.bearer().await;
    let api = bench.post("/transfers", &[("authorization", &bearer)]).await;
    assert_eq!(api.status, StatusCode::OK, "a token is not sent by a browser on its own");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_28_security_46_a_login_leads_nowhere_else_and_repeats_nothing() {
    let bench = bench().await;
    for target in [
        "//evil.example",
        "https://evil.example/",
        "/\\evil.example",
        "%2F%2Fevil.example",
        "/.palisade/login",
    ] {
        let jar = Jar::default();
        let start = bench.get(&format!("/.palisade/login?return_to={target}"), &[("accept", HTML)]).await;
        jar.keep(&start);
        let form = jar.visit(&bench, start.location().as_str()).await;
        let back = jar.submit(&bench, &form, "alice", PASSWORD).await;
        let done = jar.visit(&bench, back.location().as_str()).await;
        assert_eq!(done.header(LOCATION), "/", "{target}");
    }
    for query in [
        "",
        "?state=x",
        "?code=a&state=b",
        "?error=%3Cscript%3E&error_description=%3Cscript%3E&state=x",
        "?state=a&state=b",
    ] {
        let answer = bench.get(&format!("/.palisade/callback{query}"), &[("accept", HTML)]).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{query}");
        assert!(!String::from_utf8_lossy(&answer.body).contains("script"), "{query}");
    }
    for query in [
        "client_id=nobody&redirect_uri=https://evil.example",
        "client_id=gateway&redirect_uri=https://evil.example",
        "client_id=gateway&redirect_uri=javascript:alert(1)",
        "client_id=%3Cscript%3E",
    ] {
        let answer = bench
            .request(Method::GET, &bench.idp(&format!("/authorize?{query}")), &[("accept", HTML)], "")
            .await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{query}");
        assert!(!String::from_utf8_lossy(&answer.body).contains("script"), "{query}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_27_a_logout_ends_the_session_here_and_at_the_issuer() {
    let bench = bench().await;
    let jar = Jar::default();
    let start = bench.get("/", &[("accept", HTML)]).await;
    jar.keep(&start);
    let authorize = start.location();
    let form = jar.visit(&bench, authorize.as_str()).await;
    let back = jar.submit(&bench, &form, "alice", PASSWORD).await;
    jar.visit(&bench, back.location().as_str()).await;
    let old = jar.header();
    assert_eq!(bench.get("/", &[("cookie", &old)]).await.status, StatusCode::OK);
    let again = jar.visit(&bench, authorize.as_str()).await;
    assert_eq!(again.status, StatusCode::SEE_OTHER, "the issuer knows the browser");

    let origin = bench.gateway.origin().ascii_serialization();
    assert_eq!(
        bench.get("/.palisade/logout", &[("cookie", &old)]).await.status,
        StatusCode::METHOD_NOT_ALLOWED
    );
    let out =
        bench.post("/.palisade/logout", &[("cookie", &old), ("origin", &origin), ("accept", HTML)]).await;
    assert_eq!(out.status, StatusCode::SEE_OTHER);
    jar.keep(&out);
    assert!(!jar.header().contains("__Host-palisade="));
    assert_eq!(
        bench.get("/", &[("cookie", &old)]).await.status,
        StatusCode::UNAUTHORIZED,
        "the old cookie is dead"
    );
    let end = jar.visit(&bench, out.location().as_str()).await;
    assert_eq!((end.status, end.location()), (StatusCode::SEE_OTHER, bench.gateway.clone()));
    let form = jar.visit(&bench, authorize.as_str()).await;
    assert_eq!(form.status, StatusCode::OK, "a password is asked for again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_21_twenty_tabs_log_in_at_once() {
    let bench = bench().await;
    let jar = Jar::default();
    let starts = join_all((0..20).map(|n| {
        let (bench, jar) = (&bench, &jar);
        async move {
            let start = bench.get(&format!("/tab/{n}"), &[("accept", HTML)]).await;
            jar.keep(&start);
            start.location()
        }
    }))
    .await;
    let forms = join_all(starts.iter().map(|url| jar.visit(&bench, url.as_str()))).await;
    let backs = join_all(forms.iter().map(|form| jar.submit(&bench, form, "alice", PASSWORD))).await;
    let done = join_all(backs.iter().map(|back| async {
        let url = back.location();
        jar.visit(&bench, url.as_str()).await
    }))
    .await;
    for (n, answer) in done.iter().enumerate() {
        assert_eq!(
            (answer.status, answer.header(LOCATION)),
            (StatusCode::SEE_OTHER, format!("/tab/{n}").as_str())
        );
    }
    let pages = join_all(done.iter().map(|answer| {
        let cookie = answer.headers.get_all(SET_COOKIE).iter().find_map(|value| {
            value
                .to_str()
                .unwrap()
                .strip_prefix("__Host-palisade=")
                .map(|rest| rest.split(';').next().unwrap())
        });
        let cookie = format!("{SESSION_COOKIE}={}", cookie.unwrap());
        let bench = &bench;
        async move { bench.get("/", &[("cookie", &cookie)]).await.status }
    }))
    .await;
    assert!(pages.iter().all(|status| *status == StatusCode::OK), "{pages:?}");
}

/// How often the provider's token endpoint was asked, in this process.
fn token_requests(address: &str) -> usize {
    let log = log();
    let log = log.0.lock().unwrap();
    let from = |line: &&str| line.contains("path=\"/token\"") && line.starts_with("gateway::idp");
    log.lines().filter(from).filter(|line| line.contains(address)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_23_two_hundred_parallel_requests_refresh_once_and_nobody_is_logged_out() {
    let bench = bench().await;
    let cookie = bench.cookie("alice").await;
    let issuer = format!("issuer={:?}", bench.issuer.as_str());
    let before = token_requests(&issuer);
    assert_eq!(before, 1, "the code");
    for round in 1..=3 {
        bench.site.clock.advance(ACCESS_LIFE);
        let headers = [("cookie", cookie.as_str())];
        let all = join_all((0..200).map(|_| bench.get("/", &headers))).await;
        let bad: Vec<_> =
            all.iter().filter(|answer| answer.status != StatusCode::OK).map(|a| a.status).collect();
        assert!(bad.is_empty(), "{bad:?}");
        assert_eq!(token_requests(&issuer), before + round);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_26_an_idle_session_ends_and_asks_for_a_login() {
    let bench = bench().await;
    let cookie = bench.cookie("alice").await;
    bench.site.clock.advance(SessionLimits::default().idle - Duration::from_secs(1));
    assert_eq!(bench.get("/", &[("cookie", &cookie)]).await.status, StatusCode::OK);
    bench.site.clock.advance(SessionLimits::default().idle);
    assert_eq!(bench.get("/", &[("cookie", &cookie)]).await.status, StatusCode::UNAUTHORIZED);
    let page = bench.get("/", &[("cookie", &cookie), ("accept", HTML)]).await;
    assert_eq!(page.status, StatusCode::FOUND);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_policy_is_asked_and_ambiguous_paths_never_reach_it() {
    let bench = bench().await;
    let bearer = bench.bearer().await;
    let auth = [("authorization", bearer.as_str())];
    let denied = bench.get("/pay/1", &auth).await;
    assert_eq!((denied.status, &denied.json()["error"]), (StatusCode::FORBIDDEN, &json!("denied")));
    let receipt = denied.json()["receipt"].as_str().unwrap().to_owned();
    let records = bench.recorder.records();
    let record = records.iter().find(|record| record.receipt.as_str() == receipt).unwrap();
    assert_eq!((record.verdict, record.user.as_ref().unwrap().id.as_str()), (Outcome::Deny, "alice"));
    assert_eq!(bench.get("/payments", &auth).await.status, StatusCode::OK, "/pay is a whole segment");
    for path in ["//pay/1", "/./pay/1", "/x/../pay/1", "/%70ay/1", "/pay%2f1", "/pay;x=y/1", "/x%2e%2e/pay"] {
        let answer = bench.get(path, &auth).await;
        assert_eq!(
            (answer.status, &answer.json()["error"]),
            (StatusCode::BAD_REQUEST, &json!("malformed_request")),
            "{path}"
        );
        assert!(answer.json()["receipt"].is_string());
    }
    let page = bench.get("/pay/1", &[("authorization", &bearer), ("accept", HTML)]).await;
    assert!(String::from_utf8_lossy(&page.body).contains("Receipt: <code>r-"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_principal_and_a_guesser_are_slowed_down_each_for_itself() {
    let bench = Site::new().start((0, 0), Rate { per_second: 1.0, burst: 3 }).await;
    let bearer = bench.bearer().await;
    for left in ["2", "1", "0"] {
        let answer = bench.get("/", &[("authorization", &bearer)]).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert!(answer.header("ratelimit").contains(&format!("r={left};")), "{}", answer.header("ratelimit"));
        assert_eq!(answer.header("ratelimit-policy"), "\"principal\";q=3;w=3");
    }
    let limited = bench.get("/", &[("authorization", &bearer)]).await;
    assert_eq!((limited.status, limited.header(RETRY_AFTER)), (StatusCode::TOO_MANY_REQUESTS, "1"));
    let bob = bench.tokens("palisade-cli", "bob", PASSWORD).await.unwrap();
    let bob = format!("Bearer {}", bob.access_token.expose_secret());
    assert_eq!(bench.get("/", &[("authorization", &bob)]).await.status, StatusCode::OK, "bob has his own");
    let mut last = StatusCode::OK;
    for _ in 0..21 {
        last = bench.get("/", &[(AUTHORIZATION.as_str(), "Bearer a.b.c")]).await.status;
    }
    assert_eq!(last, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(
        bench.get("/", &[("authorization", &bob)]).await.status,
        StatusCode::OK,
        "the address still serves"
    );
    bench.site.clock.advance(Duration::from_secs(1));
    assert_eq!(bench.get("/", &[("authorization", &bearer)]).await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_and_tokens_survive_a_restart_of_both() {
    let fast = Rate { per_second: 100.0, burst: 1000 };
    let bench = bench().await;
    let (cookie, bearer) = (bench.cookie("alice").await, bench.bearer().await);
    let ports = (bench.gateway.port().unwrap(), bench.issuer.url().port().unwrap());
    let site = bench.stop().await;
    let bench = site.start(ports, fast).await;
    assert_eq!(bench.get("/", &[("cookie", &cookie)]).await.status, StatusCode::OK);
    assert_eq!(bench.get("/", &[("authorization", &bearer)]).await.status, StatusCode::OK);
    bench.site.clock.advance(ACCESS_LIFE);
    assert_eq!(bench.get("/", &[("cookie", &cookie)]).await.status, StatusCode::OK, "the refresh token too");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_issuer_with_another_certificate_is_not_believed() {
    let bench = bench().await;
    let other = TestAuthority::valid_between("bank.example", ago(3600), ahead(48 * 3600));
    let stranger = IdentitySource::fixed(svid(&other, "/x"), BundleSet::new([other.bundle()]));
    let mesh = IdentitySource::fixed(
        svid(&bench.site.authority, "/x"),
        BundleSet::new([bench.site.authority.bundle()]),
    );
    let expecting = |path: &str| Some(SpiffeId::new(&format!("spiffe://bank.example{path}")).unwrap());
    let discovery = bench.issuer.discovery();
    let clock = bench.clock();
    let works = |trust: Trust, url: String| {
        let client = HttpsClient::new(trust, &clock).unwrap();
        async move { client.send(Request::get(url).body(Bytes::new()).unwrap()).await.is_ok() }
    };
    let mesh = |expected| Trust::Mesh { source: mesh.clone(), expected };
    assert!(works(mesh(None), discovery.clone()).await);
    assert!(works(mesh(expecting("/palisade/idp")), discovery.clone()).await);
    assert!(
        !works(mesh(expecting("/service/web")), discovery.clone()).await,
        "another workload at that address"
    );
    assert!(!works(Trust::Mesh { source: stranger, expected: None }, discovery.clone()).await);
    assert!(!works(mesh(None), discovery.replace("127.0.0.1", "127.0.0.2")).await, "another name");
    assert!(!works(mesh(None), discovery.replace("https", "http")).await);
    let pem = bench.site.directory.path().join("ca.pem");
    std::fs::write(&pem, bench.site.authority.bundle().pem()).unwrap();
    assert!(works(Trust::pem_file(&pem).unwrap(), discovery).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_provider_gives_codes_and_tokens_only_to_whom_they_belong() {
    let bench = bench().await;
    for (name, password) in [("alice", "wrong"), ("carol", PASSWORD), ("alice", "")] {
        let outcome = bench.tokens("palisade-cli", name, password).await;
        assert!(matches!(outcome, Err(login::LoginError::Refused(401))), "{outcome:?}");
    }
    let verifier = "v".repeat(43);
    let challenge = jws::encode(ring::digest::digest(&ring::digest::SHA256, verifier.as_bytes()));
    let redirect = "http://127.0.0.1:1/callback";
    let start = |change: &[(&str, &str)]| {
        let mut pairs: Vec<(&str, &str)> = vec![
            ("response_type", "code"),
            ("client_id", "palisade-cli"),
            ("redirect_uri", redirect),
            ("state", "s"),
            ("scope", "openid offline_access unknown"),
            ("code_challenge", &challenge),
            ("code_challenge_method", "S256"),
        ];
        for (name, value) in change {
            pairs.retain(|(other, _)| other != name);
            pairs.push((name, value));
        }
        Url::parse_with_params(&bench.idp("/authorize"), pairs).unwrap()
    };
    let jar = Jar::default();
    for (change, error) in [
        (("code_challenge_method", "plain"), "invalid_request"),
        (("code_challenge", ""), "invalid_request"),
        (("response_type", "token"), "unsupported_response_type"),
        (("request", "x"), "request_not_supported"),
        (("prompt", "none"), "login_required"),
    ] {
        let back = jar.visit(&bench, start(&[change]).as_str()).await.location();
        let found: HashMap<_, _> = back.query_pairs().into_owned().collect();
        assert_eq!((found["error"].as_str(), found["state"].as_str()), (error, "s"));
        assert_eq!(found["iss"], bench.issuer.as_str());
    }
    let form = jar.visit(&bench, start(&[]).as_str()).await;
    let stranger = Jar::default().submit(&bench, &form, "alice", PASSWORD).await;
    assert_eq!(stranger.status, StatusCode::BAD_REQUEST, "the form belongs to another browser");
    let mut code = code_of(&jar.submit(&bench, &form, "alice", PASSWORD).await);
    let exchange = |code: &str, change: &[(&str, &str)]| {
        let mut form: HashMap<&str, &str> = [
            ("grant_type", "authorization_code"),
            ("client_id", "palisade-cli"),
            ("redirect_uri", redirect),
            ("code", code),
            ("code_verifier", &verifier),
        ]
        .into();
        form.extend(change.iter().copied());
        let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
        let bench = &bench;
        async move { bench.request(Method::POST, &bench.idp("/token"), &[], &body).await }
    };
    for change in [
        ("code_verifier", "w".repeat(43)),
        ("redirect_uri", "http://127.0.0.1:2/callback".into()),
        ("client_id", "other-cli".into()),
        ("code", "x".into()),
    ] {
        let answer = exchange(&code, &[(change.0, &change.1)]).await;
        assert_eq!(
            (answer.status, answer.json()["error"].clone()),
            (StatusCode::BAD_REQUEST, json!("invalid_grant")),
            "{change:?}"
        );
        code = code_of(&jar.visit(&bench, start(&[]).as_str()).await);
    }
    let as_gateway = exchange(&code, &[("client_id", "gateway")]).await;
    assert_eq!(as_gateway.status, StatusCode::UNAUTHORIZED, "a confidential client without its secret");
    let tokens = exchange(&code, &[]).await;
    assert_eq!(
        (tokens.status, tokens.json()["scope"].clone()),
        (StatusCode::OK, json!("openid offline_access"))
    );
    let again = exchange(&code, &[]).await;
    assert_eq!(again.json()["error"], "invalid_grant");
    let refresh = tokens.json()["refresh_token"].as_str().unwrap().to_owned();
    let refreshed = exchange("", &[("grant_type", "refresh_token"), ("refresh_token", &refresh)]).await;
    assert_eq!(refreshed.json()["error"], "invalid_grant", "the copied code has ended what it began");

    let bearer = bench.bearer().await;
    let info =
        bench.request(Method::GET, &bench.idp("/userinfo"), &[("authorization", &bearer)], "").await.json();
    assert_eq!(info, json!({"sub": "alice", "name": "ALICE", "groups": ["customers"]}));
    let none =
        bench.request(Method::GET, &bench.idp("/userinfo"), &[("authorization", "Bearer a.b.c")], "").await;
    assert_eq!(none.status, StatusCode::UNAUTHORIZED);
}

fn code_of(answer: &Answer) -> String {
    let location = answer.location();
    let code = location.query_pairs().find(|(name, _)| name == "code").map(|(_, value)| value.into_owned());
    code.unwrap_or_else(|| panic!("no code in {location}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guessing_passwords_is_slowed_down() {
    let bench = bench().await;
    let jar = Jar::default();
    let start = bench.get("/", &[("accept", HTML)]).await;
    jar.keep(&start);
    let mut page = jar.visit(&bench, start.location().as_str()).await;
    let mut statuses = Vec::new();
    for _ in 0..61 {
        page = jar.submit(&bench, &page, "alice", "wrong").await;
        statuses.push(page.status);
    }
    assert!(statuses[..60].iter().all(|status| *status == StatusCode::UNAUTHORIZED));
    assert_eq!(statuses[60], StatusCode::TOO_MANY_REQUESTS);
    let right = jar.submit(&bench, &page, "alice", PASSWORD).await;
    assert_eq!(right.status, StatusCode::TOO_MANY_REQUESTS, "not even the right one, for a moment");
    bench.site.clock.advance(Duration::from_secs(2));
    let right = jar.submit(&bench, &right, "alice", PASSWORD).await;
    assert_eq!(right.status, StatusCode::SEE_OTHER);
}
