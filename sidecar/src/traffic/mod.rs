//! How traffic to one service goes: decisions alone, without sockets; time and chance come from outside.
//!
//! | module | what it decides |
//! |---|---|
//! | [`endpoint`] | where a service is found, how near, and which endpoints may be chosen now |
//! | [`balance`] | which endpoint gets a request |
//! | [`outlier`] | which endpoint is left out for a while |
//! | [`split`] | which of several services gets a call, and which calls are copied |
//! | [`config`] | the keys by which all of it is told |

pub mod balance;
pub mod config;
pub mod endpoint;
pub mod load;
pub mod outlier;
pub mod random;
pub mod split;
mod value;
