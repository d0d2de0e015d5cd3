//! The bank's policies, changed in one thing each.

use std::path::Path;
use std::sync::Arc;

use identity::{SpiffeId, TrustDomain};
use policy::Policies;

use super::*;

fn load(changes: &[(&str, &str, &str)], more: &[(&str, &str)]) -> Arc<Policies> {
    let folder = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    for (path, text) in bank::POLICIES {
        write(path, text);
    }
    for (path, from, to) in changes {
        let text = std::fs::read_to_string(folder.path().join(path)).unwrap();
        assert!(text.contains(from), "{path} has no {from}");
        write(path, &text.replacen(from, to, 1));
    }
    for (path, text) in more {
        write(path, text);
    }
    let policies = Policies::load(folder.path(), &TrustDomain::new("bank.example").unwrap());
    policies.unwrap_or_else(|problems| panic!("{problems}"))
}

fn id(service: &str) -> SpiffeId {
    SpiffeId::new(&format!("spiffe://bank.example/service/{service}")).unwrap()
}

fn prover() -> Option<Prover> {
    let workloads = ["web", "accounts", "payments"].map(|name| (name.to_owned(), id(name)));
    match Prover::start(&workloads) {
        Ok(prover) => Some(prover),
        Err(error) => {
            identity::testing::skip(&format!("{error} (Debian package cvc5)"));
            None
        }
    }
}

const ACCOUNTS: &str = "services/accounts/accounts.cedar";

async fn accounts(prover: &mut Prover, changes: &[(&str, &str, &str)]) -> Vec<(String, Verdict, Change)> {
    let (before, after) = (load(&[], &[]), load(changes, &[]));
    let (before, after) = (before.service("accounts").unwrap(), after.service("accounts").unwrap());
    let changes = prover.compare(Some(&before), &after).await.unwrap();
    changes.into_iter().map(|change| (change.action.clone(), change.verdict, change)).collect()
}

#[tokio::test]
async fn nothing_changed_is_proved_to_be_so() {
    let Some(mut prover) = prover() else { return };
    let changes = accounts(&mut prover, &[]).await;
    assert_eq!(changes.len(), 4);
    assert!(changes.iter().all(|(_, verdict, _)| *verdict == Verdict::Equivalent), "{changes:?}");
    // Said otherwise, it is still the same.
    let same = [(
        ACCOUNTS,
        "when { context has user && resource.owner == context.user.id };",
        "when { context has user } when { context.user.id == resource.owner };",
    )];
    let changes = accounts(&mut prover, &same).await;
    assert!(changes.iter().all(|(_, verdict, _)| *verdict == Verdict::Equivalent), "{changes:?}");
}

#[tokio::test]
async fn what_a_change_opens_is_shown_by_a_workload_that_there_is() {
    let Some(mut prover) = prover() else { return };
    let wider = [(ACCOUNTS, "context has user && resource.owner == context.user.id", "context has user")];
    for (action, verdict, change) in accounts(&mut prover, &wider).await {
        if !matches!(action.as_str(), "ReadAccount" | "ReadHistory") {
            assert_eq!(verdict, Verdict::Equivalent, "{action}");
            continue;
        }
        assert_eq!(verdict, Verdict::Widened, "{action}");
        let witness = change.opened.unwrap();
        assert_eq!(witness.principal, "spiffe://bank.example/service/web");
        assert_eq!(witness.allowed_by, ["web-reads-own-accounts"]);
        assert!(witness.is_known && change.closed.is_none());
        let owner = &witness.attributes["owner"];
        assert_ne!(*owner, witness.user.as_ref().unwrap()["id"]);
        let told = witness.to_string();
        assert!(told.starts_with("spiffe://bank.example/service/web, for the user \""), "{told}");
    }
}

