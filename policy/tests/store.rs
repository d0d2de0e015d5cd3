//! The sample store's policies: its own tests of them, and that they are about the store there is.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests, which clippy.toml allows only inside #[test]"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use identity::{SpiffeId, TrustDomain};
use policy::{
    Attributes, Caller, Case, Layer, Mapped, Occasion, Policies, Principal, ServicePolicy, Verdict, render,
};

const READ: &str = "/palisade.store.v1.Store/Read";

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

fn directory() -> PathBuf {
    examples().join("store/policies")
}

fn policies() -> Arc<Policies> {
    let trust_domain = TrustDomain::new("bank.example").unwrap();
    Policies::load(&directory(), &trust_domain).unwrap_or_else(|problems| panic!("{problems}"))
}

fn store() -> Arc<ServicePolicy> {
    policies().service("store").unwrap()
}

/// What a read of rows is about.
fn mapped(policy: &ServicePolicy, rows: &[(&str, &str)]) -> Mapped {
    let request = http::Request::post(READ).header("content-type", "application/grpc").body(()).unwrap();
    let text = |field: u8, text: &[u8]| [&[field << 3 | 2, u8::try_from(text.len()).unwrap()], text].concat();
    let row =
        |(table, key): &(&str, &str)| text(2, &[text(1, table.as_bytes()), text(2, key.as_bytes())].concat());
    let message: Vec<u8> = rows.iter().flat_map(row).collect();
    policy.map(&request.into_parts().0).unwrap().with_body(&message).unwrap()
}

/// A read of rows by accounts, for nobody.
fn read(policy: &ServicePolicy, rows: &[(&str, &str)]) -> Verdict {
    let mapped = mapped(policy, rows);
    let caller = Caller {
        principal: Principal::Workload(SpiffeId::new("spiffe://bank.example/service/accounts").unwrap()),
        user: None,
        chain: Arc::from([]),
        address: None,
    };
    let occasion = Occasion {
        receipt: "r-7k2m0q9xw4e8t5hz".parse().unwrap(),
        now: Duration::from_millis(1_795_305_600_250),
        layer: Layer::Sidecar,
        method: "POST",
        target: READ,
        transaction: None,
        trace_id: None,
    };
    policy.decide(&caller, &mapped, &Attributes::none(), &occasion)
}

#[test]
fn the_tests_beside_the_policies_pass() {
    let policies = policies();
    let cases = Case::load(&directory(), &policies, |_| None).unwrap_or_else(|problems| panic!("{problems}"));
    assert!(cases.len() > 30, "{}", cases.len());
    let failed: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            let why = case.run(&policies).err()?;
            Some(case.problem(&why).to_string())
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Two copies that drifted apart would judge other fields than the store reads.
#[test]
fn the_messages_judged_are_those_that_the_store_reads() {
    for (copy, of) in [
        ("../policy/src/shipped/store.proto", "store/client/proto/store.proto"),
        ("store/policies/mesh.cedarschema", "bank/policies/mesh.cedarschema"),
    ] {
        let text = |name: &str| fs::read_to_string(examples().join(name)).unwrap();
        assert!(text(copy) == text(of), "{copy} is no copy of {of}: copy it again");
    }
    assert!(store().unmapped_methods().is_empty(), "{:?}", store().unmapped_methods());
}

#[test]
fn a_denial_names_the_row() {
    let policy = store();
    assert!(matches!(read(&policy, &[("accounts", "alice/17"), ("accounts", "bob/42")]), Verdict::Permit(_)));
    let rows = [("accounts", "alice/17"), ("payments", "bob/42"), ("accounts", "bob/42")];
    let Verdict::Deny(denial) = read(&policy, &rows) else { panic!("a row of another table was read") };
    let told = render(denial.record());
    assert!(told.contains("Store::Row::\"payments/bob/42\""), "{told}");
}

#[test]
fn each_row_is_named_once_however_many_there_are() {
    let policy = store();
    for count in [1, 15, 16, 17, 100] {
        let keys: Vec<_> = (0..count).map(|number| format!("alice/{number}")).collect();
        let once: Vec<_> = keys.iter().map(|key| ("accounts", key.as_str())).collect();
        let twice = [once.clone(), once.clone()].concat();
        let ids = |rows: &[(&str, &str)]| -> Vec<_> {
            mapped(&policy, rows).objects().iter().map(|object| object.id().to_owned()).collect()
        };
        assert_eq!(ids(&twice), ids(&once));
        assert_eq!(ids(&once).len(), count);
    }
}
