//! The front door: browsers and API clients come in, verified users go on as transaction tokens.
//!
//! | module | what it holds |
//! |---|---|
//! | [`request`] | the path of one request, straight down. Start reading here. |
//! | [`gateway`] | what the front door owns and how it starts |
//! | [`config`] | what it is told |
//! | [`jwt`], [`jwk`], [`issuer`] | when a token is believed, by which keys, and where those come from |
//! | [`session`], [`store`], [`seal`] | browser sessions: refreshed, kept, sealed |
//! | [`browser`] | logging in and out |
//! | [`flow`], [`cookie`] | state that travels through a browser and back |
//! | [`coarse`], [`refusal`], [`answer`] | the policy's question, and how a no is said and recorded |
//! | [`target`] | which request targets are looked at |
//! | [`https`] | the client that talks to issuers |
//! | [`idp`] | an OpenID provider for people who have none |
//! | [`login`] | a login without a browser, for command lines and tests |

mod answer;
mod browser;
mod coarse;
pub mod config;
mod cookie;
mod flow;
pub mod gateway;
pub mod https;
pub mod idp;
pub mod issuer;
pub mod jwk;
pub mod jwt;
pub mod login;
mod refusal;
pub mod request;
pub mod seal;
pub mod session;
pub mod store;
pub mod target;
#[cfg(test)]
mod testing;

pub use browser::{CALLBACK, LOGGED_OUT};
pub use config::{
    Algorithm, GatewayConfig, Issuer, IssuerConfig, Rate, Route, SESSION_COOKIE, SealKey, Service,
    SessionLimits,
};
pub use gateway::{Gateway, GatewayError};
pub use https::Trust;
pub use identity::random::SharedRandom;

/// Any error, at seams where the kind no longer matters.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Paths of the gateway's own; nothing below it is routed to a service.
pub const OWN_PREFIX: &str = "/.palisade/";
