//! A permitted request costs the allocator nothing between its head and its permit.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use identity::txn::User;
use identity::{SpiffeId, TrustDomain};
use policy::{Attributes, Caller, Layer, Occasion, Policies, Principal, Receipts, Verdict, shadow_counts};

#[test]
fn a_permit_allocates_nothing() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/bank/policies");
    let policies = Policies::load(&directory, &TrustDomain::new("bank.example").unwrap()).unwrap();
    let policy = policies.service("accounts").unwrap();
    let web = SpiffeId::new("spiffe://bank.example/service/web").unwrap();
    let user = User {
        id: "alice".into(),
        issuer: "https://idp.bank.example".into(),
        client: "bank-web".into(),
        scopes: vec!["bank".into()],
        groups: vec![],
        auth_time: 1_795_000_000,
        tenant: None,
        mfa: false,
    };
    let caller = Caller {
        principal: Principal::Workload(web.clone()),
        user: Some(Arc::new(user)),
        chain: Arc::new([web]),
        address: Some("127.0.0.1:40100".parse().unwrap()),
    };
    let request = http::Request::get("/owners/alice/accounts").header("accept", "*/*").body(()).unwrap();
    let parts = request.into_parts().0;
    let receipts = Receipts::new(identity::random::system());
    let decide = || {
        let occasion = Occasion {
            receipt: receipts.draw().unwrap(),
            now: Duration::from_secs(1_795_305_600),
            layer: Layer::Sidecar,
            method: parts.method.as_str(),
            target: parts.uri.path(),
            transaction: None,
            trace_id: None,
        };
        let mapped = policy.map(&parts).unwrap();
        policy.screen(&caller, &mapped, &occasion).unwrap();
        match policy.decide(&caller, &mapped, &Attributes::none(), &occasion) {
            Verdict::Permit(permit) => permit,
            Verdict::Deny(denial) => panic!("{}", denial.reason()),
        }
    };
    // The first of a second is put to Cedar as well.
    let before = shadow_counts();
    let first = decide();
    assert_eq!(shadow_counts().compared, before.compared + 1);
    let mut second = None;
    let allocated = allocation_counter::measure(|| second = Some(decide()));
    assert_eq!(allocated.count_total, 0, "{allocated:?}");
    assert_eq!(shadow_counts().compared, before.compared + 1);
    assert_eq!(first.rule(), second.unwrap().rule());
    assert_eq!(shadow_counts().mismatched, 0);
}
