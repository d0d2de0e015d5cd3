//! How long a request may take, and the deadline that a gRPC call brings and takes along.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use thiserror::Error;

use super::config::Timeouts;
use crate::grpc::is_call;

/// The time that a gRPC caller gives (gRPC over HTTP/2, "Requests").
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// Its digits are at most so many.
const MAX_DIGITS: usize = 8;
const MAX_NUMBER: u128 = 99_999_999;

/// When one request must be where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// At the head of its answer. That of a gRPC call may come with the first message, whenever that is, so there it
    /// is as the whole.
    pub head: Deadline,
    /// At the end of its answer.
    pub whole: Deadline,
    /// The longest pause within its answer.
    pub idle: Option<Duration>,
}

impl Bounds {
    /// Those of a request that came now; `head` is the time to the head of its answer.
    pub fn of(
        headers: &HeaderMap,
        head: Duration,
        timeouts: &Timeouts,
        now: Duration,
    ) -> Result<Self, MalformedTimeout> {
        let whole = Deadline::of(headers, timeouts, now)?;
        let head = if is_call(headers) { whole } else { Deadline::within(head, now).earlier(whole) };
        Ok(Self { head, whole, idle: timeouts.idle })
    }
}

/// When a request's time is over, on the clock that `now` comes from; or never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Deadline(Option<Duration>);

/// A `grpc-timeout` that is none; to be answered 400, for a caller's deadline is not guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("grpc-timeout is not one to eight digits and one of H, M, S, m, u, n")]
pub struct MalformedTimeout;

impl Deadline {
    /// No bound.
    pub const NEVER: Self = Self(None);

    /// In so long from now.
    pub fn within(limit: Duration, now: Duration) -> Self {
        Self(now.checked_add(limit))
    }

    /// The deadline of a request that came now: what the caller gives it, if it is a gRPC call, but no
    /// later than [`Timeouts::whole`].
    pub fn of(headers: &HeaderMap, timeouts: &Timeouts, now: Duration) -> Result<Self, MalformedTimeout> {
        let own = timeouts.whole.map_or(Self::NEVER, |whole| Self::within(whole, now));
        let given = grpc_timeout(headers)?.map_or(Self::NEVER, |given| Self::within(given, now));
        Ok(own.earlier(given))
    }

    /// The earlier of two.
    pub fn earlier(self, other: Self) -> Self {
        match (self.0, other.0) {
            (Some(one), Some(other)) => Self(Some(one.min(other))),
            (one, other) => Self(one.or(other)),
        }
    }

    /// What is left: zero when it is over, `None` without bound.
    pub fn left(self, now: Duration) -> Option<Duration> {
        self.0.map(|at| at.saturating_sub(now))
    }

    /// Whether it is over.
    pub fn is_over(self, now: Duration) -> bool {
        self.left(now) == Some(Duration::ZERO)
    }

    /// Tells the next hop what is left: each hop gets less than the one before, so that none works on what
    /// nobody waits for any more. Does nothing without bound and for what is not a gRPC call.
    pub fn pass_on(self, headers: &mut HeaderMap, now: Duration) {
        if let Some(left) = self.left(now)
            && is_call(headers)
            && let Ok(value) = HeaderValue::try_from(encode(left))
        {
            headers.insert(GRPC_TIMEOUT, value);
        }
    }
}

/// What a gRPC caller gives its call; `None` if it sets no bound, or is none.
fn grpc_timeout(headers: &HeaderMap) -> Result<Option<Duration>, MalformedTimeout> {
    if !is_call(headers) {
        return Ok(None);
    }
    let mut values = headers.get_all(GRPC_TIMEOUT).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => decode(value.as_bytes()).map(Some).ok_or(MalformedTimeout),
        (Some(_), Some(_)) => Err(MalformedTimeout),
    }
}

