//! Why something was not done, and whether it may have been done all the same.

use std::fmt;

use tonic::{Code, Status};

use crate::{LEADER_NODE_TRAILER, LEADER_TRAILER, REASON_TRAILER, book::Book, schema::NameError};

/// What a node said of a refusal, or the client itself where no node was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// For people.
    pub message: String,
    /// For programs. Absent where none of the store's nodes said it: the network, or what stands before the store.
    pub reason: Option<Reason>,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Why something was not done. Nothing was written for certain, but for [`Error::Unknown`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The transaction was ended by an older one or by a change of leader. Begin again with its age:
    /// [`crate::Client::begin_again`].
    #[error("{0}")]
    Aborted(Told),
    /// The transaction has ended before, without a commit.
    #[error("{0}")]
    Ended(Told),
    /// A commit, a declaration or a change of a split was sent and no answer to it came in time: it happened, or will, or
    /// never will.
    #[error("it may or may not have happened: {0}")]
    Unknown(Told),
    /// Nobody could be asked in time.
    #[error("{0}")]
    Unavailable(Told),
    /// Malformed, over a limit, or something that cannot be.
    #[error("{0}")]
    InvalidArgument(Told),
    /// No such table.
    #[error("{0}")]
    NotFound(Told),
    /// The table is declared otherwise.
    #[error("{0}")]
    AlreadyExists(Told),
    /// A snapshot of the future, or of what is forgotten.
    #[error("{0}")]
    OutOfRange(Told),
    /// Whoever stands before the store, or the store for a reserved table, does not allow it.
    #[error("{0}")]
    Denied(Told),
    /// Anything else that was said.
    #[error("{0}")]
    Other(Told),
    /// The closure given to [`crate::Client::transact`] gave up.
    #[error("the transaction was given up")]
    GivenUp(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// What a closure given to [`crate::Client::transact`] returns to roll back for a reason of its own.
    pub fn give_up(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::GivenUp(why.into())
    }

    /// Nothing was written for certain, and nothing will be.
    pub fn nothing_written(&self) -> bool {
        !matches!(self, Self::Unknown(_))
    }

    /// What was said, for people and programs.
    pub fn told(&self) -> Option<&Told> {
        match self {
            Self::Aborted(told)
            | Self::Ended(told)
            | Self::Unknown(told)
            | Self::Unavailable(told)
            | Self::InvalidArgument(told)
            | Self::NotFound(told)
            | Self::AlreadyExists(told)
            | Self::OutOfRange(told)
            | Self::Denied(told)
            | Self::Other(told) => Some(told),
            Self::GivenUp(_) => None,
        }
    }

    /// For programs. Absent where none of the store's nodes said it.
    pub fn reason(&self) -> Option<Reason> {
        self.told().and_then(|told| told.reason)
    }

    /// Nobody could be asked, in the client's own words.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::Unavailable(Told { message: message.into(), reason: None })
    }

    /// The same, once a commit was sent to which no answer came.
    pub(crate) fn unknown(self) -> Self {
        match self {
            // Said of the transaction itself, however often it was asked.
            Self::Aborted(_) | Self::Ended(_) | Self::Unknown(_) => self,
            other => Self::Unknown(Told { message: other.to_string(), reason: other.reason() }),
        }
    }
}

