//! Transparent interception, in network namespaces: whoever dials does not know of the sidecar.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot prepare its hosts has failed")]

mod namespaces;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use identity::testing::skip;
use namespaces::{StandIn, Way, hosts, ip, palisade, unavailable};
use sidecar::capture::Egress;

const SIDECAR: u32 = 0;
const APP: u32 = 2000;
const OTHER: u32 = 3000;
const OUTBOUND: &[&str] = &["on", "--outbound-port", "15001", "--uid", "0"];
const INBOUND: &[&str] = &["on", "--inbound-port", "15006"];

fn with<'a>(options: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    options.iter().chain(more).copied().collect()
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

#[test]
fn what_the_app_dials_reaches_the_sidecar_which_knows_whom_it_was_meant_for() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let (left, right) = hosts();
    let beyond = right.serve("[::]:8080");
    left.captured(OUTBOUND);
    let sidecar = StandIn::start(&left, Way::Out, 15001);

    for (to, from) in right.at(8080).into_iter().zip([left.v4, left.v6]) {
        assert_eq!(left.dial(APP, to), format!("Out {to} from {from}"));
    }
    assert_eq!(beyond.count(), 0);

    // What the sidecar dials itself goes out: it does not come back to it.
    for (to, from) in right.at(8080).into_iter().zip([left.v4, left.v6]) {
        assert_eq!(left.dial(SIDECAR, to), format!("direct from {from}"));
        let dialled = left.within(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(Egress::connect(to)).unwrap().peer_addr().unwrap()
        });
        assert_eq!(dialled, to);
    }

    // A neighbour at the host's own address is somebody else too; loopback is the app's own affair.
    for to in left.at(8080) {
        assert!(left.dial(APP, to).starts_with(&format!("Out {to} from")), "{to}");
    }
    let _neighbour = left.serve("127.0.0.1:9000");
    assert_eq!(left.dial(APP, loopback(9000)), "direct from 127.0.0.1");

    // The listener serves nobody who dials it by itself.
    assert_eq!(sidecar.refused(), [] as [&str; 0]);
    for listener in ["127.0.0.1:15001", "[::1]:15001"] {
        assert_eq!(left.dial(APP, listener.parse().unwrap()), "refused");
    }
    assert_eq!(sidecar.refused(), ["capture.direct", "capture.direct"]);
}

#[test]
fn what_others_dial_reaches_the_sidecar_with_both_addresses_as_they_were() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let (left, right) = hosts();
    let app = right.serve("[::]:8080");
    right.captured(&with(INBOUND, &["--virtual-cidr", "10.77.0.0/24,fd77::/64"]));
    let sidecar = StandIn::start(&right, Way::In, 15006);

    for (to, from) in right.at(8080).into_iter().zip([left.v4, left.v6]) {
        assert_eq!(left.dial(APP, to), format!("In {to} from {from}"));
    }
    // Addresses that are routed to the host without being its own.
    ip(&["-n", left.name(), "route", "add", "10.77.0.0/24", "via", right.v4]);
    ip(&["-n", left.name(), "route", "add", "fd77::/64", "via", right.v6]);
    for (to, from) in [("10.77.0.5:80", left.v4), ("[fd77::5]:80", left.v6)] {
        assert_eq!(left.dial(APP, to.parse().unwrap()), format!("In {to} from {from}"));
    }
    assert_eq!(app.count(), 0);

    // The listener itself is reached by nobody from outside: it would be meant for itself.
    for to in right.at(15006) {
        assert_eq!(left.dial(APP, to), "refused");
    }
    assert_eq!(sidecar.refused(), ["capture.loop", "capture.loop"]);
    // On its way to the app the sidecar is not captured again, by either family.
    for app in ["127.0.0.1:8080", "[::1]:8080"] {
        assert!(right.dial(SIDECAR, app.parse().unwrap()).starts_with("direct from"), "{app}");
    }
    // What this host dials gets its answers: they come in too, and are nobody's requests.
    let _elsewhere = left.serve("[::]:9000");
    for to in left.at(9000) {
        assert!(right.dial(APP, to).starts_with("direct from"), "{to}");
    }
}

