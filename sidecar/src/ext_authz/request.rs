//! From Envoy's description of a request to the request itself, or a refusal.
//!
//! What is decided must be what Envoy forwards. So the description is held against itself (fields and
//! pseudo-headers say the same, nothing is hidden) and what Envoy may have merged, replaced or cut is not
//! decided on.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue,
    TRANSFER_ENCODING,
};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, Request, Uri, Version};
use identity::{SpiffeId, leaf, txn};
use policy::{BodyRule, Mapped, Refusal};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use super::pb;

/// Most headers of a request: the sidecar's own 100, and what Envoy adds of its own.
const MAX_HEADERS: usize = 128;
/// Bytes of all names and values: as many as a request's head may have at the sidecar itself.
const MAX_HEADER_BYTES: usize = 64 * 1024;
/// Longest percent-encoded certificate: three bytes for each of a PEM text of the largest one looked at.
const MAX_CERTIFICATE_TEXT_BYTES: usize = leaf::MAX_CERTIFICATE_BYTES * 2 * 3;
/// Set by Envoy on what it asks, where it shows a body.
const PARTIAL_BODY: &str = "x-envoy-auth-partial-body";
/// Headers that a request is judged by. Where Envoy tells headers as a map, a comma in one of these may be
/// two headers made one, of which the app would read another than we.
const JUDGED_HEADERS: [HeaderName; 6] = [
    CONTENT_TYPE,
    CONTENT_LENGTH,
    CONTENT_ENCODING,
    TRANSFER_ENCODING,
    HOST,
    HeaderName::from_static(txn::HEADER),
];

/// What Envoy says of one request.
pub(super) struct Described {
    pub(super) http: pb::HttpRequest,
    pub(super) source: pb::Peer,
}

impl Described {
    /// `None` if Envoy left out what every HTTP request has: then it asks about something else.
    pub(super) fn read(request: pb::CheckRequest) -> Option<Self> {
        let attributes = request.attributes?;
        let http = attributes.request.and_then(|request| request.http)?;
        Some(Self { http, source: attributes.source.unwrap_or_default() })
    }

