//! Times as Vault writes them: RFC 3339, UTC, with nanoseconds.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A moment, in nanoseconds since the Unix epoch (good until the year 2554).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Stamp(u64);

impl Stamp {
    /// The moment `since_epoch` after the Unix epoch.
    pub fn new(since_epoch: Duration) -> Self {
        Self(u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX))
    }

    /// `2026-03-22T02:24:06.945319214Z`
    pub fn text(self) -> String {
        let text = OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0))
            .ok()
            .and_then(|moment| moment.format(&Rfc3339).ok());
        // INVARIANT: every u64 of nanoseconds is a year before 2555, which RFC 3339 can write.
        text.unwrap_or_default()
    }

    /// Since the Unix epoch.
    pub fn since_epoch(self) -> Duration {
        Duration::from_nanos(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_rfc_3339_in_utc() {
        assert_eq!(Stamp::new(Duration::ZERO).text(), "1970-01-01T00:00:00Z");
        assert_eq!(
            Stamp::new(Duration::new(1_521_685_446, 945_319_214)).text(),
            "2018-03-22T02:24:06.945319214Z"
        );
        assert!(Stamp(u64::MAX).text().starts_with("2554-"));
    }
}
