//! What must never pass from one hop to the next, and what makes a request ambiguous.

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::request::Parts;
use http::{Method, Response, StatusCode, Version};

/// The verified user's id, as the app sees it: data for the app, never a credential.
pub static FORWARDED_USER: HeaderName = HeaderName::from_static("x-forwarded-user");
/// The verified peer, in Envoy's form (`By=…;URI=…`), as the app sees it.
pub static FORWARDED_CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// W3C trace context.
pub static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// The transaction token.
pub static TXN_TOKEN: HeaderName = HeaderName::from_static(identity::txn::HEADER);
static HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Headers by which some backend somewhere learns who is calling or what was asked. A client that sets
/// one is lying or misled: they are dropped at every hop, and set again only by the hop that verified.
/// Compared with everything but letters and digits read as `-`, because CGI-style servers fold these
/// into one.
const IDENTITY_HEADERS: &[&str] = &[
    "forwarded",
    "txn-token",
    "remote-user",
    "x-remote-user",
    "x-remote-group",
    "x-authenticated-user",
    "x-authenticated-groups",
    "x-original-url",
    "x-original-path",
    "x-original-uri",
    "x-rewrite-url",
    "x-original-method",
    "x-http-method",
    "x-http-method-override",
    "x-method-override",
    "x-real-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "true-client-ip",
    "cf-connecting-ip",
    "fastly-client-ip",
    "x-user",
    "x-user-id",
    "x-client-cert",
    "x-ssl-client-cert",
    "x-ssl-client-dn",
    "x-ssl-client-verify",
    "ssl-client-cert",
    "x-goog-authenticated-user-email",
    "x-envoy-original-path",
    "x-envoy-original-dst-host",
    "x-envoy-external-address",
    "x-envoy-internal",
    "l5d-client-id",
    "proxy",
];

/// Families of the same kind.
const IDENTITY_PREFIXES: &[&str] =
    &["x-forwarded-", "x-palisade-", "x-auth-request-", "x-pomerium-", "x-amzn-oidc-"];

/// What says where a request ends, whom it is for and what its body is: each has one spelling.
const FRAMING_HEADERS: &[&str] = &[
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Whether a header claims who calls or what is asked, in any spelling, or how the request is to be read, in another
/// than its own.
pub fn is_identity(name: &HeaderName) -> bool {
    // HeaderName is already lower case.
    let name = name.as_str();
    let folded = |c: char| c != '-' && !c.is_ascii_alphanumeric();
    if name.contains(folded) {
        let name = name.replace(folded, "-");
        return is_identity_text(&name) || FRAMING_HEADERS.contains(&name.as_str());
    }
    is_identity_text(name)
}

fn is_identity_text(name: &str) -> bool {
    IDENTITY_HEADERS.contains(&name) || IDENTITY_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Drops every identity header, however it is spelt.
pub fn strip_identity(headers: &mut HeaderMap) {
    let doomed: Vec<HeaderName> = headers.keys().filter(|name| is_identity(name)).cloned().collect();
    for name in doomed {
        headers.remove(name);
    }
}

/// What a sender says of a body as it was.
const OF_THE_BODY: [&str; 4] = ["content-md5", "digest", "content-digest", "repr-digest"];

/// The request's body is another now, of so many bytes: what was said of the one before is not true of it.
pub(crate) fn body_changed(headers: &mut HeaderMap, bytes: usize) {
    if headers.contains_key(CONTENT_LENGTH) {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes));
    }
    for name in OF_THE_BODY {
        headers.remove(name);
    }
}

/// Drops what belongs to one connection only (RFC 9110 §7.6.1), including whatever `Connection` names.
///
/// Call it before identity headers are *set*, so that `Connection: x-forwarded-user` cannot take one away.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(',').map(str::trim))
        // By far the most frequent, and `keep-alive` goes in any case.
        .filter(|name| !name.eq_ignore_ascii_case("keep-alive") && !name.eq_ignore_ascii_case("close"))
        .filter_map(|name| name.parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    // gRPC needs `TE: trailers` to pass; anything else in it is between two neighbours.
    let wants_trailers =
        headers.get(TE).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"trailers"));
    // Looking through the few that are there costs less than asking for each that could be.
    while let Some(name) = headers.keys().find(|name| is_hop_by_hop(name)).cloned() {
        headers.remove(name);
    }
    if wants_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    match *name {
        CONNECTION | PROXY_AUTHENTICATE | PROXY_AUTHORIZATION | TE | TRAILER | TRANSFER_ENCODING
        | UPGRADE => true,
        _ => matches!(name.as_str(), "keep-alive" | "proxy-connection" | "http2-settings"),
    }
}

