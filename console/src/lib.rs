//! The console: the mesh's web pages.
//!
//! Server-rendered, live by server-sent events, one stylesheet and a few dozen lines of plain script
//! served from their own paths under a strict Content-Security-Policy; no build step, nothing from
//! another origin. Read-only: it shows a [`ReadModel`] and changes nothing.
//!
//! [`router`] is the whole public face; serve it on a loopback address, and hand the link
//! `http://ADDRESS/?token=TOKEN` to the operator.

mod access;
mod live;
mod model;
mod pages;
mod routes;
mod when;
mod wrong;

pub use model::{
    DecisionDetail, DecisionRow, HolderRow, IdentityRow, NodeRow, Overview, PoliciesRow, ReadModel, Verdict,
};
pub use routes::{router, router_with_clock};
