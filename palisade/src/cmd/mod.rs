//! One file a verb.

mod admin;
pub(crate) mod agent;
pub(crate) mod capture;
pub(crate) mod config;
mod console;
pub(crate) mod control;
pub(crate) mod explain;
pub(crate) mod gateway;
pub(crate) mod id;
pub(crate) mod idp;
pub(crate) mod policy;
pub(crate) mod relations;
pub(crate) mod run;
pub(crate) mod sidecar;
pub(crate) mod status;
pub(crate) mod tap;
pub(crate) mod token;
pub(crate) mod vault;