/// Refuses requests that two parsers could frame or route differently, and those for an upgrade. Returns the rule
/// that is broken.
///
/// The wire's parsers have already refused what is malformed; this refuses what they let through.
pub fn check_framing(parts: &Parts) -> Result<(), &'static str> {
    match check_framing_of_upgrade(parts)? {
        None => Ok(()),
        Some(_) => Err("request.upgrade"),
    }
}

/// As [`check_framing`], but a request may ask for an upgrade (RFC 9110 §7.8): to exactly one protocol, which is
/// returned as it was spelt, and not to one that carries requests.
pub fn check_framing_of_upgrade(parts: &Parts) -> Result<Option<HeaderValue>, &'static str> {
    let headers = &parts.headers;
    if !matches!(parts.version, Version::HTTP_11 | Version::HTTP_2) {
        return Err("request.http_version");
    }
    if parts.method == Method::CONNECT || parts.method == Method::TRACE {
        return Err("request.method");
    }
    if !parts.uri.path().starts_with('/') {
        return Err("request.target");
    }
    check_body_length(headers)?;
    check_authority(parts)?;
    check_connection(headers)?;
    let upgrade = check_upgrade(parts)?;
    let printable =
        |value: &HeaderValue| value.as_bytes().iter().all(|byte| matches!(byte, b'\t' | 0x20..=0x7e));
    if !headers.values().all(printable) {
        return Err("request.header_bytes");
    }
    Ok(upgrade)
}

fn check_upgrade(parts: &Parts) -> Result<Option<HeaderValue>, &'static str> {
    let headers = &parts.headers;
    if headers.contains_key(&HTTP2_SETTINGS) {
        return Err("request.upgrade");
    }
    let mut values = headers.get_all(UPGRADE).iter();
    let Some(protocol) = values.next() else { return Ok(None) };
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'/');
    let name = protocol.as_bytes().to_ascii_lowercase();
    let carries_requests = [b"h2".as_slice(), b"http", b"tls"].iter().any(|prefix| name.starts_with(prefix));
    let asked = headers.get_all(CONNECTION).iter().flat_map(|value| value.as_bytes().split(|b| *b == b','));
    let is_option = asked.map(<[u8]>::trim_ascii).any(|option| option.eq_ignore_ascii_case(b"upgrade"));
    let has_body = headers.contains_key(CONTENT_LENGTH) || headers.contains_key(TRANSFER_ENCODING);
    let good = values.next().is_none()
        && !name.is_empty()
        && name.iter().all(is_token)
        && !carries_requests
        && parts.version == Version::HTTP_11
        && parts.method == Method::GET
        && is_option
        && !has_body;
    if good { Ok(Some(protocol.clone())) } else { Err("request.upgrade") }
}

/// Asks the next hop for the upgrade that this one was asked for.
pub fn ask_upgrade(headers: &mut HeaderMap, upgrade: Option<&HeaderValue>) {
    if let Some(protocol) = upgrade {
        headers.insert(UPGRADE, protocol.clone());
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
}

/// Drops from an answer what belongs to one connection only. One that switches to the protocol that was asked for
/// still names it.
pub fn strip_answer(response: &mut Response<crate::Body>, upgrade: Option<&HeaderValue>) {
    let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    strip_hop_by_hop(response.headers_mut());
    if let (true, Some(protocol)) = (switches, upgrade) {
        response.headers_mut().insert(UPGRADE, protocol.clone());
    }
}

fn check_body_length(headers: &HeaderMap) -> Result<(), &'static str> {
    let lengths = headers.get_all(CONTENT_LENGTH).iter().count();
    let mut encodings = headers.get_all(TRANSFER_ENCODING).iter();
    let encoding = encodings.next();
    if lengths > 1 || encodings.next().is_some() || (lengths == 1 && encoding.is_some()) {
        return Err("request.ambiguous_length");
    }
    if encoding.is_some_and(|value| !value.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        return Err("request.transfer_encoding");
    }
    Ok(())
}