    /// Where the client is. Not part of the decision.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        let address = self.source.address.as_ref()?.socket_address.as_ref()?;
        let ip: IpAddr = address.address.parse().ok()?;
        Some(SocketAddr::new(ip, u16::try_from(address.port_value).ok()?))
    }

    /// Who the client proved to be, to Envoy.
    ///
    /// Envoy takes the first of several URI names for the principal; with the certificate at hand all our
    /// own rules for a leaf hold, its validity included.
    pub(super) fn peer(&self, now: Duration) -> Result<SpiffeId, Refusal> {
        if self.source.principal.is_empty() {
            return Err(Refusal::denied("tls.no_client_certificate", "the peer proved no identity to Envoy"));
        }
        let principal = SpiffeId::new(&self.source.principal).map_err(|error| {
            Refusal::denied("tls.invalid_svid", format!("the peer's name is not a SPIFFE ID: {error}"))
        })?;
        if self.source.certificate.is_empty() {
            return Ok(principal);
        }
        let leaf = self.certificate()?;
        if leaf.id != principal {
            let reason = format!("Envoy says the peer is {principal}, its certificate says {}", leaf.id);
            return Err(Refusal::denied("ext_authz.principal_mismatch", reason));
        }
        if now < leaf.not_before || now >= leaf.not_after {
            let reason = "the peer's certificate has expired or is not yet valid";
            return Err(Refusal::denied("tls.expired_svid", reason));
        }
        Ok(principal)
    }

    fn certificate(&self) -> Result<leaf::Leaf, Refusal> {
        let refuse = |reason: String| Refusal::denied("tls.invalid_svid", reason);
        if self.source.certificate.len() > MAX_CERTIFICATE_TEXT_BYTES {
            return Err(refuse("the peer's certificate is too large".to_owned()));
        }
        let pem: Vec<u8> = percent_encoding::percent_decode_str(&self.source.certificate).collect();
        let mut certificates = CertificateDer::pem_slice_iter(&pem);
        let (Some(Ok(certificate)), None) = (certificates.next(), certificates.next()) else {
            return Err(refuse("what Envoy sent is not one PEM certificate".to_owned()));
        };
        leaf::parse(&certificate).map_err(|error| refuse(format!("the peer's certificate: {error}")))
    }

    /// The request's head in one form, whatever protocol it came by: HTTP/1.1, origin form, one `Host`.
    pub(super) fn head(&self) -> Result<Parts, Refusal> {
        let http = &self.http;
        if !matches!(http.protocol.as_str(), "HTTP/1.1" | "HTTP/2" | "HTTP/3") {
            return Err(malformed("request.http_version", "not HTTP/1.1, HTTP/2 or HTTP/3"));
        }
        let method = Method::from_bytes(http.method.as_bytes())
            .map_err(|_| malformed("request.method", "the method is not a token"))?;
        let headers = self.headers()?;
        let (mut head, ()) = Request::new(()).into_parts();
        head.method = method;
        head.uri = target(&http.path)?;
        head.version = Version::HTTP_11;
        head.headers = headers;
        Ok(head)
    }

    fn headers(&self) -> Result<HeaderMap, Refusal> {
        let http = &self.http;
        let merged = http.header_map.is_none();
        if !merged && !http.headers.is_empty() {
            return Err(malformed("ext_authz.headers", "headers are told both as a map and as a list"));
        }
        let mut headers = HeaderMap::new();
        let mut pseudo = PseudoHeaders::default();
        let mut left_bytes = MAX_HEADER_BYTES;
        for (name, value) in told(http) {
            left_bytes = left_bytes
                .checked_sub(name.len() + value.len())
                .ok_or_else(|| malformed("request.header_size", "the headers are too large"))?;
            if let Some(name) = name.strip_prefix(':') {
                pseudo.take(name, value, http)?;
                continue;
            }
            let name = HeaderName::from_bytes(name.as_bytes())
                .map_err(|_| malformed("request.header_name", "a header's name is not a token"))?;
            let value = HeaderValue::from_bytes(value).map_err(|_| {
                malformed("request.header_bytes", format!("the header {name} has other bytes"))
            })?;
            if merged && JUDGED_HEADERS.contains(&name) && value.as_bytes().contains(&b',') {
                let reason = format!("the header {name} may be several made one: set encode_raw_headers");
                return Err(malformed("ext_authz.merged_header", reason));
            }
            if headers.len() >= MAX_HEADERS || headers.try_append(name, value).is_err() {
                return Err(malformed("request.header_count", "too many headers"));
            }
        }
        pseudo.complete()?;
        // What Envoy forwards is the authority; a `Host` beside it could only say the same.
        let authority = HeaderValue::from_str(&http.host)
            .map_err(|_| malformed("request.host", "the authority has other bytes"))?;
        if headers.get_all(HOST).iter().any(|host| host != authority) {
            return Err(malformed("request.host", "the authority and Host differ"));
        }
        headers.insert(HOST, authority);
        Ok(headers)
    }

    /// The mapped request with its body, as far as its route looks at one.
    pub(super) fn body(&self, mapped: Mapped, headers: &HeaderMap) -> Result<Mapped, Refusal> {
        let http = &self.http;
        let cut = headers.get_all(PARTIAL_BODY).iter().any(|value| value != "false");
        let shown = if http.raw_body.is_empty() { http.body.as_bytes() } else { &http.raw_body };
        let announced = announced_bytes(headers)?;
        match mapped.body() {
            BodyRule::None if cut => Err(malformed("request.body", "this route takes no body")),
            BodyRule::None => mapped.with_body(shown),
            BodyRule::Opaque { max_bytes } => {
                let unknown = (cut || headers.contains_key(TRANSFER_ENCODING)) && announced.is_none();
                if unknown && (cut || shown.is_empty()) {
                    return Err(malformed("request.body_size", "how long the body is cannot be told"));
                }
                if announced.unwrap_or_default().max(shown.len() as u64) > max_bytes as u64 {
                    return Err(malformed("request.body_size", "the body is over its limit"));
                }
                Ok(mapped)
            }
            // Envoy shows a body once it is whole, and a call may never be.
            BodyRule::Grpc { .. } => Err(malformed("ext_authz.messages", "messages are not shown by Envoy")),
            BodyRule::Json { .. } | BodyRule::Form { .. } => {
                if !http.body.is_empty() {
                    let reason = "a body as text may have lost bytes: set pack_as_bytes";
                    return Err(malformed("ext_authz.text_body", reason));
                }
                if shown.is_empty() && announced != Some(0) {
                    let reason = "Envoy shows no body: set with_request_body";
                    return Err(malformed("ext_authz.hidden_body", reason));
                }
                if cut || announced.is_some_and(|bytes| bytes != shown.len() as u64) {
                    return Err(malformed(
                        "request.body_size",
                        "Envoy cut the body: raise max_request_bytes",
                    ));
                }
                mapped.with_body(shown)
            }
        }
    }
}

