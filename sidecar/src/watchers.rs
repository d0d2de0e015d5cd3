//! Who hears of requests that have ended: the access log, whoever taps, the collector of traces.

use std::sync::Arc;
use std::time::Duration;

use crate::access::{AccessLog, Finished};
use crate::otlp::Traces;
use crate::tap::Tap;

/// All of them.
#[derive(Debug)]
pub(crate) struct Watchers {
    pub(crate) access_log: Option<Arc<AccessLog>>,
    pub(crate) tap: Arc<Tap>,
    pub(crate) traces: Option<Traces>,
}

impl Watchers {
    /// Whether anybody listens; if not, there is no need to gather what they would hear.
    pub(crate) fn listen(&self) -> bool {
        self.access_log.is_some() || self.traces.is_some() || self.tap.is_open()
    }

    /// Tells them of a request that ended at `now`.
    pub(crate) fn tell(&self, seen: &Finished<'_>, now: Duration) {
        if let Some(log) = &self.access_log {
            log.write(seen, now);
        }
        if let Some(traces) = &self.traces {
            traces.show(seen, now);
        }
        if self.tap.is_open() {
            self.tap.show(seen, now);
        }
    }
}
