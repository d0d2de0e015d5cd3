//! Faults made on purpose: some requests wait, some get an error instead of an answer. Off unless
//! configured, and said loudly when not.

use std::time::Duration;

use http::{HeaderMap, StatusCode};

use super::config::Faults;
use super::random::Dice;

/// Makes faults in the calls to one service.
#[derive(Debug)]
pub struct FaultInjector {
    config: Faults,
}

/// What is done to one request; usually nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fault {
    /// It waits so long first.
    pub delay: Option<Duration>,
    /// It gets this answer and goes nowhere.
    pub abort: Option<StatusCode>,
}

impl FaultInjector {
    /// Faults in the calls to `service`; `None` if these make none.
    pub fn new(config: Faults, service: &str) -> Option<Self> {
        let delays = config.delay.is_some() && config.delay_share > Default::default();
        let aborts = config.abort.is_some() && config.abort_share > Default::default();
        if !delays && !aborts {
            return None;
        }
        tracing::warn!(
            service,
            delay = ?config.delay.filter(|_| delays),
            delay_percent = config.delay_share.fraction() * 100.0,
            abort = ?config.abort.filter(|_| aborts),
            abort_percent = config.abort_share.fraction() * 100.0,
            only_with = config.only_with.as_ref().map(|name| name.as_str()),
            "FAULTS ARE MADE ON PURPOSE in calls to this service; take `faults` out of its configuration to end that"
        );
        Some(Self { config })
    }

    /// What is done to a request with these headers.
    pub fn decide(&self, headers: &HeaderMap, dice: &Dice) -> Fault {
        let Faults { delay, delay_share, abort, abort_share, only_with } = &self.config;
        if only_with.as_ref().is_some_and(|name| !headers.contains_key(name)) {
            return Fault::default();
        }
        Fault {
            delay: delay.filter(|_| delay_share.draw(dice)),
            abort: abort.filter(|_| abort_share.draw(dice)),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;
    use crate::traffic::config::Share;

    fn faults() -> Faults {
        Faults {
            delay: Some(Duration::from_millis(100)),
            delay_share: Share::percent(10),
            abort: Some(StatusCode::SERVICE_UNAVAILABLE),
            abort_share: Share::percent(1),
            only_with: None,
        }
    }

    #[test]
    fn shares_hold_and_are_independent() {
        let (injector, dice) = (FaultInjector::new(faults(), "accounts").unwrap(), Dice::seeded(11));
        let (mut delayed, mut aborted) = (0, 0);
        for _ in 0..100_000 {
            let fault = injector.decide(&HeaderMap::new(), &dice);
            delayed += u32::from(fault.delay.is_some());
            aborted += u32::from(fault.abort.is_some());
        }
        assert!((9_700..10_300).contains(&delayed) && (900..1_100).contains(&aborted), "{delayed} {aborted}");
    }

    #[test]
    fn only_requests_that_ask_for_it() {
        let name = HeaderName::from_static("x-fault");
        let all = Faults { delay_share: Share::whole(), only_with: Some(name.clone()), ..faults() };
        let (injector, dice) = (FaultInjector::new(all, "accounts").unwrap(), Dice::seeded(1));
        let mut headers = HeaderMap::new();
        assert_eq!(injector.decide(&headers, &dice), Fault::default());
        headers.insert(name, "yes".parse().unwrap());
        assert!(injector.decide(&headers, &dice).delay.is_some());
    }

    #[test]
    fn nothing_configured_is_no_injector() {
        assert!(FaultInjector::new(Faults::default(), "accounts").is_none());
        let share_alone = Faults { delay_share: Share::whole(), ..Faults::default() };
        assert!(FaultInjector::new(share_alone, "accounts").is_none());
    }
}
