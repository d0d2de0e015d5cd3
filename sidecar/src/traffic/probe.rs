//! What is asked to find out whether somebody is well, and what counts as a good answer.

use http::header::{CONTENT_TYPE, TE};
use http::{HeaderValue, Method, Request, Response, Uri};
use http_body_util::BodyExt as _;
use prost::Message as _;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::config::Check;
use crate::{Body, BoxError};

/// One byte of flags and four of length before a message (gRPC over HTTP/2, "Length-Prefixed-Message").
const PREFIX_BYTES: usize = 5;
/// Of an answer that says one word.
const MAX_ANSWER_BYTES: usize = 16 * 1024;

/// The request that asks; `None` where taking a connection is the answer.
pub(crate) fn question(check: &Check) -> Result<Option<Request<Body>>, BoxError> {
    let mut request = Request::new(Body::empty());
    match check {
        Check::Connect => return Ok(None),
        Check::Http(path) => *request.uri_mut() = path.parse()?,
        Check::Grpc(service) => {
            *request.method_mut() = Method::POST;
            *request.uri_mut() = Uri::from_static("/grpc.health.v1.Health/Check");
            let headers = request.headers_mut();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert(TE, HeaderValue::from_static("trailers"));
            let message = HealthCheckRequest { service: service.clone() }.encode_to_vec();
            let mut framed = vec![0];
            framed.extend_from_slice(&u32::try_from(message.len())?.to_be_bytes());
            framed.extend_from_slice(&message);
            *request.body_mut() = Body::from(bytes::Bytes::from(framed));
        }
    }
    Ok(Some(request))
}

/// Whether the answer to such a question is a good one; the error says why not.
pub(crate) async fn judge(check: &Check, response: Response<Body>) -> Result<(), BoxError> {
    let status = response.status();
    if !status.is_success() {
        return Err(format!("it answers {status}").into());
    }
    let refusal = response.headers().get("grpc-status").cloned();
    let body = http_body_util::Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await?;
    if !matches!(check, Check::Grpc(_)) {
        return Ok(());
    }
    let code = body.trailers().and_then(|trailers| trailers.get("grpc-status").cloned()).or(refusal);
    match code.as_ref().map(HeaderValue::as_bytes) {
        Some(b"0") => {}
        code => {
            return Err(format!(
                "the call ends with {}",
                String::from_utf8_lossy(code.unwrap_or(b"no status"))
            )
            .into());
        }
    }
    let body = body.to_bytes();
    let answer = HealthCheckResponse::decode(body.get(PREFIX_BYTES..).unwrap_or_default())?;
    match answer.status() {
        ServingStatus::Serving => Ok(()),
        status => Err(format!("it says {}", status.as_str_name()).into()),
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, StatusCode};
    use http_body_util::StreamBody;

    use super::*;

    fn answered(bytes: &[u8], code: &'static str) -> Response<Body> {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static(code));
        let frames = [
            Ok::<_, BoxError>(http_body::Frame::data(bytes::Bytes::copy_from_slice(bytes))),
            Ok(http_body::Frame::trailers(trailers)),
        ];
        Response::new(Body::new(StreamBody::new(futures::stream::iter(frames))))
    }

    #[tokio::test]
    async fn good_answers_and_others() {
        let grpc = Check::Grpc("bank.Accounts".to_owned());
        let asked = question(&grpc).unwrap().unwrap();
        assert_eq!(asked.body().whole().unwrap(), b"\0\0\0\0\x0f\x0a\x0dbank.Accounts");
        assert!(judge(&grpc, answered(&[0, 0, 0, 0, 2, 8, 1], "0")).await.is_ok());
        for (bytes, code, why) in [
            (&[0, 0, 0, 0, 2, 8, 2][..], "0", "it says NOT_SERVING"),
            (&[0, 0, 0, 0, 0], "0", "it says UNKNOWN"),
            (&[], "5", "the call ends with 5"),
        ] {
            assert_eq!(judge(&grpc, answered(bytes, code)).await.unwrap_err().to_string(), why);
        }
        assert!(judge(&grpc, answered(&[0, 0, 0, 0, 2, 8], "0")).await.is_err());
        let http = Check::Http("/healthz".to_owned());
        assert!(judge(&http, Response::new(Body::empty())).await.is_ok());
        let mut ill = Response::new(Body::empty());
        *ill.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        assert_eq!(judge(&http, ill).await.unwrap_err().to_string(), "it answers 503 Service Unavailable");
        assert!(question(&Check::Connect).unwrap().is_none());
    }
}
