//! How traffic to one service goes: decisions alone, without sockets; time and chance come from outside.
//!
//! | module | what it decides |
//! |---|---|
//! | [`steer`] | all of it for one service together. Start reading here. |
//! | [`endpoint`] | where a service is found, and which endpoints may be chosen now |
//! | [`topology`] | how near an endpoint is |
//! | [`resolve`] | where that knowledge comes from: a list, a name, whoever pushes it |
//! | [`balance`] | which endpoint gets a request |
//! | [`outlier`] | which endpoint is left out for a while |
//! | [`health`], [`probe`] | when endpoints are asked whether they are well, what, and what follows |
//! | [`breaker`] | what is refused because too much is under way |
//! | [`retry`], [`hedge`] | what is sent again, and what is sent twice |
//! | [`split`] | which of several services gets a call, and which calls are copied |
//! | [`timeouts`] | how long each stage may take, and the deadline that travels along |
//! | [`ratelimit`] | who asks too often |
//! | [`fault`] | what goes wrong on purpose |
//! | [`egress`] | which hosts outside the mesh may be called |
//! | [`config`] | the keys by which all of it is told |

pub mod balance;
pub mod breaker;
pub mod config;
pub mod egress;
pub mod endpoint;
pub mod fault;
pub mod health;
pub mod hedge;
pub mod load;
pub mod outlier;
pub(crate) mod probe;
pub mod random;
pub mod ratelimit;
pub mod resolve;
pub mod retry;
pub mod split;
pub mod steer;
pub mod timeouts;
pub mod topology;
mod value;