#[test]
fn what_is_excluded_passes_and_nothing_else() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let (left, right) = hosts();
    let _servers = [22, 53, 8080, 8081, 8082].map(|port| right.serve(&format!("[::]:{port}")));
    left.captured(&with(OUTBOUND, &["--exclude-outbound-ports", "8081,8082", "--exclude-uid", "3000"]));
    let _out = StandIn::start(&left, Way::Out, 15001);
    let direct = |uid, port| {
        let said = right.at(port).map(|to| left.dial(uid, to).starts_with("direct from"));
        assert_eq!(said[0], said[1], "IPv4 and IPv6 differ");
        said[0]
    };
    for (uid, port, passes) in [
        (APP, 8080, false),
        (APP, 8081, true),
        (APP, 8082, true),
        (OTHER, 8080, true),
        (APP, 53, true),
        (APP, 22, false),
    ] {
        assert_eq!(direct(uid, port), passes, "user {uid} to port {port}");
    }
    let networks = format!("{},{}", right.v4, right.v6);
    left.captured(&with(OUTBOUND, &["--exclude-cidr", &networks, "--capture-dns"]));
    assert!(direct(APP, 8080));
    left.captured(&with(OUTBOUND, &["--exclude-cidr", "10.98.0.0/16,fd98::/64", "--capture-dns"]));
    assert!(!direct(APP, 8080) && !direct(APP, 53));
    // Whoever is not the app is none of the sidecar's business, where the app is known.
    left.captured(&with(OUTBOUND, &["--app-uid", "2000"]));
    assert!(!direct(APP, 8080) && direct(OTHER, 8080));

    left.captured(&["off"]);
    right.captured(&with(INBOUND, &["--exclude-inbound-port", "8081", "--admin-port", "8082"]));
    let _in = StandIn::start(&right, Way::In, 15006);
    for (port, passes) in [(8080, false), (8081, true), (8082, true), (22, true), (53, false)] {
        assert_eq!(direct(APP, port), passes, "inbound port {port}");
    }
    right.captured(&with(INBOUND, &["--app-port", "8080", "--capture-ssh"]));
    assert!(!direct(APP, 8080) && direct(APP, 8081));
}

#[test]
fn a_cgroup_is_excluded_with_those_below_it() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let Some(tree) = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let mounted = fields.next()?;
        (fields.next()? == "cgroup2" && mounted.starts_with("/sys/fs/cgroup")).then_some(mounted)
    }) else {
        return skip("this host has no cgroup v2 tree");
    };
    let name = format!("palisade-test-{}", std::process::id());
    let groups =
        Groups([format!("{tree}/{name}/in/deeper"), format!("{tree}/{name}/in"), format!("{tree}/{name}")]);
    std::fs::create_dir_all(&groups.0[0]).unwrap();

    let (left, right) = hosts();
    let _beyond = right.serve("[::]:8080");
    let excluded = format!("{name}/in");
    left.captured(&with(OUTBOUND, &["--exclude-cgroup", &excluded]));
    let _sidecar = StandIn::start(&left, Way::Out, 15001);
    // The process moves itself before it dials; a shell has a client of its own.
    let script = "echo $$ > $0/cgroup.procs; exec setpriv --reuid 2000 --clear-groups bash -c 'cat < /dev/tcp/$0/8080' $1";
    for (group, passes) in [(&groups.0[0], true), (&groups.0[1], true), (&groups.0[2], false)] {
        let said = left.run("sh", &["-c", script, group, right.v4]);
        assert_eq!(said.starts_with("direct from"), passes, "{group}: {said}");
    }
    let refused = left.capture(&with(OUTBOUND, &["--exclude-cgroup", "palisade-no-such-cgroup"]));
    assert_eq!(refused.status.code(), Some(2));
}

/// Control groups, deepest first, removed at the end.
struct Groups([String; 3]);

impl Drop for Groups {
    fn drop(&mut self) {
        for group in &self.0 {
            let _gone = std::fs::remove_dir(group).is_err();
        }
    }
}

#[test]
fn connections_from_before_go_on() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let (left, right) = hosts();
    for to in right.at(8080) {
        let listener = right.within(|| TcpListener::bind(to).unwrap());
        let mut dialled = left.within(|| TcpStream::connect(to).unwrap());
        let (mut accepted, _) = listener.accept().unwrap();
        left.captured(OUTBOUND);
        right.captured(INBOUND);
        let mut four = [0; 4];
        for _ in 0..3 {
            dialled.write_all(b"ping").unwrap();
            accepted.read_exact(&mut four).unwrap();
            accepted.write_all(b"pong").unwrap();
            dialled.read_exact(&mut four).unwrap();
            assert_eq!(&four, b"pong");
        }
        left.captured(&["off"]);
        right.captured(&["off"]);
    }
}