impl From<NameError> for Error {
    fn from(error: NameError) -> Self {
        let reason = Some(error.reason());
        Self::InvalidArgument(Told { message: error.to_string(), reason })
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a node refused, as its trailer `store-reason` names it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $($(#[$doc])* $variant,)*
        }

        impl Reason {
            /// All there are.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// As the trailer has it.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

reasons! {
    /// Another node leads the split. Temporary.
    NotLeader = "NOT_LEADER",
    /// The split is elsewhere, or the rows are of more than one. Temporary.
    NotHere = "NOT_HERE",
    /// Too much is waiting, a wait took too long, or the split is being changed. Temporary.
    Busy = "BUSY",
    /// The replica is older than was asked for. Temporary.
    TooStale = "TOO_STALE",
    /// The node's clock has no known bound. Temporary, it is hoped.
    NoClock = "NO_CLOCK",
    /// The node stops, or has not started yet. Temporary.
    Stopping = "STOPPING",
    /// The transaction's locks are lost.
    Aborted = "ABORTED",
    /// The transaction had ended, without a commit.
    Ended = "ENDED",
    /// The commit, or the change of a split, may or may not have happened.
    Unknown = "UNKNOWN",
    /// A snapshot of a moment that has not come.
    Future = "FUTURE",
    /// A snapshot of a moment whose versions are forgotten.
    Collected = "COLLECTED",
    /// Over a limit.
    TooMuch = "TOO_MUCH",
    /// What an operator asked for cannot be.
    Invalid = "INVALID",
    /// A field is missing or means nothing.
    Malformed = "MALFORMED",
    /// A table's name or declaration that is none.
    BadTable = "BAD_TABLE",
    /// A row's key that is not written as the only way to write it.
    BadKey = "BAD_KEY",
    /// A range that is none.
    BadRange = "BAD_RANGE",
    /// No such table.
    UnknownTable = "UNKNOWN_TABLE",
    /// The table is declared otherwise.
    TableExists = "TABLE_EXISTS",
    /// The table of declarations is written by CreateTable alone.
    ReservedTable = "RESERVED_TABLE",
    /// The node failed at what it should be able to do.
    Internal = "INTERNAL",
}

impl Reason {
    /// The reason of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.name() == name)
    }

    /// Asking again, there or elsewhere, may help. Nothing was done so far.
    pub fn is_temporary(self) -> bool {
        matches!(
            self,
            Self::NotLeader | Self::NotHere | Self::Busy | Self::TooStale | Self::NoClock | Self::Stopping
        )
    }
}

/// What became of one try.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) error: Error,
    /// Another try may help.
    pub(crate) again: bool,
    /// It may have been done for all that is known.
    pub(crate) lost: bool,
    /// Where to ask instead.
    pub(crate) leader: Option<String>,
}

impl Fault {
    /// No answer in time.
    pub(crate) fn late(address: &str) -> Self {
        let error = Error::unavailable(format!("{address} did not answer in time"));
        Self { error, again: true, lost: true, leader: None }
    }

    /// It cannot even be tried now.
    pub(crate) fn unreachable(message: String) -> Self {
        Self { error: Error::unavailable(message), again: true, lost: false, leader: None }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self { error, again: false, lost: false, leader: None }
    }
}

/// What a status means, said by the node at `address` or by what is before it. `book` says where the leader is that it
/// names.
pub(crate) fn fault(address: &str, status: &Status, book: &Book) -> Fault {
    let trailer = |name| status.metadata().get(name).and_then(|value| value.to_str().ok());
    let reason = trailer(REASON_TRAILER).and_then(Reason::parse);
    let leader_node = trailer(LEADER_NODE_TRAILER).and_then(|node| node.parse().ok());
    let leader = book.find(leader_node.unwrap_or_default(), trailer(LEADER_TRAILER).unwrap_or_default());
    let message = match reason {
        Some(_) => status.message().to_owned(),
        None => format!("{address}: {}", explain(status)),
    };
    let told = Told { message, reason };
    let Some(reason) = reason else {
        return silent(status, told);
    };
    let error = match status.code() {
        _ if reason.is_temporary() => Error::Unavailable(told),
        Code::Aborted => Error::Aborted(told),
        Code::FailedPrecondition if reason == Reason::Ended => Error::Ended(told),
        // Whoever asked for a change, and knows that this was one, says that it is unknown.
        Code::Unknown => Error::Unavailable(told),
        Code::InvalidArgument => Error::InvalidArgument(told),
        Code::NotFound => Error::NotFound(told),
        Code::AlreadyExists => Error::AlreadyExists(told),
        Code::OutOfRange => Error::OutOfRange(told),
        Code::PermissionDenied => Error::Denied(told),
        _ => Error::Other(told),
    };
    let lost = matches!(reason, Reason::Unknown | Reason::Internal);
    Fault { error, again: reason.is_temporary() || reason == Reason::Unknown, lost, leader }
}

/// No node of the store said it: the network, or what stands before the store.
fn silent(status: &Status, told: Told) -> Fault {
    let refused = connect_failed(status);
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated => Error::Denied(told).into(),
        Code::InvalidArgument => Error::InvalidArgument(told).into(),
        // A message over a limit of whoever is to read it.
        Code::OutOfRange => Error::InvalidArgument(told).into(),
        Code::Unimplemented | Code::ResourceExhausted => Error::Other(told).into(),
        _ => Fault { error: Error::Unavailable(told), again: true, lost: !refused, leader: None },
    }
}

/// Whether there never was a connection for the request to go over.
fn connect_failed(status: &Status) -> bool {
    chain(status).any(|error| error.is::<tonic::ConnectError>())
}

fn chain(status: &Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(status), |error| error.source())
}