fn decode(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > MAX_DIGITS || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = digits.iter().fold(0u64, |number, digit| number * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(number * 3600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

/// In the finest unit that has room, rounded down: never more than there is.
fn encode(left: Duration) -> String {
    let nanos = left.as_nanos();
    let units = [(1, 'n'), (1_000, 'u'), (1_000_000, 'm'), (1_000_000_000, 'S'), (60_000_000_000, 'M')];
    let fits = units.into_iter().find(|(size, _)| nanos / size <= MAX_NUMBER);
    let (size, unit) = fits.unwrap_or((3_600_000_000_000, 'H'));
    format!("{}{unit}", (nanos / size).min(MAX_NUMBER))
}

#[cfg(test)]
mod tests {
    use http::header::CONTENT_TYPE;
    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::from_secs(1_700_000_000);

    fn grpc(timeout: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc+proto"));
        for value in timeout {
            headers.append(GRPC_TIMEOUT, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn the_examples_of_the_specification_and_what_is_none() {
        for (text, expected) in [
            ("1S", Some(1_000_000_000)),
            ("100m", Some(100_000_000)),
            ("99999999u", Some(99_999_999_000)),
            ("5n", Some(5)),
            ("2M", Some(120_000_000_000)),
            ("1H", Some(3_600_000_000_000)),
            ("0S", Some(0)),
        ] {
            assert_eq!(decode(text.as_bytes()).map(|d| d.as_nanos()), expected, "{text}");
        }
        for text in
            ["", "S", "1", "1s", "1h", "123456789m", "-1S", "+1S", "1.5S", " 1S", "1S ", "1 S", "1SS", "０S"]
        {
            assert_eq!(decode(text.as_bytes()), None, "{text:?}");
        }
    }

    #[test]
    fn the_earlier_of_what_the_caller_gives_and_what_we_give() {
        let timeouts = |whole| Timeouts { whole, ..Timeouts::default() };
        let five = Some(Duration::from_secs(5));
        for (headers, whole, expected) in [
            (grpc(&["2S"]), five, Some(2)),
            (grpc(&["8S"]), five, Some(5)),
            (grpc(&["8S"]), None, Some(8)),
            (grpc(&[]), five, Some(5)),
            (grpc(&[]), None, None),
        ] {
            let deadline = Deadline::of(&headers, &timeouts(whole), NOW).unwrap();
            assert_eq!(deadline.left(NOW), expected.map(Duration::from_secs));
        }
        assert_eq!(Deadline::of(&grpc(&["1S", "1S"]), &timeouts(None), NOW), Err(MalformedTimeout));
        let mut plain = grpc(&["nonsense"]);
        plain.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpcx"));
        assert_eq!(Deadline::of(&plain, &timeouts(None), NOW), Ok(Deadline::NEVER), "no gRPC, no timeout");
    }

    #[test]
    fn the_head_of_a_call_may_come_late_and_that_of_any_other_may_not() {
        let ten = Duration::from_secs(10);
        let bounds = |headers: &HeaderMap, whole| {
            let timeouts = Timeouts { whole, ..Timeouts::default() };
            let bounds = Bounds::of(headers, ten, &timeouts, NOW).unwrap();
            (bounds.head.left(NOW), bounds.whole.left(NOW))
        };
        let five = Some(Duration::from_secs(5));
        assert_eq!(bounds(&HeaderMap::new(), None), (Some(ten), None));
        assert_eq!(bounds(&HeaderMap::new(), five), (five, five));
        assert_eq!(bounds(&grpc(&[]), None), (None, None));
        assert_eq!(bounds(&grpc(&["60S"]), None).0, Some(Duration::from_secs(60)));
    }

    #[test]
    fn every_hop_gets_what_is_left() {
        let mut headers = grpc(&["2S"]);
        let deadline = Deadline::of(&headers, &Timeouts::default(), NOW).unwrap();
        deadline.pass_on(&mut headers, NOW + Duration::from_millis(1_500));
        assert_eq!(decode(headers[GRPC_TIMEOUT].as_bytes()), Some(Duration::from_millis(500)));
        assert!(!deadline.is_over(NOW + Duration::from_millis(1_999)));
        assert!(deadline.is_over(NOW + Duration::from_secs(2)));
        let mut plain = HeaderMap::new();
        deadline.pass_on(&mut plain, NOW);
        assert!(plain.is_empty());
    }

    proptest! {
        #[test]
        fn what_is_passed_on_is_read_back_never_longer(secs in 0u64..u64::MAX / 2, nanos in 0u32..1_000_000_000) {
            let left = Duration::new(secs, nanos);
            let read = decode(encode(left).as_bytes()).unwrap();
            prop_assert!(read <= left);
            // At most one unit is lost, and the unit is at most a ten-millionth of what is left.
            if secs < 99_999_999 * 3600 {
                prop_assert!(left - read <= (left / 10_000_000).max(Duration::from_nanos(1)) * 6);
            }
        }

        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            decode(&bytes);
        }
    }
}