#[tokio::test]
async fn what_a_change_closes_is_shown_and_a_change_of_both_kinds_too() {
    let Some(mut prover) = prover() else { return };
    let narrower = [(ACCOUNTS, "context has user &&", "context has user && context.user.auth_time > 0 &&")];
    let changes = accounts(&mut prover, &narrower).await;
    let (_, verdict, change) = changes.iter().find(|(action, ..)| action == "ReadHistory").unwrap();
    assert_eq!(*verdict, Verdict::Narrower);
    assert!(change.closed.as_ref().unwrap().allowed_by.contains(&"web-reads-own-accounts".to_owned()));
    let another = [(ACCOUNTS, "service/web\",\n  action in", "service/payments\",\n  action in")];
    let changes = accounts(&mut prover, &another).await;
    let (_, verdict, change) = changes.iter().find(|(action, ..)| action == "ReadHistory").unwrap();
    assert_eq!(*verdict, Verdict::Changed, "{change:?}");
    assert_eq!(change.opened.as_ref().unwrap().principal, id("payments").as_str());
    assert_eq!(change.closed.as_ref().unwrap().principal, id("web").as_str());
}

#[tokio::test]
async fn a_stranger_shows_what_no_workload_of_the_mesh_can() {
    let Some(mut prover) = prover() else { return };
    let stranger = [(
        ACCOUNTS,
        "service/web\",\n  action == Accounts::Action::\"ListAccounts\"",
        "job\",\n  action == Accounts::Action::\"ListAccounts\"",
    )];
    let changes = accounts(&mut prover, &stranger).await;
    let (_, verdict, change) = changes.iter().find(|(action, ..)| action == "ListAccounts").unwrap();
    assert_eq!(*verdict, Verdict::Changed);
    let opened = change.opened.as_ref().unwrap();
    assert_eq!((opened.principal.as_str(), opened.is_known), ("spiffe://bank.example/job", false));
    assert!(opened.to_string().contains("no workload of this mesh"));
}

#[tokio::test]
async fn a_service_that_was_not_there_is_all_opened() {
    let Some(mut prover) = prover() else { return };
    let after = load(&[], &[]);
    let vault = after.service("vault").unwrap();
    let changes = prover.compare(None, &vault).await.unwrap();
    let verdict = |action: &str| changes.iter().find(|change| change.action == action).unwrap().verdict;
    assert_eq!((verdict("ReadSecret"), verdict("DeleteSecret")), (Verdict::Widened, Verdict::Equivalent));
}

const NEVER: &str = "@id(\"only-payments-transfers\")\n\
    forbid (principal, action == Accounts::Action::\"Transfer\", resource)\n\
    unless { principal == Mesh::Workload::\"spiffe://bank.example/service/payments\" };\n";

#[tokio::test]
async fn an_invariant_holds_or_is_broken_by_a_request() {
    let Some(mut prover) = prover() else { return };
    let invariant = [("guard/invariants/money.cedar", NEVER)];
    let good = load(&[], &invariant);
    let [money] = good.invariants() else { panic!("{:?}", good.invariants()) };
    assert_eq!(
        (&*money.id, &*money.file, money.line),
        ("only-payments-transfers", "guard/invariants/money.cedar", 1)
    );
    assert_eq!(prover.never(money, good.services()).await.unwrap(), None);

    // The forbid that makes it true goes, and somebody may transfer.
    let broken = load(
        &[
            (
                ACCOUNTS,
                "unless { principal == Mesh::Workload::\"spiffe://bank.example/service/payments\" };",
                "when { context.now < 0 };",
            ),
            (
                ACCOUNTS,
                "\"ReadAccount\", Accounts::Action::\"ReadHistory\"]",
                "\"ReadAccount\", Accounts::Action::\"Transfer\"]",
            ),
        ],
        &invariant,
    );
    let (service, witness) = prover.never(&broken.invariants()[0], broken.services()).await.unwrap().unwrap();
    assert_eq!(
        (service.as_str(), witness.principal.as_str()),
        ("accounts", "spiffe://bank.example/service/web")
    );
    assert_eq!(witness.allowed_by, ["web-reads-own-accounts"]);

    let nothing = NEVER.replace("Accounts::", "Ledger::");
    let about = load(&[], &[("guard/invariants/money.cedar", &nothing)]);
    let error = prover.never(&about.invariants()[0], about.services()).await.unwrap_err();
    assert!(error.to_string().contains("fits no action of any service"), "{error}");
}

#[tokio::test]
async fn without_a_solver_that_is_said() {
    let error = Prover::with_program("/nowhere/cvc5", &[]).unwrap_err();
    assert!(matches!(&error, ProofError::NoSolver(program) if program == "/nowhere/cvc5"), "{error}");
    assert!(!Path::new("/nowhere").exists());
}
