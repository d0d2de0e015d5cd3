//! How traffic to one service goes: decisions alone, without sockets; time and chance come from outside.
//!
//! | module | what it decides |
//! |---|---|
//! | [`endpoint`] | where a service is found, how near, and which endpoints may be chosen now |
//! | [`balance`] | which endpoint gets a request |
//! | [`outlier`] | which endpoint is left out for a while |
//! | [`breaker`] | what is refused because too much is under way |
//! | [`retry`], [`hedge`] | what is sent again, and what is sent twice |
//! | [`split`] | which of several services gets a call, and which calls are copied |
//! | [`config`] | the keys by which all of it is told |

pub mod balance;
pub mod breaker;
pub mod config;
pub mod endpoint;
pub mod hedge;
pub mod load;
pub mod outlier;
pub mod random;
pub mod retry;
pub mod split;
mod value;
