//! What may be done: Cedar policies over a map from HTTP requests to actions on objects.
//!
//! A request is mapped ([`ServicePolicy::map`]), screened ([`ServicePolicy::screen`]), given the
//! attributes of its objects ([`Mapped::attributes_from`]) and decided ([`ServicePolicy::decide`]).
//! Whoever passes it on needs the [`Permit`] that only a decision makes. Everything else ends in a
//! [`Denial`] with a [`Receipt`], which [`render`] explains.
//!
//! Nothing here does I/O on a request's path.

mod batch;
mod body;
mod cases;
mod decide;
mod engine;
mod explain;
mod filter;
mod forms;
mod in_force;
mod judge;
mod kafka;
mod load;
mod map;
mod object;
mod openapi;
mod oracle;
mod personal;
mod plan;
mod problem;
mod proto;
mod question;
mod receipt;
mod record;
mod relations;
mod render;
mod replay;
mod request;
mod rings;
mod routes;
mod schema;
mod shadow;
mod shipped;
mod template;
mod tree;
mod verdict;
mod version;

pub use batch::Kept;
pub use body::{BodyRule, MAX_JUDGED_BODY_BYTES};
pub use cases::{Case, Decision};
pub use decide::{Reach, ServicePolicy};
pub use filter::Filtered;
pub use in_force::{InForce, Withheld, decision_counts};
pub use kafka::{KafkaAction, KafkaJudged, KafkaObject};
pub use load::{Invariant, Policies, slices};
pub use map::{CONNECT_ACTION, Mapping, PORT_TYPE};
pub use object::{AttributeValue, Attributes, ObjectRef};
pub use openapi::UnmappedOperation;
pub use personal::Personal;
pub use problem::{Problem, Problems, suggest};
pub use question::{AskedBody, Question};
pub use receipt::{Receipt, ReceiptError, Receipts};
pub use record::{
    Considered, DecisionRecord, Explanation, FailedClause, Layer, MemoryRecorder, Mismatch, Mode, Nearest,
    NoRecorder, Outcome, PolicyEffect, PolicyOutcome, RecordedObject, RecordedUser, Recorder, Rule,
    ScopePart,
};
pub use relations::{RelationsCopy, RelationsToken, TokenError};
pub use render::{Style, render, render_answer, render_with};
pub use replay::Replayed;
pub use request::{AttributeSource, ENTITIES_PATH, Mapped, Refusal};
pub use rings::{Ring, Rings};
pub use shadow::{ShadowCounts, shadow_counts};
pub use verdict::{Caller, Denial, Occasion, Permit, Principal, Verdict, refuse_connection};
pub use version::PolicyVersion;