#[test]
fn on_and_off_are_idempotent_repair_what_is_half_there_and_leave_nothing() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let (host, _other) = hosts();
    host.run("nft", &["add", "table", "inet", "somebody_elses"]);
    let before = host.state();
    let options = with(OUTBOUND, &["--inbound-port", "15006", "--guard-loopback", "--app-uid", "2000"]);
    let show = || {
        let output = host.capture(&["show"]);
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };

    assert_eq!(show(), (Some(0), "capture is off\n".to_owned()));
    assert!(host.captured(&options).contains("capture is on"));
    let once = host.state();
    assert_ne!(once, before);
    assert!(host.captured(&options).contains("already"));
    assert_eq!(host.state(), once);
    assert_eq!(show().0, Some(0));

    type Damage<'a> = &'a dyn Fn();
    let damages: [(&str, Damage<'_>); 5] = [
        ("- the routing rule for IPv6", &|| {
            drop(host.run("ip", &["-6", "rule", "del", "priority", "15006"]))
        }),
        ("- the route for IPv4", &|| drop(host.run("ip", &["route", "flush", "table", "15006"]))),
        ("- tcp dport 53 return", &|| {
            drop(host.run("nft", &["flush", "chain", "inet", "palisade", "outbound"]))
        }),
        ("+ accept", &|| drop(host.run("nft", &["insert", "rule", "inet", "palisade", "inbound", "accept"]))),
        ("+ return comment \"--capture-dns\"", &|| {
            let rule =
                ["add", "rule", "inet", "palisade", "written_by", "return", "comment", "\"--capture-dns\""];
            drop(host.run("nft", &rule));
        }),
    ];
    for (difference, damage) in damages {
        damage();
        // The last one changes what `show` alone takes for the intention; with the options it cannot.
        let output = host.capture(&with(&["show"], &options[1..]));
        let shown = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.code() == Some(1) && shown.contains(difference), "{difference}: {shown}");
        assert_ne!(show().0, Some(0), "{difference}");
        assert!(!host.captured(&options).contains("already"), "{difference}");
        assert_eq!(host.state(), once, "{difference}");
    }

    let json: serde_json::Value = serde_json::from_str(&host.captured(&["show", "--json"])).unwrap();
    assert_eq!(json["state"], "on");
    assert_eq!(json["options"][0], "--outbound-port 15001");

    assert!(host.captured(&["off"]).contains("capture is off"));
    assert_eq!(host.state(), before);
    assert!(host.captured(&["off"]).contains("already"));
    assert_eq!(host.state(), before);
}

#[test]
fn nothing_passes_around_the_sidecar_while_it_restarts() {
    const RESTARTS: usize = 10;
    if let Some(why) = unavailable() {
        return skip(why);
    }
    for (way, options, port) in [(Way::Out, OUTBOUND, 15001), (Way::In, INBOUND, 15006)] {
        let (left, right) = hosts();
        let host = if matches!(way, Way::Out) { &left } else { &right };
        let beyond = right.serve("[::]:8080");
        host.captured(options);
        let (heard, hears) = mpsc::channel();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let heard = heard;
                while !done.load(Ordering::SeqCst) {
                    for to in right.at(8080) {
                        let _nobody_asks = heard.send(left.dial(APP, to)).is_err();
                    }
                }
            });
            // Twice: the second was dialled after the change, and so by both families.
            let hear = |wanted: &str| {
                for _ in 0..2 {
                    while !hears.recv().unwrap().starts_with(wanted) {}
                }
            };
            for _ in 0..RESTARTS {
                let sidecar = StandIn::start(host, way, port);
                hear(&format!("{way:?}"));
                drop(sidecar);
                hear("refused");
                // `on` again, as a service manager would at each start.
                host.captured(options);
            }
            done.store(true, Ordering::SeqCst);
        });
        assert_eq!(beyond.count(), 0, "{way:?}: somebody went around the sidecar");
        // The listener was there all the time.
        host.captured(&["off"]);
        assert!(left.dial(APP, right.at(8080)[0]).starts_with("direct from"));
    }
}

