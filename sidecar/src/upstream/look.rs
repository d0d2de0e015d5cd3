//! What `/debug` shows of a client: its endpoints, and the connections to each.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Link, Pool, Upstream};
use crate::debug::{listed, moment, seconds};
use crate::traffic::breaker::Resource;
use crate::traffic::endpoint::{Endpoint, Member, Unavailable};

impl Upstream {
    /// The service, how much is under way to it, and each of its endpoints as it is judged now.
    pub(crate) fn show_endpoints(&self, now: Duration) -> Value {
        let breaker = &self.steering.breaker;
        let of = |resource| json!({ "taken": breaker.taken(resource), "limit": breaker.limit(resource) });
        let endpoints = self.steering.endpoints.now();
        json!({
            "service": self.config.service,
            "spiffe_id": self.config.id,
            "breaker": {
                "requests": of(Resource::Request),
                "pending": of(Resource::Pending),
                "connections": of(Resource::Connection),
            },
            "endpoints": listed(endpoints.iter().map(|(endpoint, member)| shown(endpoint, member, now))),
        })
    }

    /// The connections that are open to it.
    pub(crate) fn show_connections(&self, now: Duration) -> Vec<Value> {
        let endpoints = self.steering.endpoints.now();
        let members = endpoints.iter().map(|(_, member)| Arc::clone(member));
        members.flat_map(|member| self.connections_of(&member, now)).collect()
    }

    fn connections_of(&self, member: &Member<Pool>, now: Duration) -> Vec<Value> {
        let links = member.own.lock();
        let open = links.iter().map(|pooled| {
            json!({
                "service": self.config.service,
                "peer": self.config.id,
                "remote": member.address,
                "protocol": match pooled.link {
                    Link::Mux(_) => "mux",
                    Link::Http2 { .. } => "http/2",
                },
                "age_seconds": seconds(now.saturating_sub(pooled.since)),
                "in_flight": pooled.link.load(),
                "generation": pooled.generation,
            })
        });
        open.collect()
    }
}

fn shown(endpoint: &Endpoint, member: &Member<Pool>, now: Duration) -> Value {
    json!({
        "address": member.address,
        "weight": endpoint.weight,
        "available": member.is_available(),
        "healthy": !member.is(Unavailable::Unhealthy),
        "serving": endpoint.serving,
        "ejected_until": member.ejected_until().map(moment),
        "in_flight": member.load.in_flight(),
        "average_seconds": member.load.average(now).map(|average| average.as_secs_f64()),
        "connections": member.own.lock().len(),
    })
}