/// `Connection` may name headers of this connection only: one that names what the request was judged by
/// would have it taken off between the judgement and the app.
fn check_connection(headers: &HeaderMap) -> Result<(), &'static str> {
    let named = headers.get_all(CONNECTION).iter().flat_map(|value| value.as_bytes().split(|b| *b == b','));
    for name in named.map(|name| name.trim_ascii().to_ascii_lowercase()) {
        if name == b"host" || name.starts_with(b"content-") {
            return Err("request.connection");
        }
    }
    Ok(())
}

fn check_authority(parts: &Parts) -> Result<(), &'static str> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    if second.is_some() {
        return Err("request.host");
    }
    let authority = parts.uri.authority();
    if !host
        .map(HeaderValue::as_bytes)
        .or(authority.map(|name| name.as_str().as_bytes()))
        .is_some_and(is_host)
    {
        return Err("request.host");
    }
    match (parts.version, host, authority) {
        (Version::HTTP_2, None, Some(_)) => Ok(()),
        (Version::HTTP_2, Some(host), Some(authority))
            if host.as_bytes() == authority.as_str().as_bytes() =>
        {
            Ok(())
        }
        // An absolute-form target on HTTP/1.1 names a second authority: refused rather than compared.
        (Version::HTTP_11, Some(_), None) => Ok(()),
        _ => Err("request.host"),
    }
}

/// A host's name or address, and perhaps a port. User information (RFC 9113 §8.3.1) and whatever else one reader takes
/// for the name and another for what surrounds it is no part of it.
fn is_host(name: &[u8]) -> bool {
    let plain =
        |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':' | b'[' | b']');
    !name.is_empty() && name.iter().all(plain)
}

/// A trace context: which trace, and which span of it called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    /// 128-bit trace id, never zero.
    pub trace_id: u128,
    /// 64-bit id of the calling span, never zero.
    pub span_id: u64,
    /// Trace flags; bit 0 is "sampled".
    pub flags: u8,
}

impl TraceParent {
    /// The flag of a trace that is recorded (W3C Trace Context §3.2.2.5.1).
    pub const SAMPLED: u8 = 1;
    /// That one and "random trace id" (Level 2 §3.2.2.5.2); others are not passed on.
    pub const KNOWN_FLAGS: u8 = 3;

    /// Whether its caller records it.
    pub fn is_sampled(&self) -> bool {
        self.flags & Self::SAMPLED != 0
    }

    /// Reads version 00 of the header (W3C Trace Context §3.2); anything else is as good as absent.
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(&TRACEPARENT).iter();
        let (value, second) = (values.next()?, values.next());
        if second.is_some() {
            return None;
        }
        let rest = value.as_bytes().strip_prefix(b"00-")?;
        let (trace, rest) = rest.split_first_chunk::<32>()?;
        let (span, rest) = rest.strip_prefix(b"-")?.split_first_chunk::<16>()?;
        let flags: &[u8; 2] = rest.strip_prefix(b"-")?.try_into().ok()?;
        let trace_id = hex(trace).filter(|id| *id != 0)?;
        let span_id = u64::try_from(hex(span)?).ok().filter(|id| *id != 0)?;
        Some(Self { trace_id, span_id, flags: u8::try_from(hex(flags)?).ok()? })
    }

    /// The header's value.
    pub fn header_value(&self) -> HeaderValue {
        let mut text = Vec::with_capacity(55);
        text.extend_from_slice(b"00-");
        put_hex(&mut text, &self.trace_id.to_be_bytes());
        text.push(b'-');
        put_hex(&mut text, &self.span_id.to_be_bytes());
        text.push(b'-');
        put_hex(&mut text, &[self.flags]);
        // Hexadecimal digits and dashes are a valid header value.
        HeaderValue::from_maybe_shared(Bytes::from(text)).unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    /// The trace id in the header's form.
    pub fn trace_id_text(&self) -> String {
        format!("{:032x}", self.trace_id)
    }
}

/// The number that lower-case digits say.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number, digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(value))
    })
}

