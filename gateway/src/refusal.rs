//! A request that goes no further: terse to the caller, full in the decision log.

use std::borrow::Cow;
use std::net::SocketAddr;

use http::header::{self, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use identity::clock::Clock;
use identity::txn::User;
use policy::{DecisionRecord, Layer, Mode, Outcome, Receipt, RecordedUser, Recorder, Rule};
use ring::rand::SecureRandom;
use sidecar::Body;

use crate::answer;

/// Longest method, target or reason recorded.
const MAX_RECORDED_BYTES: usize = 2048;

/// Why a request goes no further.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// What the caller sees.
    pub status: StatusCode,
    /// What kind, for the caller: one word from a fixed list.
    pub error: &'static str,
    /// The rule that refused, for the log.
    pub rule: Cow<'static, str>,
    /// The explanation, for the log. Never holds a credential.
    pub reason: String,
    /// Further headers of the answer.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Set if a policy has decided and recorded this already.
    pub recorded: Option<Receipt>,
}

impl Refusal {
    /// A refusal under a built-in rule.
    pub(crate) fn new(
        status: StatusCode,
        error: &'static str,
        rule: impl Into<Cow<'static, str>>,
        reason: impl Into<String>,
    ) -> Self {
        Self { status, error, rule: rule.into(), reason: reason.into(), headers: Vec::new(), recorded: None }
    }

    /// The request could be read in two ways, or is not one that we take.
    pub(crate) fn malformed(rule: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed_request", rule, "the request breaks this rule of form")
            .with(header::CONNECTION, HeaderValue::from_static("close"))
    }

    /// Something that we need does not answer.
    pub(crate) fn unavailable(rule: &'static str, cause: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", rule, cause.to_string())
            .with(header::RETRY_AFTER, HeaderValue::from_static("5"))
    }

    /// With one more header.
    pub(crate) fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }
}

/// The request as far as it is known when it is refused.
#[derive(Debug)]
pub(crate) struct Situation<'a> {
    pub method: &'a str,
    pub target: &'a str,
    pub remote: SocketAddr,
    pub user: Option<&'a User>,
    pub trace_id: &'a str,
    /// Whether a person looks at the answer, see [`answer::is_navigation`].
    pub navigation: bool,
}

/// Records a refusal, unless a policy has done so, and answers the caller.
pub(crate) fn answer(
    refusal: Refusal,
    situation: &Situation<'_>,
    recorder: &dyn Recorder,
    random: &dyn SecureRandom,
    clock: &dyn Clock,
) -> Response<Body> {
    let receipt = match refusal.recorded {
        Some(receipt) => Some(receipt),
        // Without randomness there is no receipt; the refusal stands all the same.
        None => Receipt::generate(random).ok().inspect(|receipt| {
            recorder.record(DecisionRecord {
                receipt: *receipt,
                time: u64::try_from(clock.now().as_millis()).unwrap_or(u64::MAX),
                service: "gateway".to_owned(),
                layer: Layer::Gateway,
                verdict: Outcome::Deny,
                status: Some(refusal.status.as_u16()),
                rule: Rule::Builtin(refusal.rule.clone()),
                reason: cut(&refusal.reason),
                principal: situation.user.map(|user| format!("client {}", user.client)),
                user: situation.user.map(RecordedUser::from),
                chain: Vec::new(),
                peer_address: Some(situation.remote.to_string()),
                method: cut(situation.method),
                target: cut(situation.target),
                route: None,
                action: None,
                objects: Vec::new(),
                policy_version: None,
                mode: Mode::Enforce,
                transaction: None,
                trace_id: Some(situation.trace_id.to_owned()),
                explanation: None,
            });
        }),
    };
    let receipt = receipt.as_ref().map(Receipt::as_str);
    let mut response = answer::refusal(situation.navigation, refusal.status, refusal.error, receipt);
    for (name, value) in refusal.headers {
        response.headers_mut().append(name, value);
    }
    response
}

fn cut(text: &str) -> String {
    let end =
        (0..=text.len().min(MAX_RECORDED_BYTES)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.get(..end).unwrap_or_default().to_owned()
}