fn malformed(rule: &'static str, reason: impl Into<String>) -> Refusal {
    Refusal::malformed(rule, reason)
}

/// Headers and pseudo-headers in whichever form they are told.
fn told(http: &pb::HttpRequest) -> impl Iterator<Item = (&str, &[u8])> {
    let list = http.header_map.iter().flat_map(|list| &list.headers).map(|header| {
        let raw = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
        (header.key.as_str(), raw)
    });
    list.chain(http.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())))
}

/// The pseudo-headers seen: each says what a field says, and their being there shows that Envoy's filter
/// does not hide headers from us, which we could then not take off.
#[derive(Default)]
struct PseudoHeaders {
    method: bool,
    path: bool,
    authority: bool,
    scheme: bool,
}

impl PseudoHeaders {
    fn take(&mut self, name: &str, value: &[u8], http: &pb::HttpRequest) -> Result<(), Refusal> {
        let (seen, expected) = match name {
            "method" => (&mut self.method, Some(&http.method)),
            "path" => (&mut self.path, Some(&http.path)),
            "authority" => (&mut self.authority, Some(&http.host)),
            // Told by Envoy from its listener; takes no part.
            "scheme" => (&mut self.scheme, None),
            _ => return Err(malformed("request.pseudo_header", "an unknown pseudo-header")),
        };
        if std::mem::replace(seen, true) || expected.is_some_and(|expected| expected.as_bytes() != value) {
            let reason = format!("the pseudo-header :{name} appears twice or differs from its field");
            return Err(malformed("request.pseudo_header", reason));
        }
        Ok(())
    }

    fn complete(&self) -> Result<(), Refusal> {
        if self.method && self.path && self.authority {
            return Ok(());
        }
        let reason = "Envoy hides headers, and could not be told to take them off: \
                      remove allowed_headers and disallowed_headers from the filter";
        Err(malformed("ext_authz.hidden_headers", reason))
    }
}

/// The target as it was told, or nothing: a parser that dropped a fragment would judge another one.
fn target(path: &str) -> Result<Uri, Refusal> {
    let refuse = || malformed("request.target", "the target is not a path");
    let target = PathAndQuery::try_from(path).map_err(|_| refuse())?;
    if target.as_str() != path || !path.starts_with('/') {
        return Err(refuse());
    }
    let mut parts = http::uri::Parts::default();
    parts.path_and_query = Some(target);
    Uri::from_parts(parts).map_err(|_| refuse())
}

fn announced_bytes(headers: &HeaderMap) -> Result<Option<u64>, Refusal> {
    let Some(length) = headers.get(CONTENT_LENGTH) else { return Ok(None) };
    let digits = length.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    match digits.and_then(|text| text.parse().ok()) {
        Some(bytes) => Ok(Some(bytes)),
        None => Err(malformed("request.ambiguous_length", "Content-Length is not a number")),
    }
}
