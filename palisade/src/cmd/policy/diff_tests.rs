//! The bank's policies in a git repository, changed after a commit.

use std::path::Path;

use policy::{AttributeValue, Layer, Mode, RecordedObject, RecordedUser};

use super::super::tests::bank;
use super::*;
use crate::workload;

fn git(directory: &Path, args: &[&str]) {
    let who = ["-c", "user.name=test", "-c", "user.email=test@bank.example", "-c", "commit.gpgsign=false"];
    let git = Command::new("git").arg("-C").arg(directory).args(who).args(args).output().unwrap();
    assert!(git.status.success(), "{git:?}");
}

/// Committed, and then changed.
fn changed(from: &str, to: &str) -> (TempDir, Mesh) {
    let (folder, mesh) = bank("accounts");
    // The directory itself may be the repository.
    git(&folder.path().join("policies"), &["init", "-q"]);
    git(&folder.path().join("policies"), &["add", "."]);
    git(&folder.path().join("policies"), &["commit", "-q", "-m", "as they were"]);
    let path = folder.path().join("policies/services/accounts/accounts.cedar");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from));
    fs::write(&path, text.replacen(from, to, 1)).unwrap();
    (folder, mesh)
}

fn loaded(mesh: &Mesh) -> (TempDir, std::sync::Arc<Policies>, std::sync::Arc<Policies>) {
    let checkout = at_revision(&mesh.mesh.policies, "HEAD").unwrap();
    let before = Policies::load(checkout.path(), &mesh.mesh.trust_domain).unwrap();
    (checkout, before, workload::policies(mesh).unwrap())
}

/// web asked for an account of alice's.
pub(in crate::cmd::policy) fn read_account(user: &str, verdict: Outcome) -> DecisionRecord {
    DecisionRecord {
        receipt: "r-7k2m0q9xw4e8t5hz".parse().unwrap(),
        time: 1_795_305_600_250,
        service: "accounts".into(),
        layer: Layer::Sidecar,
        verdict,
        status: None,
        rule: Rule::Absent,
        reason: String::new(),
        principal: Some("spiffe://bank.example/service/web".into()),
        user: Some(RecordedUser {
            id: user.into(),
            issuer: "https://id.bank.example".into(),
            client: "gateway".into(),
            scopes: vec![],
            groups: vec![],
        }),
        chain: vec![],
        peer_address: None,
        method: "GET".into(),
        target: "/accounts/17".into(),
        route: Some("GET /accounts/{id:int}".into()),
        action: Some("ReadAccount".into()),
        objects: vec![RecordedObject {
            told_by: Default::default(),
            object: "Accounts::Account::\"17\"".into(),
            attributes: [("owner".to_owned(), AttributeValue::Text("alice".into()))].into(),
            outcome: None,
            left_out_by: None,
        }],
        policy_version: None,
        mode: Mode::Enforce,
        transaction: None,
        trace_id: None,
        explanation: None,
    }
}

const OWNER: &str = "context has user && resource.owner == context.user.id";

#[test]
fn what_was_touched_is_named_to_the_policy_and_nothing_else_is() {
    let (folder, mesh) = changed(OWNER, "context has user");
    let (checkout, before, after) = loaded(&mesh);
    let file = "services/accounts/accounts.cedar";
    let one = |how, policy: Option<&str>, file: &str| Touched {
        file: file.into(),
        policy: policy.map(ToOwned::to_owned),
        how,
    };
    let seen = |before: &Policies, after: &Policies| {
        touched((before, checkout.path()), (after, &mesh.mesh.policies)).unwrap()
    };
    assert_eq!(seen(&before, &after), [one(How::Changed, Some("web-reads-own-accounts"), file)]);
    let services = folder.path().join("policies/services");
    let map = services.join("web/map.toml");
    fs::write(&map, fs::read_to_string(&map).unwrap() + "# a word\n").unwrap();
    let more =
        "@id(\"more\")\npermit (principal is Mesh::Workload, action, resource) when { context has user };";
    fs::write(services.join("web/more.cedar"), more).unwrap();
    let after = workload::policies(&mesh).unwrap();
    assert_eq!(
        seen(&before, &after),
        [
            one(How::Changed, Some("web-reads-own-accounts"), file),
            one(How::Changed, None, "services/web/map.toml"),
            one(How::Added, Some("more"), "services/web/more.cedar"),
        ]
    );
}