/// A transport's own message says nothing; what it stands on does.
fn explain(status: &Status) -> String {
    let mut words = vec![status.message().to_owned()];
    for error in chain(status) {
        let next = error.to_string();
        if !next.is_empty() && words.last().is_none_or(|last| !last.contains(&next)) {
            words.push(next);
        }
    }
    words.retain(|word| !word.is_empty());
    if words.is_empty() { status.code().description().to_owned() } else { words.join(": ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announced() -> Book {
        Book::parse(["a:1".to_owned()]).unwrap()
    }

    #[test]
    fn every_reason_is_found_by_its_name() {
        for reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.name()), Some(*reason));
        }
        assert_eq!(Reason::parse("not_leader"), None);
    }

    #[test]
    fn what_no_node_said_may_have_been_done() {
        let fault = fault("a:1", &Status::unavailable("reset"), &announced());
        assert!(fault.lost && fault.again);
        assert!(matches!(fault.error.unknown(), Error::Unknown(_)));
    }

    #[test]
    fn what_was_too_large_to_be_read_was_not_done() {
        let fault = fault("a:1", &Status::out_of_range("the limit is 33554432 bytes"), &announced());
        assert!(!fault.lost && !fault.again);
        assert!(matches!(fault.error, Error::InvalidArgument(_)));
    }

    #[test]
    fn a_read_whose_answer_is_lost_has_written_nothing() {
        let mut status = Status::unknown("this node stopped before it answered");
        status.metadata_mut().insert(REASON_TRAILER, "UNKNOWN".parse().unwrap());
        let fault = fault("a:1", &status, &announced());
        assert!(fault.lost && fault.again && fault.error.nothing_written());
        assert!(matches!(fault.error.unknown(), Error::Unknown(_)));
    }

    #[test]
    fn a_node_that_says_so_has_done_nothing() {
        let mut status = Status::unavailable("not I");
        status.metadata_mut().insert(REASON_TRAILER, "NOT_LEADER".parse().unwrap());
        status.metadata_mut().insert(LEADER_TRAILER, "b:2".parse().unwrap());
        let fault = fault("a:1", &status, &announced());
        assert!(!fault.lost && fault.again);
        assert_eq!(fault.leader.as_deref(), Some("b:2"));
        assert_eq!(fault.error.reason(), Some(Reason::NotLeader));
        assert_eq!(fault.error.to_string(), "not I");
    }

    #[test]
    fn a_leader_is_looked_for_where_this_client_was_told() {
        let mut status = Status::unavailable("not I");
        let own = Book::parse(["2=ours:2".to_owned()]).unwrap();
        for (node, leader) in [("65538", Some("ours:2")), ("3", None), ("x", None)] {
            status.metadata_mut().insert(REASON_TRAILER, "NOT_LEADER".parse().unwrap());
            status.metadata_mut().insert(LEADER_TRAILER, "theirs:2".parse().unwrap());
            status.metadata_mut().insert(LEADER_NODE_TRAILER, node.parse().unwrap());
            assert_eq!(fault("ours:1", &status, &own).leader.as_deref(), leader);
        }
    }
}
