//! Callers who get no identity, or may not write: what is known of them, who writes it down, and what they are told.
//!
//! The caller learns only that it has no identity, and a receipt. Why stands in the record, which goes to
//! control with the workloads' own decisions and is found there by that receipt.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tonic::Status;

use identity::SpiffeId;
use identity::clock::SharedClock;

use super::decisions::Queue;
use crate::control::Limiter;
use crate::mesh;
use crate::model::ReportedDecision;

/// Refusals recorded a second in the long run, of all users together: room for a host whose registrations
/// are wrong, whose workloads each try again every few seconds, and far below what control takes of an
/// agent, so that a flood of refused callers never stands in the way of the workloads' decisions.
const MAX_RECORDED_PER_SECOND: u32 = 10;
/// Refusals recorded at once, of all users together: every workload of a host that starts or is withdrawn.
const MAX_RECORDED_BURST: u32 = 100;
/// Refusals of one user recorded a second in the long run, so that one cannot use up the others' receipts.
const MAX_RECORDED_PER_UID_PER_SECOND: u32 = 2;
/// Refusals of one user recorded at once: less than all, and enough for many workloads under one user.
const MAX_RECORDED_PER_UID_BURST: u32 = 30;

/// Why a caller was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RefusalReason {
    /// It could not be told which process calls; the text says why.
    NotAttested(String),
    /// The process is known, and no registration is about it.
    NoMatchingEntry,
    /// It has an identity, and may not write the relations of that service.
    NotAWriter {
        /// Who it is.
        id: String,
        /// Whose relations it wanted to write.
        service: String,
    },
}

impl fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAttested(why) => write!(f, "the caller could not be attested: {why}"),
            Self::NoMatchingEntry => f.write_str("no registration matches the caller"),
            Self::NotAWriter { id, service } => {
                write!(f, "{id} may not write the relations of {service:?}")
            }
        }
    }
}

/// A caller who got no identity, as far as the agent knows it. `Display` is one line with all selectors,
/// `unknown` where there is nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedCaller {
    /// Its process.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: Option<u32>,
    /// Its group.
    pub gid: Option<u32>,
    /// Its executable, if the agent may see it. The bytes are the caller's choice.
    pub path: Option<PathBuf>,
    /// The executable's SHA-256, lower-case hexadecimal.
    pub sha256: Option<String>,
    /// What it called, such as `FetchX509SVID` or `Mesh.Report`.
    pub method: &'static str,
    /// Why it was refused.
    pub reason: RefusalReason,
    /// The registrations that come near, a sentence each on how they differ; at most a few.
    pub near_misses: Vec<String>,
    /// When, since the Unix epoch.
    pub now: Duration,
}

impl fmt::Display for RefusedCaller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn known<T: fmt::Display>(value: Option<T>) -> String {
            value.map_or_else(|| "unknown".to_owned(), |value| value.to_string())
        }
        // The path is last: nothing that a caller puts into it can stand for another field.
        write!(
            f,
            "pid={} uid={} gid={} sha256={} path={}",
            known(self.pid),
            known(self.uid),
            known(self.gid),
            known(self.sha256.as_ref()),
            known(self.path.as_ref().map(|path| path.display())),
        )
    }
}

/// Writes refusals down in the form that control's readers understand. What a decision record is, this
/// crate does not know.
pub trait RefusalRecorder: Send + Sync + fmt::Debug {
    /// The record of a refusal, or `None` if there cannot be one: the caller is then refused without a
    /// receipt. Must not block: it is called on the path of a call.
    fn refused(&self, caller: &RefusedCaller) -> Option<ReportedDecision>;
}

/// Refuses callers: logs each, records as many as the limits allow.
#[derive(Debug)]
pub(super) struct Refusals {
    recorder: Option<Arc<dyn RefusalRecorder>>,
    /// The agent's own ID: it decided, so it is the reporter.
    reporter: SpiffeId,
    queue: Arc<Queue>,
    clock: SharedClock,
    of_all: Limiter<()>,
    of_user: Limiter<Option<u32>>,
}

impl Refusals {
    pub(super) fn new(
        recorder: Option<Arc<dyn RefusalRecorder>>,
        reporter: SpiffeId,
        queue: Arc<Queue>,
        clock: SharedClock,
    ) -> Self {
        Self {
            recorder,
            reporter,
            queue,
            clock,
            of_all: Limiter::new(MAX_RECORDED_BURST, MAX_RECORDED_PER_SECOND),
            of_user: Limiter::new(MAX_RECORDED_PER_UID_BURST, MAX_RECORDED_PER_UID_PER_SECOND),
        }
    }

    /// What time a refusal bears.
    pub(super) fn now(&self) -> Duration {
        self.clock.now()
    }

    /// The status that ends the call. To be made once a call.
    pub(super) fn refuse(&self, caller: &RefusedCaller) -> Status {
        let receipt = self.record(caller);
        tracing::warn!(
            caller = caller.to_string(),
            method = caller.method,
            reason = caller.reason.to_string(),
            near = caller.near_misses.join("; "),
            receipt,
            "no identity for a caller"
        );
        Status::permission_denied(match receipt {
            Some(receipt) => format!("no identity is registered for this workload (receipt {receipt})"),
            None => "no identity is registered for this workload".to_owned(),
        })
    }

