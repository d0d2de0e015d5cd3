//! Transparent interception with real sidecars: apps that know of none, in network namespaces.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot prepare its hosts has failed"
)]

mod namespaces;
mod pair;

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};

use identity::testing::skip;
use namespaces::{Host, unavailable};
use pair::{APP, Pair, http, ok};

const APP_USER: &str = "2000";
const CAPTURED: [&str; 5] = ["on", "--outbound-port", "15001", "--uid", "0"];

/// Why these tests cannot run here.
fn unable() -> Option<&'static str> {
    let curl = Command::new("curl").arg("--version").output().is_ok();
    unavailable().or((!curl).then_some("`curl` is not installed"))
}

/// What curl, as the app's user, gets: status and body, or nothing.
fn curl(host: &Host, args: &[&str]) -> Option<(u16, String)> {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{}", host.name()));
    command.args(["setpriv", "--reuid", APP_USER, "--clear-groups", "curl", "--silent", "--noproxy", "*"]);
    let output =
        command.args(["--max-time", "30", "--write-out", "\n%{http_code}"]).args(args).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status != "000").then(|| (status.parse().unwrap(), body.to_owned()))
}

/// Gives `host` names of its own, for as long as this lives.
struct Names(std::path::PathBuf);

impl Names {
    fn new(host: &Host, text: &str) -> Self {
        let directory = std::path::Path::new("/etc/netns").join(host.name());
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("hosts"), text).unwrap();
        Self(directory)
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0).is_err();
    }
}

fn url(address: SocketAddr) -> String {
    format!("http://{address}/")
}

#[test]
fn an_apps_calls_go_through_the_mesh_and_what_it_may_not_call_is_refused_by_a_named_rule() {
    if let Some(why) = unable() {
        return skip(why);
    }
    let pair = Pair::new();
    let (left, right) = (&pair.left, &pair.right);
    http(right, APP, |_, connection| ok("the app", connection));
    let _names =
        Names::new(left, &format!("127.0.0.1 localhost rebound.example.org\n{} api.example.org\n", right.v4));
    let server = pair.server("");
    let services = right.at(8080);
    let more = format!(
        "[capture]\noutbound_port = 15001\negress = [\"{}:9000\", \"http://api.example.org:9002\", \
         \"http://*.example.org:9005\", \"tls://api.example.org:9443\", \"tls://localhost:9443\"]\n",
        right.v4,
    );
    let client = pair.client(&pair.mesh_addresses(), &services, &more);
    let _listed = right.serve("[::]:9000");
    let unlisted = right.serve("[::]:9001");
    let tls = right.serve("[::]:9443");
    http(right, "[::]:9002", |head, connection| {
        let said = if head.contains("x-palisade-user") { "spoofed" } else { "outside" };
        ok(said, connection)
    });
    left.captured(&CAPTURED);

    // Nobody listens at the service's own address: only the mesh answers there, with what policy allows.
    for service in services {
        assert_eq!(curl(left, &[&url(service)]), Some((200, "the app".to_owned())), "{service}");
        assert_eq!(curl(left, &["-X", "PUT", &url(service)]).unwrap().0, 403, "{service}");
    }

    // Outside the mesh: by address.
    let [listed, listed_v6] = right.at(9000);
    assert!(left.dial(2000, listed).starts_with("direct from"));
    assert_eq!(left.dial(2000, listed_v6), "refused", "the list has the IPv4 address only");
    for to in right.at(9001) {
        assert_eq!(left.dial(2000, to), "refused");
        client.until_logged(&["egress.denied", &to.to_string()]);
    }
    assert_eq!(unlisted.count(), 0);

    // By the name that a request says, wherever the app dials.
    let elsewhere = "10.99.0.77";
    let named = |name: &str, port: u16, more: &[&str]| {
        let resolve = format!("{name}:{port}:{elsewhere}");
        let url = format!("http://{name}:{port}/");
        curl(left, &[&["--resolve", &resolve, &url], more].concat())
    };
    let spoof = ["-H", "x-palisade-user: root"];
    assert_eq!(named("api.example.org", 9002, &spoof), Some((200, "outside".to_owned())));
    assert_eq!(named("evil.example.net", 9002, &[]).unwrap().0, 403);
    client.until_logged(&["egress.denied", "evil.example.net"]);
    // The second request of a connection is asked too.
    let [first, second] = ["api.example.org", "evil.example.net"]
        .map(|name| ["-H".to_owned(), format!("Host: {name}:9002"), format!("http://{}:9002/", right.v4)]);
    let both: Vec<&str> = first
        .iter()
        .map(String::as_str)
        .chain(["--next", "--silent", "--write-out", "\n%{http_code}"])
        .chain(second.iter().map(String::as_str))
        .collect();
    assert_eq!(curl(left, &both).unwrap().0, 403);
    assert_eq!(named("rebound.example.org", 9005, &[]).unwrap().0, 403);
    client.until_logged(&["egress.name_leads_home", "rebound.example.org"]);

    // By the name in a ClientHello.
    let hello = |name: &str| {
        let resolve = format!("{name}:9443:{elsewhere}");
        curl(left, &["--resolve", &resolve, &format!("https://{name}:9443/")])
    };
    assert_eq!(hello("evil.example.net"), None);
    client.until_logged(&["egress.denied", "evil.example.net"]);
    assert_eq!(hello("localhost"), None, "curl itself looks localhost up on loopback");
    assert_eq!(tls.count(), 0);
    assert_eq!(hello("api.example.org"), None, "what answers there speaks no TLS");
    assert_eq!(tls.count(), 1, "the listed name was not reached");
    drop(server);
}