#[test]
fn recorded_decisions_are_made_again_by_both() {
    let (_folder, mesh) = changed(OWNER, "context has user");
    let (_checkout, before, after) = loaded(&mesh);
    let refused =
        DecisionRecord { rule: Rule::Builtin("route.unmapped".into()), ..read_account("bob", Outcome::Deny) };
    let unknown = DecisionRecord { service: "ledger".into(), ..read_account("bob", Outcome::Deny) };
    // Attributes that nobody asked for then: no policy can be held against that.
    let mut bare = read_account("bob", Outcome::Deny);
    bare.objects[0].attributes.clear();
    let records = [
        read_account("alice", Outcome::Permit),
        read_account("bob", Outcome::Deny),
        read_account("carol", Outcome::Deny),
        refused,
        unknown,
        bare,
    ];
    let there = replay(&records, &before, &after);
    assert_eq!((there.replayed, there.left_out, there.newly_denied.len()), (3, 3, 0));
    let [opened] = there.newly_allowed.as_slice() else { panic!("{:?}", there.newly_allowed) };
    assert_eq!(
        (opened.count, opened.before.as_str(), opened.after.as_str()),
        (2, "no policy", "web-reads-own-accounts")
    );
    assert_eq!((opened.object.as_str(), opened.user.as_deref()), ("Accounts::Account::\"17\"", Some("bob")));
    let back = replay(&records, &after, &before);
    assert_eq!((back.newly_allowed.len(), back.newly_denied[0].count), (0, 2));
    assert_eq!(replay(&records, &after, &after).newly_allowed.len(), 0);
}