#[test]
fn a_table_of_somebody_elses_is_left_alone() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let (host, _other) = hosts();
    host.run("nft", &["add table inet palisade; add chain inet palisade written_by"]);
    let before = host.state();
    for verb in [OUTBOUND, &["show"]] {
        let output = host.capture(verb);
        assert_eq!(output.status.code(), Some(1), "{verb:?}");
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(said.contains("is not ours"), "{said}");
        assert_eq!(host.state(), before);
    }
    host.captured(&["off"]);
    assert_eq!(host.state(), before);
}

#[test]
fn what_the_kernel_lacks_is_named() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let (host, _other) = hosts();
    let before = host.state();
    for (lacking, word, option, named) in [
        ("tproxy ip6", "tproxy ip6", "--inbound-port=15006", "TPROXY for IPv6"),
        ("redirect", "redirect", "--outbound-port=15001", "REDIRECT"),
        ("fib", "fib daddr", "--inbound-port=15006", "fib"),
    ] {
        // Answers as nft does where the kernel lacks a module.
        let bin = tempfile::tempdir().unwrap();
        let nft = bin.path().join("nft");
        let real = Command::new("sh").args(["-c", "command -v nft"]).output().unwrap().stdout;
        let real = String::from_utf8(real).unwrap();
        let script = format!(
            "#!/bin/sh\nrules=$(cat)\ncase $rules in *'{word}'*)\n  \
             echo 'Error: Could not process rule: No such file or directory' >&2; exit 1;;\nesac\n\
             printf '%s\\n' \"$rules\" | exec {} \"$@\"\n",
            real.trim()
        );
        std::fs::write(&nft, script).unwrap();
        std::fs::set_permissions(&nft, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", bin.path().display(), std::env::var("PATH").unwrap());
        let output = palisade(host.name(), &["on", option, "--uid", "0"]).env("PATH", path).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{lacking}: {said}");
        assert!(
            said.contains(&format!("lacks {named}")) && said.contains("CONFIG_NFT_"),
            "{lacking}: {said}"
        );
        assert_eq!(host.state(), before, "{lacking}");
    }
}

#[test]
fn loopback_ports_are_for_those_they_are_meant_for() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let (host, _other) = hosts();
    let _app = host.serve("[::]:8080");
    let _calls = [host.serve("127.0.0.1:7001"), host.serve("[::1]:7001")];
    let _sidecar = StandIn::start(&host, Way::Out, 15001);
    let reaches = |uid, port| {
        let [v4, v6] = ["127.0.0.1", "::1"].map(|address| {
            host.dial(uid, SocketAddr::new(address.parse().unwrap(), port)).starts_with("direct from")
        });
        assert_eq!(v4, v6, "IPv4 and IPv6 differ");
        v4
    };
    assert!(reaches(OTHER, 8080) && reaches(OTHER, 7001), "without the guard everybody reaches everything");

    let guard = ["--guard-loopback", "--app-uid", "2000", "--app-port", "8080", "--call-port", "7001"];
    host.captured(&with(OUTBOUND, &guard));
    for (uid, port, may) in [
        (OTHER, 8080, false),
        (OTHER, 7001, false),
        (APP, 7001, true),
        // The app's port has one client; the app needs none to speak with itself.
        (APP, 8080, false),
        (SIDECAR, 8080, true),
    ] {
        assert_eq!(reaches(uid, port), may, "user {uid} to port {port}");
    }
    // By the host's other addresses too: the app may listen on all of them.
    for to in host.at(8080) {
        assert_eq!(host.dial(OTHER, to), "refused");
    }
    assert_eq!(host.dial(OTHER, loopback(15001)), "refused");
    let json: serde_json::Value = serde_json::from_str(&host.captured(&["show", "--json"])).unwrap();
    assert_eq!(json["connections"]["refused, not the sidecar"], 6);
    assert_eq!(json["connections"]["refused, not the app"], 3);
    // What the app dials at other hosts comes to the guarded port by way of the rules, and passes.
    let meant: SocketAddr = "10.99.0.2:443".parse().unwrap();
    assert_eq!(host.dial(APP, meant), format!("Out {meant} from {}", host.v4));
}
