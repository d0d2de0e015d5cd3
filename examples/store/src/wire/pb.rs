//! The messages themselves. Numbers, once given, are kept: logs outlive versions.

use bytes::Bytes;

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Empty {}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(in crate::wire) struct Txn {
    #[prost(fixed64, tag = "1")]
    pub(in crate::wire) started: u64,
    #[prost(fixed64, tag = "2")]
    pub(in crate::wire) random: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Mutation {
    #[prost(bytes = "bytes", tag = "1")]
    pub(in crate::wire) key: Bytes,
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub(in crate::wire) value: Option<Bytes>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Span {
    #[prost(bytes = "bytes", tag = "1")]
    pub(in crate::wire) start: Bytes,
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub(in crate::wire) end: Option<Bytes>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Grant {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) node: u64,
    #[prost(uint64, tag = "2")]
    pub(in crate::wire) term: u64,
    #[prost(fixed64, tag = "3")]
    pub(in crate::wire) start: u64,
    #[prost(fixed64, tag = "4")]
    pub(in crate::wire) end: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Commit {
    #[prost(message, optional, tag = "1")]
    pub(in crate::wire) txn: Option<Txn>,
    #[prost(fixed64, tag = "2")]
    pub(in crate::wire) at: u64,
    #[prost(message, repeated, tag = "3")]
    pub(in crate::wire) writes: Vec<Mutation>,
    #[prost(uint64, repeated, tag = "4")]
    pub(in crate::wire) participants: Vec<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Settled {
    #[prost(message, repeated, tag = "1")]
    pub(in crate::wire) txns: Vec<Txn>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Prepare {
    #[prost(message, optional, tag = "1")]
    pub(in crate::wire) txn: Option<Txn>,
    #[prost(fixed64, tag = "2")]
    pub(in crate::wire) first: u64,
    #[prost(fixed64, tag = "3")]
    pub(in crate::wire) client: u64,
    #[prost(uint32, tag = "4")]
    pub(in crate::wire) attempt: u32,
    #[prost(fixed64, tag = "5")]
    pub(in crate::wire) at: u64,
    #[prost(message, repeated, tag = "6")]
    pub(in crate::wire) reads: Vec<Span>,
    #[prost(message, repeated, tag = "7")]
    pub(in crate::wire) writes: Vec<Mutation>,
    #[prost(uint64, tag = "8")]
    pub(in crate::wire) coordinator: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Resolve {
    #[prost(message, optional, tag = "1")]
    pub(in crate::wire) txn: Option<Txn>,
    #[prost(fixed64, optional, tag = "2")]
    pub(in crate::wire) committed: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Collect {
    #[prost(fixed64, tag = "1")]
    pub(in crate::wire) horizon: u64,
    #[prost(message, optional, tag = "3")]
    pub(in crate::wire) from: Option<Place>,
    #[prost(message, optional, tag = "4")]
    pub(in crate::wire) to: Option<Place>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Place {
    #[prost(bytes = "bytes", tag = "1")]
    pub(in crate::wire) row: Bytes,
    #[prost(fixed64, optional, tag = "2")]
    pub(in crate::wire) behind: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Forget {
    #[prost(fixed64, tag = "1")]
    pub(in crate::wire) outcomes: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Surveyed {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) rows: u64,
    #[prost(uint64, tag = "2")]
    pub(in crate::wire) bytes: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Split {
    #[prost(bytes = "bytes", tag = "1")]
    pub(in crate::wire) at: Bytes,
    #[prost(uint64, tag = "2")]
    pub(in crate::wire) right: u64,
    #[prost(uint64, tag = "3")]
    pub(in crate::wire) leader: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Retire {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) into: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Absorb {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) right: u64,
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub(in crate::wire) end: Option<Bytes>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(in crate::wire) enum Command {
    #[prost(message, tag = "3")]
    Close(Empty),
    #[prost(message, tag = "4")]
    Lease(Grant),
    #[prost(message, tag = "5")]
    Commit(Commit),
    #[prost(message, tag = "6")]
    Settled(Settled),
    #[prost(message, tag = "7")]
    Prepare(Prepare),
    #[prost(message, tag = "8")]
    Resolve(Resolve),
    #[prost(message, tag = "9")]
    Collect(Collect),
    #[prost(message, tag = "10")]
    Yield(Empty),
    #[prost(message, tag = "11")]
    Split(Split),
    #[prost(message, tag = "12")]
    Retire(Retire),
    #[prost(message, tag = "13")]
    Absorb(Absorb),
    #[prost(message, tag = "14")]
    Forget(Forget),
    #[prost(message, tag = "15")]
    Surveyed(Surveyed),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct LogEntry {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) term: u64,
    #[prost(fixed64, tag = "2")]
    pub(in crate::wire) closed: u64,
    #[prost(oneof = "Command", tags = "3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15")]
    pub(in crate::wire) command: Option<Command>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct HardState {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) term: u64,
    #[prost(uint64, tag = "2")]
    pub(in crate::wire) vote: u64,
    #[prost(uint64, tag = "3")]
    pub(in crate::wire) commit: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct RaftEntry {
    #[prost(int32, tag = "1")]
    pub(in crate::wire) kind: i32,
    #[prost(uint64, tag = "2")]
    pub(in crate::wire) term: u64,
    #[prost(uint64, tag = "3")]
    pub(in crate::wire) index: u64,
    #[prost(bytes = "bytes", tag = "4")]
    pub(in crate::wire) data: Bytes,
    #[prost(bytes = "bytes", tag = "5")]
    pub(in crate::wire) context: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Record {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) split: u64,
    #[prost(message, optional, tag = "2")]
    pub(in crate::wire) hard_state: Option<HardState>,
    #[prost(message, repeated, tag = "3")]
    pub(in crate::wire) entries: Vec<RaftEntry>,
    #[prost(uint64, optional, tag = "4")]
    pub(in crate::wire) restart: Option<u64>,
    #[prost(uint64, tag = "5")]
    pub(in crate::wire) life: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Conf {
    #[prost(uint64, repeated, tag = "1")]
    pub(in crate::wire) voters: Vec<u64>,
    #[prost(uint64, repeated, tag = "2")]
    pub(in crate::wire) learners: Vec<u64>,
    #[prost(uint64, repeated, tag = "3")]
    pub(in crate::wire) voters_outgoing: Vec<u64>,
    #[prost(uint64, repeated, tag = "4")]
    pub(in crate::wire) learners_next: Vec<u64>,
    #[prost(bool, tag = "5")]
    pub(in crate::wire) auto_leave: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Decision {
    #[prost(message, optional, tag = "1")]
    pub(in crate::wire) txn: Option<Txn>,
    #[prost(uint64, repeated, tag = "2")]
    pub(in crate::wire) participants: Vec<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Checkpoint {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) index: u64,
    #[prost(uint64, tag = "2")]
    pub(in crate::wire) index_term: u64,
    #[prost(message, optional, tag = "3")]
    pub(in crate::wire) conf: Option<Conf>,
    #[prost(uint64, tag = "4")]
    pub(in crate::wire) conf_index: u64,
    #[prost(message, optional, tag = "5")]
    pub(in crate::wire) range: Option<Span>,
    #[prost(uint64, tag = "6")]
    pub(in crate::wire) generation: u64,
    #[prost(fixed64, tag = "7")]
    pub(in crate::wire) closed: u64,
    #[prost(message, optional, tag = "8")]
    pub(in crate::wire) lease: Option<Grant>,
    #[prost(message, repeated, tag = "9")]
    pub(in crate::wire) prepared: Vec<Prepare>,
    #[prost(message, repeated, tag = "10")]
    pub(in crate::wire) unsettled: Vec<Decision>,
    #[prost(fixed64, tag = "11")]
    pub(in crate::wire) newest: u64,
    #[prost(uint64, tag = "12")]
    pub(in crate::wire) term: u64,
    #[prost(fixed64, tag = "13")]
    pub(in crate::wire) outcomes_since: u64,
    #[prost(uint64, optional, tag = "14")]
    pub(in crate::wire) retired: Option<u64>,
    #[prost(uint64, repeated, tag = "15")]
    pub(in crate::wire) absorbed: Vec<u64>,
    #[prost(uint64, tag = "16")]
    pub(in crate::wire) life: u64,
    #[prost(uint64, tag = "17")]
    pub(in crate::wire) home: u64,
    #[prost(uint64, tag = "18")]
    pub(in crate::wire) rows: u64,
    #[prost(uint64, tag = "19")]
    pub(in crate::wire) bytes: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Row {
    #[prost(bytes = "bytes", tag = "1")]
    pub(in crate::wire) key: Bytes,
    #[prost(fixed64, tag = "2")]
    pub(in crate::wire) at: u64,
    #[prost(bytes = "bytes", optional, tag = "3")]
    pub(in crate::wire) value: Option<Bytes>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Image {
    #[prost(message, optional, tag = "1")]
    pub(in crate::wire) checkpoint: Option<Checkpoint>,
    #[prost(message, repeated, tag = "2")]
    pub(in crate::wire) rows: Vec<Row>,
    #[prost(message, repeated, tag = "3")]
    pub(in crate::wire) outcomes: Vec<Resolve>,
    #[prost(fixed64, tag = "4")]
    pub(in crate::wire) kept_since: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct RaftSnapshot {
    #[prost(bytes = "bytes", tag = "1")]
    pub(in crate::wire) image: Bytes,
    #[prost(uint64, tag = "2")]
    pub(in crate::wire) index: u64,
    #[prost(uint64, tag = "3")]
    pub(in crate::wire) term: u64,
    #[prost(message, optional, tag = "4")]
    pub(in crate::wire) conf: Option<Conf>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Message {
    #[prost(int32, tag = "1")]
    pub(in crate::wire) kind: i32,
    #[prost(uint64, tag = "2")]
    pub(in crate::wire) to: u64,
    #[prost(uint64, tag = "3")]
    pub(in crate::wire) from: u64,
    #[prost(uint64, tag = "4")]
    pub(in crate::wire) term: u64,
    #[prost(uint64, tag = "5")]
    pub(in crate::wire) log_term: u64,
    #[prost(uint64, tag = "6")]
    pub(in crate::wire) index: u64,
    #[prost(message, repeated, tag = "7")]
    pub(in crate::wire) entries: Vec<RaftEntry>,
    #[prost(uint64, tag = "8")]
    pub(in crate::wire) commit: u64,
    #[prost(uint64, tag = "9")]
    pub(in crate::wire) commit_term: u64,
    #[prost(bool, tag = "10")]
    pub(in crate::wire) reject: bool,
    #[prost(uint64, tag = "11")]
    pub(in crate::wire) reject_hint: u64,
    #[prost(bytes = "bytes", tag = "12")]
    pub(in crate::wire) context: Bytes,
    #[prost(uint64, tag = "13")]
    pub(in crate::wire) request_snapshot: u64,
    #[prost(int64, tag = "14")]
    pub(in crate::wire) priority: i64,
    #[prost(message, optional, tag = "15")]
    pub(in crate::wire) snapshot: Option<RaftSnapshot>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Raft {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) split: u64,
    #[prost(bytes = "bytes", tag = "2")]
    pub(in crate::wire) message: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct AskPromise {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) split: u64,
    #[prost(message, optional, tag = "2")]
    pub(in crate::wire) txn: Option<Txn>,
    #[prost(fixed64, tag = "3")]
    pub(in crate::wire) first: u64,
    #[prost(fixed64, tag = "4")]
    pub(in crate::wire) client: u64,
    #[prost(uint32, tag = "5")]
    pub(in crate::wire) attempt: u32,
    #[prost(uint64, optional, tag = "6")]
    pub(in crate::wire) held: Option<u64>,
    #[prost(message, repeated, tag = "7")]
    pub(in crate::wire) writes: Vec<Mutation>,
    #[prost(uint64, tag = "8")]
    pub(in crate::wire) coordinator: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct About {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) split: u64,
    #[prost(message, optional, tag = "2")]
    pub(in crate::wire) txn: Option<Txn>,
    #[prost(uint64, tag = "3")]
    pub(in crate::wire) coordinator: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Vote {
    #[prost(message, optional, tag = "1")]
    pub(in crate::wire) about: Option<About>,
    #[prost(fixed64, optional, tag = "2")]
    pub(in crate::wire) promised: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Decided {
    #[prost(message, optional, tag = "1")]
    pub(in crate::wire) about: Option<About>,
    #[prost(fixed64, optional, tag = "2")]
    pub(in crate::wire) committed: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Pair {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) split: u64,
    #[prost(uint64, tag = "2")]
    pub(in crate::wire) number: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Route {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) split: u64,
    #[prost(message, optional, tag = "2")]
    pub(in crate::wire) range: Option<Span>,
    #[prost(uint64, tag = "3")]
    pub(in crate::wire) generation: u64,
    #[prost(uint64, repeated, tag = "4")]
    pub(in crate::wire) nodes: Vec<u64>,
    #[prost(uint64, optional, tag = "5")]
    pub(in crate::wire) leader: Option<u64>,
    #[prost(uint64, tag = "6")]
    pub(in crate::wire) term: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Gone {
    #[prost(uint64, tag = "1")]
    pub(in crate::wire) split: u64,
    #[prost(uint64, tag = "2")]
    pub(in crate::wire) term: u64,
    #[prost(uint64, tag = "3")]
    pub(in crate::wire) last: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Routes {
    #[prost(message, repeated, tag = "1")]
    pub(in crate::wire) routes: Vec<Route>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(in crate::wire) enum Said {
    #[prost(message, tag = "1")]
    Raft(Raft),
    #[prost(message, tag = "2")]
    Prepare(AskPromise),
    #[prost(message, tag = "3")]
    Vote(Vote),
    #[prost(message, tag = "4")]
    Decided(Decided),
    #[prost(message, tag = "5")]
    Heard(About),
    #[prost(message, tag = "6")]
    Ask(About),
    #[prost(message, tag = "7")]
    Close(Pair),
    #[prost(message, tag = "8")]
    Routes(Routes),
    #[prost(message, tag = "9")]
    Gone(Gone),
    #[prost(message, tag = "10")]
    Retire(Pair),
    #[prost(message, tag = "11")]
    Leaving(Pair),
    #[prost(message, tag = "12")]
    Wound(About),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct Peer {
    #[prost(oneof = "Said", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12")]
    pub(in crate::wire) said: Option<Said>,
}

/// As consensus itself writes it: `ConfChangeSingle` of `eraftpb.proto`.
#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct ConfChangeSingle {
    #[prost(int32, tag = "1")]
    pub(in crate::wire) kind: i32,
    #[prost(uint64, tag = "2")]
    pub(in crate::wire) node: u64,
}

/// As consensus itself writes it: `ConfChangeV2` of `eraftpb.proto`.
#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::wire) struct ConfChange {
    #[prost(int32, tag = "1")]
    pub(in crate::wire) transition: i32,
    #[prost(message, repeated, tag = "2")]
    pub(in crate::wire) changes: Vec<ConfChangeSingle>,
}
