//! What goes on after its decision, through two sidecars: WebSockets with an independent client and app, answers that
//! stream, and their end when a policy or an authority no longer stands behind them.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set its stage has failed")]

mod script;
mod stage;

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use identity::testing::TestAuthority;
use script::Script;
use stage::{DEADLINE, Stage};

/// One end of a WebSocket.
fn websocket(args: &[&str]) -> Option<Script> {
    Script::start("streams/websocket.py", "websockets.sync.server", args)
}

fn policies() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/streams/policies")
}

#[test]
fn websockets_pass_and_only_where_the_map_lets_them() {
    let Some(app) = websocket(&["app"]) else { return };
    let stage = Stage::before(format!("127.0.0.1:{}", app.says()).parse().unwrap(), &policies());
    let (server, client) = (stage.start("server"), stage.start("client"));
    let talking = websocket(&["talk", &stage.client.port().to_string()]).unwrap();
    assert_eq!(talking.says(), "talked");
    server.end();
    client.end();
    let log = fs::read_to_string(stage.path("server.access.log")).unwrap();
    assert!(log.contains("\"status\":101") && log.contains("client-joins-open-rooms"), "{log}");
    assert!(log.contains("request.upgrade"), "{log}");
}

#[test]
fn a_websocket_ends_when_a_new_policy_denies_it() {
    let Some(app) = websocket(&["app"]) else { return };
    let stage = Stage::before(format!("127.0.0.1:{}", app.says()).parse().unwrap(), &policies());
    let (server, _client) = (stage.start("server"), stage.start("client"));
    let member = websocket(&["stay", &stage.client.port().to_string()]).unwrap();
    assert_eq!(member.says(), "joined");
    rewrite(&stage, "Room::\"closed\"", "Room::\"lobby\"");
    server.hang_up();
    assert_eq!(member.says(), "ended");
    server.hears("a stream was ended");
}

/// An answer without end, as server-sent events are; says when the client is gone.
fn feeds() -> (SocketAddr, Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, gone) = channel();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let sender = sender.clone();
            thread::spawn(move || {
                let mut head = [0; 4096];
                if stream.read(&mut head).unwrap() == 0 {
                    return;
                }
                let answer = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n\
                              9\r\ndata: 1\n\n\r\n";
                stream.write_all(answer.as_bytes()).unwrap();
                let end = stream.read(&mut head);
                assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
                // Nobody may be listening any more.
                let _heard = sender.send(()).is_ok();
            });
        }
    });
    (address, gone)
}

/// Follows a feed up to its first event.
fn follow(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    write!(stream, "GET /feeds/news HTTP/1.1\r\nHost: backend\r\n\r\n").unwrap();
    let mut heard = Vec::new();
    while !heard.ends_with(b"data: 1\n\n\r\n") {
        let mut byte = [0];
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&heard));
        heard.extend(byte);
    }
    stream
}

/// It ended, and not as a whole answer does.
#[track_caller]
fn cut_short(mut stream: TcpStream) {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => assert_eq!(rest, b"", "nothing came after the first event"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

fn rewrite(stage: &Stage, from: &str, to: &str) {
    let rules = stage.path("policies/services/backend/backend.cedar");
    let text = fs::read_to_string(&rules).unwrap();
    assert!(text.contains(from));
    fs::write(&rules, text.replace(from, to)).unwrap();
}

#[test]
fn an_answer_that_streams_goes_on_under_a_policy_that_permits_it_and_no_other() {
    let (app, gone) = feeds();
    let stage = Stage::before(app, &policies());
    let (server, _client) = (stage.start("server"), stage.start("client"));
    let stream = follow(stage.client);
    rewrite(&stage, "Room::\"closed\"", "Room::\"other\"");
    server.hang_up();
    server.hears("policies reloaded");
    stream.set_nonblocking(true).unwrap();
    assert_eq!(stream.peek(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock, "it goes on");
    stream.set_nonblocking(false).unwrap();
    rewrite(&stage, "Feed::\"news\"", "Feed::\"sports\"");
    server.hang_up();
    server.hears("a stream was ended");
    cut_short(stream);
    gone.recv_timeout(DEADLINE).unwrap();
}

#[test]
fn what_an_authority_let_in_ends_with_it() {
    let (app, gone) = feeds();
    let stage = Stage::before(app, &policies());
    let other = TestAuthority::new("mesh.test");
    let (ours, both) = (&stage.authority, [&stage.authority, &other]);
    stage.issue_by("client", "/ns/default/sa/client", &other, &both);
    stage.issue_by("server", "/ns/default/sa/server", ours, &both);
    let (server, _client) = (stage.start("server"), stage.start("client"));
    let stream = follow(stage.client);
    stage.trust("server", &[ours]);
    let line = server.hears("no more requests on this connection");
    assert!(line.contains("tls.revoked_svid"), "{line}");
    cut_short(stream);
    gone.recv_timeout(DEADLINE).unwrap();
    // Nor does it come back.
    assert_eq!(stage::get(stage.client, "/feeds/news").0, 502);
}
