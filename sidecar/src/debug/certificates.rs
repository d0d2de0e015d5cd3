//! `/debug/certificates`: who this sidecar is, and whom it trusts.

use identity::certificate::Described;
use identity::{Identity, TrustBundle};
use serde_json::{Value, json};

use super::{listed, moment};

/// The page; keys are not looked at.
pub(super) fn page(identity: Option<&Identity>) -> Value {
    let Some(Identity { svid, bundles, generation }) = identity else {
        return json!({ "svid": null, "why": "no identity has arrived yet" });
    };
    let issuer = svid.chain().first().and_then(|leaf| Described::read(leaf).ok()).map(|leaf| leaf.issuer);
    json!({
        "svid": {
            "spiffe_id": svid.id(),
            "serial": svid.serial(),
            "not_before": moment(svid.not_before()),
            "not_after": moment(svid.not_after()),
            "issuer": issuer,
            "generation": generation,
            "chain_length": svid.chain().len(),
        },
        "trust_domains": listed(bundles.iter().map(|bundle| trusted(bundle))),
    })
}

fn trusted(bundle: &TrustBundle) -> Value {
    let roots = bundle.authorities().iter().map(|root| match Described::read(root) {
        Ok(root) => json!({
            "subject": root.subject,
            "serial": root.serial,
            "not_before": moment(root.not_before),
            "not_after": moment(root.not_after),
        }),
        Err(error) => json!({ "unreadable": error.to_string() }),
    });
    json!({ "trust_domain": bundle.trust_domain(), "roots": listed(roots) })
}
