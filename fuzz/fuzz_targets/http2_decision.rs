//! Frames of HTTP/2 in any order lead to a decision about one canonical request, an error of the protocol, or nothing:
//! never to a panic, and never to a connection that outlives its client.
#![no_main]

use std::fs;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use identity::{Scope, SpiffeId, SystemClock, TrustDomain};
use libfuzzer_sys::fuzz_target;
use policy::{Caller, Layer, Occasion, Policies, Principal, ServicePolicy, Verdict};
use sidecar::Body;
use sidecar::server::{Connection, Handler, Limits};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

const FILES: [(&str, &str); 4] = [
    (
        "mesh.cedarschema",
        "namespace Mesh { entity Workload = { service: String, trust_domain: String }; entity Client;\n\
         type User = { id: String, issuer: String, client: String, scopes: Set<String>, groups: Set<String>, auth_time: Long };\n\
         type Context = { user?: User, chain: Set<String>, now: Long }; }",
    ),
    (
        "services/bank/bank.cedarschema",
        "namespace Bank { entity Account; action Read appliesTo { principal: [Mesh::Workload], resource: [Account], \
         context: Mesh::Context }; }",
    ),
    (
        "services/bank/bank.cedar",
        "@id(\"all\") permit (principal is Mesh::Workload, action == Bank::Action::\"Read\", resource);",
    ),
    (
        "services/bank/map.toml",
        "[[route]]\nmatch = \"GET /accounts/{id:int}\"\naction = \"Read\"\nobject = 'Account::\"{id}\"'\n",
    ),
];
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

struct Decides(Arc<ServicePolicy>);

impl Decides {
    fn decide(&self, parts: &http::request::Parts) -> bool {
        if sidecar::headers::check_framing_of_upgrade(parts).is_err() {
            return false;
        }
        let Ok(mapped) = self.0.map(parts) else { return false };
        let caller = Caller {
            principal: Principal::Workload(SpiffeId::new("spiffe://mesh.test/service/web").unwrap()),
            user: None,
            chain: Arc::new([]),
            address: None,
        };
        let occasion = Occasion {
            receipt: "r-7k2m0q9xw4e8t5hz".parse().unwrap(),
            now: Duration::from_secs(1_700_000_000),
            layer: Layer::Sidecar,
            method: parts.method.as_str(),
            target: parts.uri.path(),
            transaction: None,
            trace_id: None,
        };
        matches!(self.0.decide(&caller, &mapped, &Default::default(), &occasion), Verdict::Permit(_))
    }
}

impl Handler for Decides {
    async fn handle(self: Arc<Self>, _: Arc<Connection>, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let permitted = self.decide(&parts);
        if permitted {
            let id = parts.uri.path().strip_prefix("/accounts/").unwrap();
            assert!(!id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit()), "{id}");
            assert_eq!(parts.method, "GET");
        }
        let _read = Limited::new(body, 1 << 20).collect().await;
        let status = if permitted { StatusCode::OK } else { StatusCode::FORBIDDEN };
        Response::builder().status(status).body(sidecar::empty()).unwrap()
    }
}

struct Stage {
    runtime: Runtime,
    address: SocketAddr,
    scope: Scope,
}

fn stage() -> &'static Stage {
    static STAGE: OnceLock<Stage> = OnceLock::new();
    STAGE.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("fuzz-http2-decision-{}", std::process::id()));
        for (name, text) in FILES {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let policies = Policies::load(&folder, &TrustDomain::new("mesh.test").unwrap());
        fs::remove_dir_all(&folder).unwrap();
        let policy = policies.unwrap_or_else(|problems| panic!("{problems}")).service("bank").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (scope, handler) = (Scope::new(), Arc::new(Decides(policy)));
        let address = runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let clock = SystemClock::shared();
            sidecar::server::serve("fuzz", listener, None, Limits::default(), &scope, clock, handler);
            address
        });
        Stage { runtime, address, scope }
    })
}

/// Frames whose lengths are true: kind, flags, stream, how much of what follows is theirs.
fn frames(mut input: &[u8]) -> Vec<u8> {
    // SETTINGS first, as a client begins.
    let mut bytes = [PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat();
    while let [kind, flags, stream, length, rest @ ..] = input {
        let (payload, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        bytes.extend([0, 0, payload.len() as u8, kind % 12, *flags, 0, 0, 0, *stream]);
        bytes.extend(payload);
        input = rest;
    }
    bytes.extend(input);
    bytes
}

fuzz_target!(|input: &[u8]| {
    let Stage { runtime, address, scope } = stage();
    runtime.block_on(async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // The server may have had enough before the end.
        let _sent = stream.write_all(&frames(input)).await;
        let _ended = stream.shutdown().await;
        let mut said = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut said));
        let _reset = read.await.expect("the connection outlives its client");
    });
    assert_eq!(scope.panics(), 0);
});
