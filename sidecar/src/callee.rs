//! Whom the calls to one service go to: to it, to another that shares them, and as a copy to a third. And what goes
//! wrong with them on purpose.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt as _;
use identity::Scope;

use crate::Body;
use crate::traffic::config::{HashBy, Mirror, Traffic};
use crate::traffic::fault::{Fault, FaultInjector};
use crate::traffic::random::Dice;
use crate::traffic::split::Split;
use crate::upstream::Upstream;

/// One called service, as those who call it know it.
pub struct Callee {
    upstream: Arc<Upstream>,
    shares: Option<Shares>,
    mirror: Option<(Mirror, Arc<Upstream>)>,
    faults: Option<FaultInjector>,
    dice: Dice,
}

/// Those that share its calls.
struct Shares {
    split: Split,
    by: Option<HashBy>,
    upstreams: BTreeMap<String, Arc<Upstream>>,
}

impl Callee {
    /// The service behind `upstream`, with those of `known` that its traffic names; the error is a name that is not
    /// among them.
    pub fn new(
        upstream: Arc<Upstream>,
        traffic: &Traffic,
        known: &BTreeMap<String, Arc<Upstream>>,
        dice: Dice,
    ) -> Result<Self, String> {
        let named = |name: &str| known.get(name).map(Arc::clone).ok_or_else(|| name.to_owned());
        let shares = match Split::new(&traffic.split) {
            None => None,
            Some(split) => {
                let upstreams = split.names().map(|name| Ok((name.to_owned(), named(name)?)));
                let upstreams = upstreams.collect::<Result<_, String>>()?;
                Some(Shares { split, by: traffic.split_by.clone(), upstreams })
            }
        };
        let mirror = match &traffic.mirror {
            None => None,
            Some(mirror) => Some((mirror.clone(), named(&mirror.to)?)),
        };
        let faults = traffic.faults.clone().and_then(|faults| FaultInjector::new(faults, upstream.service()));
        Ok(Self { upstream, shares, mirror, faults, dice })
    }

    /// The client to it.
    pub fn upstream(&self) -> &Upstream {
        &self.upstream
    }

    /// Its name.
    pub fn service(&self) -> &str {
        self.upstream.service()
    }

    /// Who gets a call.
    pub fn choose(&self, headers: &HeaderMap, source: IpAddr, user: Option<&str>) -> &Arc<Upstream> {
        let Some(Shares { split, by, upstreams }) = &self.shares else { return &self.upstream };
        let key = by.as_ref().and_then(|by| by.key(headers, source, user));
        upstreams.get(split.choose(key, &self.dice)).unwrap_or(&self.upstream)
    }

    /// What is done to a call on purpose: how long it waits, and what it is then answered instead of going anywhere.
    pub fn fault(&self, headers: &HeaderMap) -> (Option<Duration>, Option<StatusCode>) {
        let fault = self.faults.as_ref().map(|faults| faults.decide(headers, &self.dice));
        let Fault { delay, abort } = fault.unwrap_or_default();
        (delay, abort)
    }

    /// A copy of a call, marked as one, and who gets it; most often there is none.
    pub fn copy(&self, head: &Parts, body: &Body) -> Option<Copied<'_>> {
        let (mirror, upstream) = self.mirror.as_ref()?;
        let bytes = body.whole().map(|bytes| bytes.len() as u64);
        if !mirror.copies(bytes, &self.dice) {
            return None;
        }
        let (mut head, body) = (head.clone(), body.repeat()?);
        mirror.mark(&mut head.headers, self.service());
        Some(Copied { upstream, head, body })
    }
}

/// A copy of a call, on its way to `upstream`.
pub struct Copied<'a> {
    /// Who gets it.
    pub upstream: &'a Arc<Upstream>,
    /// To be vouched for as the call itself is: for this one.
    pub head: Parts,
    body: Body,
}

impl Copied<'_> {
    /// Sends it, in a task of `scope`; nobody waits for its answer, which is read to its end and dropped.
    pub fn send(self, scope: &Scope) {
        let Self { upstream, head, body } = self;
        let upstream = Arc::clone(upstream);
        let request = http::Request::from_parts(head, body);
        scope.spawn("mirrored request", async move {
            let service = upstream.service();
            match upstream.send(request).await {
                Ok(response) => {
                    let status = response.status().as_u16();
                    let mut body = response.into_body();
                    while let Some(Ok(_)) = body.frame().await {}
                    tracing::debug!(service, status, "a copy was answered");
                }
                Err(error) => tracing::debug!(service, %error, "a copy was not answered"),
            }
        });
    }
}