/// An HTTPS server of Python's outside the mesh.
struct Echo {
    child: Child,
    connections: Arc<AtomicU32>,
}

impl Echo {
    /// Serves at all addresses of `host` when this returns.
    fn start(host: &Host, certificate: &Path, ports: &[&str]) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/namespaces/https_echo.py");
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", host.name())).arg("python3").arg(script);
        command.arg(certificate).args(ports).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let connections = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&connections);
        std::thread::spawn(move || {
            while let Some(Ok(_connection)) = lines.next() {
                counted.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { child, connections }
    }

    /// How many handshakes it has finished with clients whose answers have been read.
    fn connections(&self) -> u32 {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _gone = self.child.kill().is_err();
        let _reaped = self.child.wait().is_err();
    }
}

/// An authority that no system knows, and its certificate for one name.
const AUTHORITY: &str = "
    openssl ecparam -name prime256v1 -genkey -noout -out outside.key
    openssl req -x509 -new -key outside.key -days 2 -subj '/CN=outside' -out outside.crt
    name=api.example.org
    openssl req -new -newkey rsa:2048 -nodes -keyout $name.key -subj /CN=$name -out $name.csr
    echo subjectAltName=DNS:$name > $name.ext
    openssl x509 -req -in $name.csr -CA outside.crt -CAkey outside.key -CAcreateserial -days 2 \
      -extfile $name.ext -out $name.pem
    cat $name.key >> $name.pem";

#[test]
fn what_an_app_says_in_clear_text_leaves_in_tls_made_by_its_sidecar() {
    if let Some(why) = unable() {
        return skip(why);
    }
    let pair = Pair::new();
    let (left, right) = (&pair.left, &pair.right);
    let made = Command::new("sh").args(["-ec", AUTHORITY]).current_dir(pair.path("")).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let _names = Names::new(
        left,
        &format!(
            "127.0.0.1 localhost rebound.example.org\n{} api.example.org wrong.example.org plain.example.org\n",
            right.v4
        ),
    );
    let egress = "egress = [\"https://api.example.org\", \"https://api.example.org:8443\", \
                  \"https://wrong.example.org\", \"https://rebound.example.org\", \
                  \"https://plain.example.org:9000\"]\n";
    let capture = format!("[capture]\noutbound_port = 15001\n{egress}egress_ca = \"outside.crt\"\n");
    let client = pair.client(&pair.mesh_addresses(), &right.at(8080), &capture);
    let server = Echo::start(right, &pair.path("api.example.org.pem"), &["443", "8443"]);
    let _clear_text = right.serve("[::]:9000");
    left.captured(&CAPTURED);
    let named = |url: &str, more: &[&str]| {
        let (name, port) =
            url.split_once("://").unwrap().1.split_once('/').unwrap().0.split_once(':').unwrap();
        let resolve = format!("{name}:{port}:10.99.0.77");
        curl(left, &[&["--resolve", &resolve, url], more].concat())
    };

    // By the default port of either scheme, and by another; Host says where it goes.
    let (status, said) =
        named("http://api.example.org:80/one?x=1", &["-H", "x-palisade-user: root"]).unwrap();
    assert_eq!((status, said.as_str()), (200, "GET /one?x=1 host=api.example.org user=None"));
    let (_, said) = named("http://api.example.org:443/", &["-X", "POST", "-d", "money"]).unwrap();
    assert_eq!(said, "POST / host=api.example.org user=None money");
    let (_, said) = named("http://api.example.org:8443/", &[]).unwrap();
    assert_eq!(said, "GET / host=api.example.org:8443 user=None");
    // Three requests to one origin went over one connection to it.
    assert_eq!(server.connections(), 2);

    // Nobody is taken for another, and names lead neither home nor to clear text.
    let before = server.connections();
    assert_eq!(named("http://wrong.example.org:80/", &[]).unwrap().0, 503);
    client.until_logged(&["TLS with wrong.example.org", "not valid for name"]);
    assert_eq!(server.connections(), before, "nothing was said to it");
    assert_eq!(named("http://rebound.example.org:80/", &[]).unwrap().0, 403);
    client.until_logged(&["egress.name_leads_home", "rebound.example.org"]);
    assert_eq!(named("http://plain.example.org:9000/", &[]).unwrap().0, 503);
    client.until_logged(&["TLS with plain.example.org"]);
    // The app's own TLS is another rule.
    assert_eq!(
        curl(
            left,
            &["--insecure", "--resolve", "api.example.org:443:10.99.0.77", "https://api.example.org/"]
        ),
        None
    );
    client.until_logged(&["egress.denied", "api.example.org"]);
    client.end("TERM");

    // An authority that vouches for nobody here.
    let capture = format!("[capture]\noutbound_port = 15001\n{egress}egress_ca = \"ca.crt\"\n");
    let client = pair.client(&pair.mesh_addresses(), &right.at(8080), &capture);
    assert_eq!(named("http://api.example.org:80/", &[]).unwrap().0, 503);
    client.until_logged(&["TLS with api.example.org", "UnknownIssuer"]);
    client.end("TERM");
}

#[test]
fn an_app_dials_a_service_that_speaks_first_and_knows_of_no_sidecar() {
    if let Some(why) = unable() {
        return skip(why);
    }
    let pair = Pair::new();
    let (left, right) = (&pair.left, &pair.right);
    let app = right.serve(APP);
    let server = pair.plain_server();
    let services = right.at(8080);
    let more = "protocol = \"tcp\"\n[capture]\noutbound_port = 15001\n";
    let client = pair.client(&pair.mesh_addresses(), &services, more);
    left.captured(&CAPTURED);
    // Nobody listens at the service's own address, and its app sees its own sidecar only.
    for service in services {
        assert_eq!(left.dial(2000, service), "direct from 127.0.0.1", "{service}");
    }
    assert_eq!(app.count(), 2);
    client.end("TERM");
    server.end("TERM");
}

#[test]
fn what_strangers_dial_at_the_apps_port_is_served_over_mtls_or_refused_with_their_address() {
    if let Some(why) = unable() {
        return skip(why);
    }
    let pair = Pair::new();
    let (left, right) = (&pair.left, &pair.right);
    http(right, APP, |_, connection| ok("the app", connection));
    let server = pair.server("[capture]\ninbound_port = 15006\n");
    let ports = ["--inbound-port", "15006", "--mesh-port", "15606", "--app-port", "18080,18081"];
    right.captured(&[&["on"], &ports[..]].concat());

    // A sidecar that knows nothing but the app's own address.
    for endpoint in right.at(18080) {
        let client = pair.client(&[endpoint], &[], "");
        let answer = left.within(|| pair::get(pair::CALLS.parse().unwrap(), "/").unwrap());
        assert_eq!(answer, (200, b"the app".to_vec()), "{endpoint}");
        client.end("TERM");
    }
    // Somebody without an identity, and somebody at a port where no app is.
    for (to, from) in right.at(18080).into_iter().zip([left.v4, left.v6]) {
        assert_eq!(curl(left, &[&url(to)]), None, "{to}");
        server.until_logged(&["tls.plain_text", from]);
    }
    for to in right.at(18081) {
        assert_eq!(left.dial(2000, to), "refused");
        server.until_logged(&["capture.no_app", &to.to_string()]);
    }
}

#[test]
fn an_apps_calls_never_pass_around_its_sidecar_while_that_restarts() {
    const RESTARTS: usize = 6;
    if let Some(why) = unable() {
        return skip(why);
    }
    let pair = Pair::new();
    let (left, right) = (&pair.left, &pair.right);
    http(right, APP, |_, connection| ok("through the mesh", connection));
    // Whoever goes around the sidecar is heard here.
    let beyond = right.serve("[::]:8080");
    let _server = pair.server("");
    left.captured(&CAPTURED);
    let services = right.at(8080);
    let start = || pair.client(&pair.mesh_addresses(), &services, "[capture]\noutbound_port = 15001\n");
    let (heard, hears) = mpsc::channel();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let heard = heard;
            while !done.load(Ordering::SeqCst) {
                for service in services {
                    let answer = curl(left, &[&url(service)]);
                    let _nobody_asks = heard.send(answer.is_some_and(|(status, _)| status == 200)).is_err();
                }
            }
        });
        // Of both families after each change.
        let hear = |wanted: bool| {
            for _ in 0..2 {
                while hears.recv().unwrap() != wanted {}
            }
        };
        for restart in 0..RESTARTS {
            let client = start();
            hear(true);
            client.end(if restart % 2 == 0 { "TERM" } else { "KILL" });
            hear(false);
        }
        done.store(true, Ordering::SeqCst);
    });
    assert_eq!(beyond.count(), 0, "somebody went around the sidecar");
}