#[test]
fn a_report_says_all_three_and_what_could_not_be_done() {
    let (_folder, mesh) = changed(OWNER, "context has user");
    let (checkout, before, after) = loaded(&mesh);
    let report = |replay, proof| Report {
        against: "HEAD".into(),
        version_before: before.version().to_string(),
        version_after: after.version().to_string(),
        touched: touched((&before, checkout.path()), (&after, &mesh.mesh.policies)).unwrap(),
        replay,
        proof,
    };
    let nothing = text(&report(Part::Missing("no control".into()), Part::Missing("no solver".into())));
    assert!(nothing.contains("  ~ services/accounts/accounts.cedar  web-reads-own-accounts\n"), "{nothing}");
    assert!(nothing.contains("not done: no control") && nothing.contains("not done: no solver"), "{nothing}");
    let done = replay(&[read_account("bob", Outcome::Deny)], &before, &after);
    let proved = proof(&mesh, &before, &after).unwrap();
    let Part::Done(changes) = &proved else {
        let Part::Missing(why) = proved else { unreachable!() };
        identity::testing::skip(&why);
        return;
    };
    let widened: Vec<_> = changes
        .iter()
        .filter(|change| change.verdict == Verdict::Widened)
        .map(|change| &*change.action)
        .collect();
    assert_eq!(widened, ["ReadAccount", "ReadHistory"]);
    let said = text(&report(Part::Done(done), proved));
    assert_eq!(printable("al\u{1b}[2Jice\nbob"), "al\\u{1b}[2Jice\nbob");
    for words in [
        "1 replayed: 1 newly allowed, 0 newly denied",
        "now allowed     1 ×  spiffe://bank.example/service/web for bob → accounts: ReadAccount Accounts::Account::\"17\"",
        "  WIDENED     accounts: ReadAccount on Accounts::Account\n      opens   spiffe://bank.example/service/web, for the user \"alice\": ReadAccount ",
        "\n              now allowed by web-reads-own-accounts; before: no policy allows it\n",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn what_cannot_be_compared_with_is_said() {
    let (folder, mesh) = changed(OWNER, "context has user");
    let failure = at_revision(&mesh.mesh.policies, "no-such-branch").unwrap_err();
    assert!(failure.causes.concat().contains("no-such-branch"), "{failure:?}");
    assert_eq!(at_revision(&mesh.mesh.policies, "--output=/tmp/x").unwrap_err().exit, Exit::Usage);
    let elsewhere = tempfile::tempdir().unwrap();
    assert!(at_revision(elsewhere.path(), "HEAD").is_err());
    let file = folder.path().join("records.json");
    let control = || -> Result<_, Failure> { panic!("a file was named") };
    fs::write(&file, "{}").unwrap();
    assert_eq!(recorded(Some(&file), control).unwrap_err().exit, Exit::Invalid);
    let record = serde_json::to_string(&read_account("bob", Outcome::Deny)).unwrap();
    fs::write(&file, format!("{record}\n{record}\n")).unwrap();
    assert_eq!(recorded(Some(&file), control).unwrap().len(), 2);
}

const NEVER: &str = "@id(\"only-web-reads-history\")\n\
    forbid (principal, action == Accounts::Action::\"ReadHistory\", resource)\n\
    unless { principal == Mesh::Workload::\"spiffe://bank.example/service/web\" };\n";

#[test]
fn an_invariant_that_does_not_hold_fails_the_check_where_it_stands() {
    let (folder, mesh) = bank("accounts");
    let invariants = folder.path().join("policies/guard/invariants");
    fs::create_dir_all(&invariants).unwrap();
    fs::write(invariants.join("history.cedar"), format!("// Nobody else.\n{NEVER}")).unwrap();
    let proved = |mesh: &Mesh| proofs::invariants(mesh, &workload::policies(mesh).unwrap());
    match proved(&mesh) {
        Ok(count) => assert_eq!(count, 1),
        Err(failure) => {
            assert!(failure.message.contains("apt-get install cvc5"), "{failure:?}");
            identity::testing::skip(&failure.message);
            return;
        }
    }
    let path = folder.path().join("policies/services/accounts/accounts.cedar");
    let text = fs::read_to_string(&path).unwrap();
    let wider = text.replacen(
        "action == Accounts::Action::\"ReadAccount\"",
        "action in [Accounts::Action::\"ReadAccount\", Accounts::Action::\"ReadHistory\"]",
        1,
    );
    assert_ne!(text, wider);
    fs::write(&path, wider).unwrap();
    let failure = proved(&mesh).unwrap_err();
    assert_eq!(failure.exit, Exit::Failed);
    let [problem] = failure.problems.as_slice() else { panic!("{failure:?}") };
    assert!(problem.file.ends_with("guard/invariants/history.cedar") && problem.line == 2, "{problem}");
    let told = problem.to_string();
    assert!(told.contains("accounts allows spiffe://bank.example/service/payments, for the user"), "{told}");
}

#[test]
fn a_directory_that_is_named_is_compared_in_place_of_the_mesh_s() {
    let (folder, _mesh) = changed(OWNER, "context has user");
    let elsewhere = tempfile::tempdir().unwrap();
    let decisions = elsewhere.path().join("decisions.json");
    fs::write(&decisions, serde_json::to_string(&read_account("bob", Outcome::Deny)).unwrap()).unwrap();
    let global = Global {
        // It names another directory, which is not there.
        config: elsewhere.path().join("mesh.toml"),
        credentials: None,
        log: None,
        supervised_by: None,
    };
    let mesh = "[mesh]\ntrust_domain = \"bank.example\"\npolicies = \"policies\"\n";
    fs::write(&global.config, mesh).unwrap();
    let args = Args {
        dir: Some(folder.path().join("policies")),
        against: "HEAD".into(),
        decisions: Some(decisions),
        json: true,
    };
    let printer = Printer::plain();
    let subject = Subject::find(args.dir.as_deref(), &global, &printer).unwrap();
    assert_eq!(run(&args, &subject, &global, &printer).unwrap(), Exit::Ok);
    assert!(Subject::find(None, &global, &printer).is_err());
}