fn put_hex(text: &mut Vec<u8>, bytes: &[u8]) {
    let digit = |nibble: u8| if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 };
    text.extend(bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)]));
}

#[cfg(test)]
mod tests {
    use http::Request;
    use proptest::prelude::*;

    use super::*;

    fn parts(build: impl FnOnce(http::request::Builder) -> http::request::Builder) -> Parts {
        build(Request::builder().uri("/a")).body(()).unwrap().into_parts().0
    }

    #[test]
    fn gateway_29_identity_headers_go_in_every_spelling_and_connection_named_ones_too() {
        let mut headers = HeaderMap::new();
        for name in [
            "X-Forwarded-User",
            "x_forwarded_user",
            "X-Forwarded_Client-Cert",
            "Txn-Token",
            "txn_token",
            "Forwarded",
            "Remote_User",
            "X-Envoy-Original-Path",
            "X-HTTP-Method-Override",
            "X-Palisade-Anything",
        ] {
            headers.insert(HeaderName::try_from(name).unwrap(), HeaderValue::from_static("x"));
        }
        headers.insert("x-custom", HeaderValue::from_static("kept"));
        headers.insert("x-secret-hop", HeaderValue::from_static("dropped"));
        headers.insert(CONNECTION, HeaderValue::from_static("close, X-Secret-Hop"));
        strip_hop_by_hop(&mut headers);
        strip_identity(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-custom"]);
    }

    #[test]
    fn policy_21_26_29_30_ambiguous_framing_and_authority_are_refused() {
        let host = |b: http::request::Builder| b.header(HOST, "a");
        assert_eq!(check_framing(&parts(host)), Ok(()));
        let te = TRANSFER_ENCODING;
        let cases: Vec<(Parts, &str)> = vec![
            (
                parts(|b| host(b).header(CONTENT_LENGTH, "1").header(&te, "chunked")),
                "request.ambiguous_length",
            ),
            (
                parts(|b| host(b).header(CONTENT_LENGTH, "1").header(CONTENT_LENGTH, "1")),
                "request.ambiguous_length",
            ),
            (parts(|b| host(b).header(&te, "chunked").header(&te, "chunked")), "request.ambiguous_length"),
            (parts(|b| host(b).header(&te, "gzip, chunked")), "request.transfer_encoding"),
            (parts(|b| b), "request.host"),
            (parts(|b| host(b).header(HOST, "b")), "request.host"),
            (parts(|b| host(b).uri("http://b/a")), "request.host"),
            (parts(|b| host(b).method("CONNECT")), "request.method"),
            (parts(|b| host(b).header(UPGRADE, "h2c")), "request.upgrade"),
            (
                parts(|b| host(b).header("x", HeaderValue::from_bytes(b"\xff").unwrap())),
                "request.header_bytes",
            ),
            (parts(|b| host(b).version(Version::HTTP_10)), "request.http_version"),
            (parts(|b| b.version(Version::HTTP_2).uri("http://a/a").header(HOST, "b")), "request.host"),
        ];
        for (parts, rule) in cases {
            assert_eq!(check_framing(&parts), Err(rule), "{parts:?}");
        }
    }

    #[test]
    fn an_upgrade_is_to_one_protocol_that_carries_no_requests() {
        let asking = |change: fn(http::request::Builder) -> http::request::Builder| {
            check_framing_of_upgrade(&parts(|b| change(b.header(HOST, "a").header(CONNECTION, "Upgrade"))))
        };
        let refused = Err("request.upgrade");
        assert_eq!(
            asking(|b| b.header(UPGRADE, "WebSocket")),
            Ok(Some(HeaderValue::from_static("WebSocket")))
        );
        assert_eq!(asking(|b| b), Ok(None));
        for other in ["h2c", "H2C", "h2", "HTTP/2.0", "TLS/1.0", "websocket, h2c", "a b", ""] {
            let parts = parts(|b| b.header(HOST, "a").header(CONNECTION, "Upgrade").header(UPGRADE, other));
            assert_eq!(check_framing_of_upgrade(&parts), refused, "{other}");
        }
        assert_eq!(asking(|b| b.header(UPGRADE, "websocket").header(UPGRADE, "h2c")), refused);
        assert_eq!(asking(|b| b.header(UPGRADE, "websocket").header("http2-settings", "")), refused);
        assert_eq!(asking(|b| b.header(UPGRADE, "websocket").method("POST")), refused);
        assert_eq!(asking(|b| b.header(UPGRADE, "websocket").header(CONTENT_LENGTH, "0")), refused);
        assert_eq!(asking(|b| b.header(UPGRADE, "websocket").version(Version::HTTP_2)), Err("request.host"));
        let unconnected = parts(|b| b.header(HOST, "a").header(UPGRADE, "websocket"));
        assert_eq!(check_framing_of_upgrade(&unconnected), refused);
    }

    #[test]
    fn a_connection_header_cannot_take_away_what_was_judged() {
        let with = |value: &str| {
            parts(|b| {
                b.header(HOST, "a").header("content-type", "application/json").header(CONNECTION, value)
            })
        };
        for named in ["content-type", "close, Content-Type", "host", "Content-Length", "content-encoding"] {
            assert_eq!(check_framing(&with(named)), Err("request.connection"), "{named}");
        }
        for harmless in ["close", "keep-alive, TE", "X-Hop", ""] {
            assert_eq!(check_framing(&with(harmless)), Ok(()), "{harmless}");
        }
    }

    #[test]
    fn names_that_a_cgi_server_folds_to_an_identity_header_go() {
        // lighttpd and old Apache turn every byte but letters and digits into `_`.
        for name in ["x.forwarded.user", "x!forwarded~user", "remote+user", "txn.token", "x_original_path"] {
            assert!(is_identity(&HeaderName::try_from(name).unwrap()), "{name}");
        }
        assert!(!is_identity(&HeaderName::from_static("x-custom.user")));
    }

    #[test]
    fn gateway_30_what_says_how_a_request_is_read_has_one_spelling() {
        for name in ["transfer_encoding", "content.length", "content_type", "te_", "transfer+encoding"] {
            let said = is_identity(&HeaderName::try_from(name).unwrap());
            assert_eq!(said, name != "te_", "{name}");
        }
        for name in [TRANSFER_ENCODING, CONTENT_LENGTH, TE, HOST] {
            assert!(!is_identity(&name));
        }
    }

    #[test]
    fn gateway_30_a_host_is_a_name_and_a_port() {
        let asked = |host: &str| check_framing(&parts(|b| b.header(HOST, host)));
        for host in ["backend", "backend.example:8443", "10.0.0.2", "[fd00::2]:80", "under_score"] {
            assert_eq!(asked(host), Ok(()), "{host}");
        }
        for host in
            ["", "root@backend", "backend/pages", "backend?", "backend#", "a, b", "a b", "a\\b", "a%00b"]
        {
            assert_eq!(asked(host), Err("request.host"), "{host}");
        }
        let deep = |uri: &str| parts(|b| b.version(Version::HTTP_2).uri(uri));
        assert_eq!(check_framing(&deep("http://backend/a")), Ok(()));
        assert_eq!(check_framing(&deep("http://root@backend/a")), Err("request.host"));
        assert_eq!(
            check_framing(&parts(|b| b.uri("*").method("OPTIONS").header(HOST, "a"))),
            Err("request.target")
        );
    }

    #[test]
    fn a_trace_parent_reads_back_and_malformed_ones_are_absent() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(&TRACEPARENT, HeaderValue::try_from(text).unwrap());
            TraceParent::from_headers(&headers)
        };
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(read(good).unwrap().header_value(), good);
        for bad in [
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_name_that_folds_to_an_identity_header_survives(
            which in 0..IDENTITY_HEADERS.len(), folds in proptest::collection::vec(any::<bool>(), 40)
        ) {
            let spelt: String = IDENTITY_HEADERS[which]
                .chars()
                .zip(folds)
                .map(|(c, fold)| match (c, fold) { ('-', true) => '_', (c, true) => c.to_ascii_uppercase(), (c, false) => c })
                .collect();
            let mut headers = HeaderMap::new();
            headers.insert(HeaderName::try_from(spelt).unwrap(), HeaderValue::from_static("x"));
            strip_identity(&mut headers);
            prop_assert!(headers.is_empty());
        }
    }
}
