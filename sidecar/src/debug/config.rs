//! `/debug/config`: what this sidecar was told, and the policy that is in force now.

use std::sync::Arc;
use std::time::Duration;

use policy::{AttributeSource, ServicePolicy};
use serde_json::{Value, json};

use super::{listed, seconds};
use crate::ext_authz::ExtAuthzConfig;
use crate::{Call, HboneConfig, InboundConfig, SidecarConfig};

/// What `config` says. Nothing in it is secret: keys are not part of it.
pub(crate) fn of(config: &SidecarConfig) -> Value {
    json!({
        "spiffe_id": config.id,
        "inbound": config.inbound.as_ref().map(inbound),
        "ext_authz": config.ext_authz.as_ref().map(ext_authz),
        "calls": listed(config.calls.iter().map(call)),
        "captures": {
            "outbound": config.capture.outbound.is_some(),
            "inbound": config.capture.inbound.is_some(),
        },
        "access_log": config.access_log.is_some(),
        "traces": config.traces,
        "budget": {
            "memory_bytes": config.budget.memory_bytes,
            "descriptors": config.budget.descriptors,
        },
    })
}

/// The page.
pub(super) fn page(config: &Value, policy: Option<Arc<ServicePolicy>>, now: Duration) -> Value {
    json!({ "sidecar": config, "policy": policy.as_deref().map(|policy| in_force(policy, now)) })
}

fn in_force(policy: &ServicePolicy, now: Duration) -> Value {
    let routes = policy.routes();
    let routes = routes.iter().map(|(template, attributes)| {
        let attributes = match attributes {
            AttributeSource::Known => "request",
            AttributeSource::Entities => "entities",
            AttributeSource::Response => "response",
        };
        json!({ "route": template, "attributes_from": attributes })
    });
    let policies = policy.policies().map(|(id, file, line)| json!({ "id": id, "file": file, "line": line }));
    json!({
        "service": policy.name(),
        "version": policy.version().as_str(),
        "mode": policy.mode(now),
        "audit_until": policy.audit_until().map(|end| end.as_secs()),
        "routes": listed(routes),
        "policies": listed(policies),
    })
}

fn inbound(config: &InboundConfig) -> Value {
    json!({
        "service": config.service,
        "listen": config.listener.local_addr().ok(),
        "app": config.app,
        "app_protocol": format!("{:?}", config.app_protocol).to_lowercase(),
        "gateways": config.gateways,
        "request_timeout_seconds": seconds(config.request_timeout),
        "hbone": config.hbone.as_ref().map(hbone),
        "proxy_protocol_from": config.proxies.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

fn hbone(config: &HboneConfig) -> Value {
    json!({ "listen": config.listener.local_addr().ok(), "destinations": config.destinations })
}

fn ext_authz(config: &ExtAuthzConfig) -> Value {
    json!({
        "service": config.service,
        "gateways": config.gateways,
        "entities_address": config.entities.as_ref().map(|entities| entities.app),
    })
}

fn call(call: &Call) -> Value {
    json!({
        "service": call.upstream.service,
        "listen": call.listener.local_addr().ok(),
        "spiffe_id": call.upstream.id,
        "endpoints": call.upstream.endpoints.to_string(),
        "carries": format!("{:?}", call.carries).to_lowercase(),
        "request_timeout_seconds": seconds(call.upstream.response_timeout),
    })
}
