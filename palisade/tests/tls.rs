//! TLS as strangers try it: an auditor's scanner, and a client whose handshakes are wrong in one thing each.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot set its stage has failed")]

mod script;
mod stage;

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use script::Script;
use serde_json::Value;
use stage::Stage;

/// What the scanner holds against certificates that live minutes and name a workload instead of a host.
const NOT_FOR_BROWSERS: [&str; 6] = [
    "cert_chain_of_trust",
    "cert_expirationStatus",
    "cert_notAfter",
    "cert_revocation",
    "cert_trust",
    "DNS_CAArecord",
];

#[test]
fn security_8_a_scanner_finds_tls_1_3_no_session_to_resume_and_nothing_to_complain_of() {
    if Command::new("testssl").arg("--version").output().is_err() {
        identity::testing::skip("no testssl here (Debian package testssl.sh)");
        return;
    }
    let stage = Stage::new();
    let _server = stage.start("server");
    let report = stage.path("testssl.json");
    let scan = Command::new("testssl")
        .args(["--quiet", "--color", "0", "--warnings", "off", "--ip", "one", "--jsonfile"])
        .arg(&report)
        .args(["--protocols", "--std", "--fs", "--server-defaults", "--vulnerable"])
        .arg(stage.door.to_string())
        .output()
        .unwrap();
    let lines: Vec<Value> = serde_json::from_slice(&fs::read(&report).unwrap_or_default())
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&scan.stdout)));
    let text = |line: &Value, key: &str| line[key].as_str().unwrap_or_default().to_owned();
    let found: BTreeMap<String, (String, String)> = lines
        .iter()
        .map(|line| (text(line, "id"), (text(line, "severity"), text(line, "finding"))))
        .collect();
    for (protocol, offered) in [
        ("SSLv2", "not offered"),
        ("SSLv3", "not offered"),
        ("TLS1", "not offered"),
        ("TLS1_1", "not offered"),
        ("TLS1_2", "not offered"),
        ("TLS1_3", "offered"),
        ("sessionresumption_ticket", "not supported"),
        ("sessionresumption_ID", "No Session ID, no resumption"),
    ] {
        let said = found.get(protocol).is_some_and(|(_, finding)| finding.starts_with(offered));
        assert!(said, "{protocol}: {found:#?}");
    }
    for weakness in ["heartbleed", "CCS", "secure_client_renego", "fallback_SCSV", "cipherlist_LOW", "PFS"] {
        assert!(found.get(weakness).is_some_and(|(how, _)| how == "OK"), "{weakness}: {found:#?}");
    }
    let complaints: Vec<_> = found
        .iter()
        .filter(|(id, (severity, _))| {
            // WARN is what the scanner could not try: what must have been tried is asked for above.
            !matches!(severity.as_str(), "OK" | "INFO" | "DEBUG" | "WARN")
                && !NOT_FOR_BROWSERS.contains(&id.as_str())
        })
        .collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
}

/// The case, and what may become of it. A connection that is closed with bytes unread can lose the alert on its way.
const HANDSHAKES: [(&str, &[&str]); 47] = [
    ("a good hello", &["hello"]),
    ("one byte a record", &["hello"]),
    ("values that nobody knows", &["hello"]),
    ("an unknown session to resume", &["alert illegal_parameter"]),
    ("TLS 1.2 at most", &["alert protocol_version"]),
    ("SSL 2", &["closed"]),
    ("no groups", &["alert handshake_failure"]),
    ("no key share", &["alert handshake_failure"]),
    ("no signature algorithms", &["alert handshake_failure"]),
    ("groups that nobody has", &["alert handshake_failure"]),
    ("a share that is no point", &["alert illegal_parameter"]),
    ("a share of no bytes", &["alert decode_error"]),
    ("an all-zero share", &["alert illegal_parameter"]),
    ("no common cipher", &["alert handshake_failure"]),
    ("an extension twice", &["alert illegal_parameter"]),
    ("a session to resume, not last", &["alert illegal_parameter"]),
    ("compression", &["alert illegal_parameter"]),
    ("a session id of 33 bytes", &["alert decode_error"]),
    ("a byte too many", &["alert decode_error"]),
    ("a byte too few", &["alert decode_error"]),
    ("a message of 16 MiB", &["closed", "alert decode_error"]),
    ("a record of 64 KiB", &["closed", "alert decode_error"]),
    ("an empty record", &["alert decode_error"]),
    ("an unknown message", &["alert unexpected_message"]),
    ("data first", &["closed"]),
    ("a change of ciphers first", &["closed"]),
    ("a heartbeat first", &["closed"]),
    ("a server's hello", &["alert decode_error"]),
    ("HTTP", &["closed"]),
    ("a good client", &["served"]),
    ("no certificate", &["alert certificate_required", "closed"]),
    ("a certificate without its key", &["alert decrypt_error", "closed"]),
    ("a compressed certificate", &["alert unexpected_message", "closed"]),
    ("a second hello", &["alert unexpected_message", "closed"]),
    ("a heartbeat later", &["alert decode_error", "closed"]),
    ("a change of ciphers later", &["alert unexpected_message", "closed"]),
    ("an unknown message later", &["alert unexpected_message", "closed"]),
    ("a key update of two bytes", &["alert decode_error", "closed"]),
    ("a key update that asks for 2", &["alert illegal_parameter", "closed"]),
    ("a key update that nobody makes", &["alert bad_record_mac", "closed"]),
    // Not to be sent (RFC 8446 §5.1), and no harm in one.
    ("an empty handshake record", &["served"]),
    ("a record of 16 KiB and one byte", &["alert record_overflow", "closed"]),
    ("thirty empty records of data", &["served"]),
    ("ten thousand empty records of data", &["alert unexpected_message", "closed"]),
    ("a key update", &["served"]),
    ("ten thousand key updates", &["alert unexpected_message", "closed"]),
    ("a good client, after all", &["served"]),
];

#[test]
fn handshakes_that_are_wrong_in_one_thing_end_with_its_alert() {
    let stage = Stage::new();
    stage.issue("other", "/ns/default/sa/other");
    let (server, door) = (stage.start("server"), stage.door.to_string());
    let files = ["client.crt", "client.key", "other.key"].map(|name| stage.path(name).display().to_string());
    let args: Vec<&str> = std::iter::once(&door).chain(&files).map(String::as_str).collect();
    let Some(client) = Script::start("tls/handshakes.py", "tlslite", &args) else { return };
    let told = client.ends();
    assert_eq!(told.len(), HANDSHAKES.len(), "{told:#?}");
    for (line, (case, may)) in told.iter().zip(HANDSHAKES) {
        let became = line.strip_prefix(case).and_then(|rest| rest.strip_prefix(": "));
        assert!(became.is_some_and(|became| may.contains(&became)), "{line}; {case} may be {may:?}");
    }
    // Why, for whoever runs it.
    server
        .hears("received unexpected handshake message: got CompressedCertificate when expecting Certificate");
    server.end();
}
