use identity::clock::{ManualClock, SharedClock};
use identity::workload_api::{PERMISSION_DENIED, request};
use identity::{Scope, SpiffeId, TrustBundle, TrustDomain};
use tonic::metadata::MetadataValue;

use super::super::attest::LinuxProcesses;
use super::super::refusal::testing::Numbering;
use super::*;

#[test]
fn identity_2_the_security_header_must_be_there_once_and_exact() {
    let with = |values: &[&'static str]| {
        let mut request = Request::new(());
        for value in values {
            request.metadata_mut().append(SECURITY_HEADER, MetadataValue::from_static(value));
        }
        check_header(&request).map_err(|status| status.code())
    };
    assert_eq!(with(&["true"]), Ok(()));
    for bad in [&[][..], &["True"], &["TRUE"], &["false"], &[""], &["true", "true"], &["true", "false"]] {
        assert_eq!(with(bad), Err(tonic::Code::InvalidArgument), "{bad:?}");
    }
}

#[test]
fn security_14_one_user_cannot_shut_out_the_others() {
    let users = Users::default();
    let mut held: Vec<_> = (0..MAX_CONNECTIONS_PER_UID).map(|_| users.enter(1).unwrap()).collect();
    assert!(users.enter(1).is_none());
    assert!(users.enter(2).is_some());
    held.pop();
    assert!(users.enter(1).is_some());
    drop(held);
    assert!(users.0.lock().unwrap().is_empty());
}

/// What the socket serves from, for a host without registrations.
fn local() -> Local {
    let domain = TrustDomain::new("bank.example").unwrap();
    let agent = SpiffeId::new("spiffe://bank.example/palisade/agent/host-1").unwrap();
    let view = HostView {
        pseudonym_key: Default::default(),
        bundle: TrustBundle::new(domain.clone(), vec![]).unwrap(),
        entries: vec![],
        rotate_after: Duration::from_secs(20),
    };
    let clock: SharedClock = ManualClock::at(Duration::from_secs(1_000));
    let queue: Arc<Queue> = Arc::default();
    let recorder = Some(Arc::new(Numbering::default()) as _);
    Local {
        policies: Policies::default(),
        relations: super::super::relations::Relations::new(Arc::clone(&clock)),
        redactor: None,
        trust_domain: domain,
        view: watch::channel(Some(Arc::new(view))).1,
        svids: watch::channel(Arc::default()).1,
        refusals: Arc::new(Refusals::new(recorder, agent, Arc::clone(&queue), Arc::clone(&clock))),
        queue,
        endpoints: Endpoints::default(),
        clock,
        scope: Scope::new(),
    }
}

/// A call of `attested`.
fn call<T>(attested: &Attested, message: T) -> Request<T> {
    let mut request = request(message);
    request.extensions_mut().insert(Arc::clone(attested));
    request
}

/// How each of the three calls ends: its status, before or on the stream.
async fn outcomes(local: &Local, attested: &Attested) -> Vec<Status> {
    use futures::StreamExt as _;
    async fn ended<T>(outcome: Result<Response<ResponseStream<T>>, Status>) -> Status {
        match outcome {
            Err(status) => status,
            Ok(stream) => {
                let mut stream = stream.into_inner();
                let status = stream.next().await.unwrap().err().unwrap();
                assert!(stream.next().await.is_none(), "a refusal is the end, and recorded once");
                status
            }
        }
    }
    let workload = WorkloadService(local.clone());
    let mesh = MeshService(local.clone());
    let report = pb::ReportRequest { decisions: vec![pb::Decision::default()], dropped: 0 };
    vec![
        ended(workload.fetch_x509svid(call(attested, proto::X509svidRequest {})).await).await,
        ended(workload.fetch_x509_bundles(call(attested, proto::X509BundlesRequest {})).await).await,
        mesh.report(call(attested, report)).await.err().unwrap(),
    ]
}

/// What was recorded of the three refused calls, each of which must have got its receipt.
fn recorded(local: &Local, outcomes: &[Status]) -> Vec<String> {
    let (batch, dropped) = local.queue.take().unwrap();
    assert_eq!((batch.len(), dropped), (outcomes.len(), 0), "one record a call, and nothing of the caller's");
    for (status, record) in outcomes.iter().zip(&batch) {
        assert_eq!(status.code(), PERMISSION_DENIED);
        let receipt = format!("no identity is registered for this workload (receipt {})", record.receipt);
        assert_eq!(status.message(), receipt);
        assert_eq!(record.reporter, "spiffe://bank.example/palisade/agent/host-1");
    }
    batch.into_iter().map(|record| record.json).collect()
}

#[tokio::test]
async fn identity_39_a_caller_who_cannot_be_attested_gets_a_receipt_for_each_call() {
    let local = local();
    let unattested = Unattested { error: AttestError::Reused, pid: Some(7), uid: Some(1000), gid: Some(100) };
    let outcomes = outcomes(&local, &Arc::new(Err(unattested))).await;
    let why = format!(
        "the caller could not be attested: {}: pid=7 uid=1000 gid=100 sha256=unknown path=unknown",
        AttestError::Reused
    );
    assert_eq!(
        recorded(&local, &outcomes),
        ["FetchX509SVID", "FetchX509Bundles", "Mesh.Report"].map(|method| format!("{method} {why}"))
    );
}

#[tokio::test]
async fn identity_6_a_caller_without_an_entry_gets_a_receipt_for_each_call() {
    let local = local();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let attestor = Attestor::new(Arc::new(LinuxProcesses));
    let process = attestor.inspect(attestor.credentials(&ours).unwrap()).unwrap();
    let outcomes = outcomes(&local, &Arc::new(Ok(process))).await;
    let own = format!("pid={} ", std::process::id());
    for (json, method) in
        recorded(&local, &outcomes).iter().zip(["FetchX509SVID", "FetchX509Bundles", "Mesh.Report"])
    {
        let start = format!("{method} no registration matches the caller: {own}");
        assert!(json.starts_with(&start), "{json}");
        assert!(json.ends_with(&std::env::current_exe().unwrap().display().to_string()), "{json}");
    }
}

#[tokio::test]
async fn what_a_refused_process_had_to_say_is_not_forwarded() {
    let local = local();
    let request = call(
        &Arc::new(Err(Unattested { error: AttestError::Gone, pid: None, uid: None, gid: None })),
        pb::ReportRequest { decisions: vec![], dropped: 9 },
    );
    let outcome = MeshService(local.clone()).report(request).await;
    assert_eq!(outcome.unwrap_err().code(), PERMISSION_DENIED);
    assert_eq!(local.queue.take().unwrap().1, 0, "its count of dropped decisions is nothing to go by");
}