    /// Puts a refusal on its way to control. A receipt comes back only if there is a record under it.
    pub(super) fn record(&self, caller: &RefusedCaller) -> Option<String> {
        let recorder = self.recorder.as_ref()?;
        // The user's own limit first: what it stops must not be taken from the others.
        if !self.of_user.take(caller.uid, 1, caller.now) || !self.of_all.take((), 1, caller.now) {
            return None;
        }
        let decision = recorder.refused(caller)?;
        let receipt = decision.receipt.clone();
        let taken = self.queue.push(vec![mesh::wire(decision)], &self.reporter, 0);
        (taken == 1).then_some(receipt)
    }
}

#[cfg(test)]
pub(super) mod testing {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Numbers the refusals, and writes the caller into the record.
    #[derive(Debug, Default)]
    pub(in crate::agent) struct Numbering {
        pub(in crate::agent) count: AtomicUsize,
        /// Bytes that each record has too many.
        pub(in crate::agent) padding: usize,
    }

    impl RefusalRecorder for Numbering {
        fn refused(&self, caller: &RefusedCaller) -> Option<ReportedDecision> {
            let number = self.count.fetch_add(1, Ordering::SeqCst);
            Some(ReportedDecision {
                receipt: format!("r-{number}"),
                time_ms: 0,
                service: "agent".into(),
                verdict: "deny".into(),
                address: String::new(),
                json: format!("{} {}: {caller}{}", caller.method, caller.reason, " ".repeat(self.padding)),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use identity::clock::ManualClock;
    use tonic::Code;

    use super::testing::Numbering;
    use super::*;
    use crate::control::MAX_DECISION_JSON_BYTES;

    const START: Duration = Duration::from_secs(1_000);
    const PLAIN: &str = "no identity is registered for this workload";

    fn caller(uid: u32, now: Duration) -> RefusedCaller {
        RefusedCaller {
            pid: Some(7),
            uid: Some(uid),
            gid: None,
            path: Some("/bin/web".into()),
            sha256: None,
            method: "FetchX509SVID",
            reason: RefusalReason::NoMatchingEntry,
            near_misses: vec![],
            now,
        }
    }

    fn refusals(recorder: Option<Arc<Numbering>>) -> Refusals {
        let agent = SpiffeId::new("spiffe://bank.example/palisade/agent/host-1").unwrap();
        let recorder = recorder.map(|recorder| recorder as Arc<dyn RefusalRecorder>);
        Refusals::new(recorder, agent, Arc::default(), ManualClock::at(START))
    }

    #[test]
    fn a_refusal_names_the_record_that_is_on_its_way() {
        let refusals = refusals(Some(Arc::default()));
        let status = refusals.refuse(&caller(1, START));
        assert_eq!(
            (status.code(), status.message()),
            (Code::PermissionDenied, &*format!("{PLAIN} (receipt r-0)"))
        );
        let (batch, dropped) = refusals.queue.take().unwrap();
        assert_eq!((batch.len(), dropped), (1, 0));
        assert_eq!(
            (batch[0].receipt.as_str(), batch[0].reporter.as_str()),
            ("r-0", refusals.reporter.as_str())
        );
        assert_eq!(
            batch[0].json,
            "FetchX509SVID no registration matches the caller: \
             pid=7 uid=1 gid=unknown sha256=unknown path=/bin/web"
        );
    }

    #[test]
    fn without_a_record_there_is_no_receipt() {
        let none = refusals(None);
        assert_eq!(none.refuse(&caller(1, START)).message(), PLAIN);
        assert!(none.queue.take().is_none());

        let large = Numbering { padding: MAX_DECISION_JSON_BYTES, ..Numbering::default() };
        let large = refusals(Some(Arc::new(large)));
        assert_eq!(large.refuse(&caller(1, START)).message(), PLAIN, "the queue did not take it");
    }

    #[test]
    fn a_flood_of_refusals_is_recorded_up_to_the_cap_and_refused_beyond_it() {
        let recorder = Arc::new(Numbering::default());
        let refusals = refusals(Some(Arc::clone(&recorder)));
        let flood = |uids: &[u32], now: Duration| {
            let before = recorder.count.load(Ordering::SeqCst);
            let mut receipts = 0;
            for _ in 0..1_000 {
                for uid in uids {
                    let status = refusals.refuse(&caller(*uid, now));
                    assert_eq!(status.code(), Code::PermissionDenied);
                    receipts += usize::from(status.message() != PLAIN);
                }
            }
            assert_eq!(recorder.count.load(Ordering::SeqCst) - before, receipts);
            receipts as u32
        };
        assert_eq!(flood(&[1], START), MAX_RECORDED_PER_UID_BURST);
        assert_eq!(flood(&[2], START), MAX_RECORDED_PER_UID_BURST, "one user leaves room for another");
        let second = START + Duration::from_secs(1);
        assert_eq!(flood(&[1], second), MAX_RECORDED_PER_UID_PER_SECOND);
        // However many users there are.
        let many: Vec<u32> = (100..200).collect();
        let later = START + Duration::from_secs(1_000);
        assert_eq!(flood(&many, later), MAX_RECORDED_BURST);
        assert_eq!(flood(&many, later + Duration::from_secs(1)), MAX_RECORDED_PER_SECOND);
    }
}
