//! Refusals as gRPC statuses, with a trailer for programs that names the reason.

use store_client::{LEADER_NODE_TRAILER, LEADER_TRAILER, REASON_TRAILER, Reason};
use tonic::{
    Code, Status,
    metadata::{Ascii, MetadataValue},
};

use super::{core::Failed, identity::Addresses};
use crate::{node::Refused, schema::SchemaError};

/// The status of a refusal for this reason.
pub(super) fn refusal(reason: Reason, message: impl Into<String>) -> Status {
    let mut status = Status::new(code(reason), message);
    status.metadata_mut().insert(REASON_TRAILER, MetadataValue::from_static(reason.name()));
    status
}

/// The reason that a refusal has.
pub(super) fn reason_of(status: &Status) -> Option<Reason> {
    status.metadata().get(REASON_TRAILER)?.to_str().ok().and_then(Reason::parse)
}

/// What the node said no with.
pub(super) fn refused(refused: &Refused, addresses: &Addresses) -> Status {
    let (reason, leader) = match refused {
        Refused::NotLeader { leader } => (Reason::NotLeader, *leader),
        Refused::NotHere { leader } => (Reason::NotHere, *leader),
        Refused::TooStale { leader, .. } => (Reason::TooStale, *leader),
        Refused::Busy(_) => (Reason::Busy, None),
        Refused::Aborted => (Reason::Aborted, None),
        Refused::Ended => (Reason::Ended, None),
        Refused::Unknown => (Reason::Unknown, None),
        Refused::Future { .. } => (Reason::Future, None),
        Refused::Collected { .. } => (Reason::Collected, None),
        Refused::TooMuch(_) => (Reason::TooMuch, None),
        Refused::Invalid(_) => (Reason::Invalid, None),
        Refused::NoClock(_) => (Reason::NoClock, None),
    };
    let mut status = refusal(reason, refused.to_string());
    if let Some(leader) = leader {
        status.metadata_mut().insert(LEADER_NODE_TRAILER, leader.0.into());
    }
    let address = leader.and_then(|leader| addresses.of(leader));
    if let Some(address) = address.and_then(|address| address.parse::<MetadataValue<Ascii>>().ok()) {
        status.metadata_mut().insert(LEADER_TRAILER, address);
    }
    status
}

/// Why there is no answer.
pub(super) fn failed(failed: &Failed, addresses: &Addresses) -> Status {
    match failed {
        Failed::Refused(why) => refused(why, addresses),
        Failed::Stopping => refusal(Reason::Stopping, "this node stops"),
        Failed::Lost => refusal(Reason::Unknown, "this node stopped before it answered"),
    }
}

/// Why a name is none.
pub(super) fn misnamed(error: &SchemaError) -> Status {
    let reason = match error {
        SchemaError::Name(error) => error.reason(),
        SchemaError::Key(_) => Reason::BadKey,
        SchemaError::TooLong(_) => Reason::TooMuch,
    };
    refusal(reason, error.to_string())
}

fn code(reason: Reason) -> Code {
    match reason {
        Reason::NotLeader
        | Reason::NotHere
        | Reason::Busy
        | Reason::TooStale
        | Reason::NoClock
        | Reason::Stopping => Code::Unavailable,
        Reason::Aborted => Code::Aborted,
        Reason::Ended => Code::FailedPrecondition,
        Reason::Unknown => Code::Unknown,
        Reason::Future | Reason::Collected => Code::OutOfRange,
        Reason::TooMuch
        | Reason::Invalid
        | Reason::Malformed
        | Reason::BadTable
        | Reason::BadKey
        | Reason::BadRange => Code::InvalidArgument,
        Reason::UnknownTable => Code::NotFound,
        Reason::TableExists => Code::AlreadyExists,
        Reason::ReservedTable => Code::PermissionDenied,
        Reason::Internal => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::lease::NodeId;

    #[test]
    fn a_status_says_why_and_where_to_ask_instead() {
        let addresses = Addresses::new(BTreeMap::from([(2, "127.0.0.1:7002".to_owned())]));
        let status = refused(&Refused::NotLeader { leader: Some(NodeId(1 << 16 | 2)) }, &addresses);
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(status.metadata().get(REASON_TRAILER).unwrap(), "NOT_LEADER");
        assert_eq!(status.metadata().get(LEADER_TRAILER).unwrap(), "127.0.0.1:7002");
        assert_eq!(status.metadata().get(LEADER_NODE_TRAILER).unwrap(), "65538");
        let status = refused(&Refused::NotLeader { leader: Some(NodeId(3)) }, &addresses);
        assert_eq!(status.metadata().get(LEADER_TRAILER), None);
    }
}
