//! Values as people write them in the configuration, and within which bounds: shares, durations, counts.

use std::str::FromStr;
use std::time::Duration;

use http::{HeaderName, Method, StatusCode};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::random::Dice;

/// A part of a whole, to a millionth; written `20%` or `0.5%`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share {
    millionths: u32,
}

impl Share {
    /// Of a hundred; more than a hundred is all.
    pub const fn percent(percent: u32) -> Self {
        let percent = if percent > 100 { 100 } else { percent };
        Self { millionths: percent * 10_000 }
    }

    /// All of it.
    pub const fn whole() -> Self {
        Self::percent(100)
    }

    /// Of one.
    pub fn fraction(self) -> f64 {
        f64::from(self.millionths) / 1e6
    }

    /// Of a million.
    pub fn millionths(self) -> u32 {
        self.millionths
    }

    /// This part of `count`, rounded down.
    pub fn of(self, count: usize) -> usize {
        (count as u128 * u128::from(self.millionths) / 1_000_000) as usize
    }

    /// True for this part of all draws.
    pub fn draw(self, dice: &Dice) -> bool {
        self.millionths > 0 && dice.below(1_000_000) < u64::from(self.millionths)
    }
}

impl FromStr for Share {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "is not a share like 20% or 0.5%, at most 100%";
        let number = text.strip_suffix('%').ok_or(FORM)?;
        let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
        let digits = |text: &str, max: usize| {
            (1..=max).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
        };
        if !digits(whole, 3) || !digits(part, 4) {
            return Err(FORM);
        }
        let read = |text: &str| text.parse::<u32>().map_err(|_| FORM);
        let millionths = read(whole)? * 10_000 + read(&format!("{part:0<4}"))?;
        if millionths > 1_000_000 { Err(FORM) } else { Ok(Self { millionths }) }
    }
}

/// Reads types from text by their [`FromStr`], whose error completes the sentence "`TEXT` …".
macro_rules! read_from_text {
    ($($type:ty),*) => {$(
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(from)?;
                text.parse().map_err(|wrong| serde::de::Error::custom(format!("`{text}` {wrong}")))
            }
        }
    )*};
}

pub(super) use read_from_text;

/// A duration of at least `MIN` and at most `MAX` milliseconds.
pub(super) fn within<'de, const MIN: u64, const MAX: u64, D: Deserializer<'de>>(
    from: D,
) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    let duration = humantime::parse_duration(&text)
        .map_err(|error| D::Error::custom(format!("`{text}` is not a duration: {error}")))?;
    let (min, max) = (Duration::from_millis(MIN), Duration::from_millis(MAX));
    if (min..=max).contains(&duration) {
        return Ok(duration);
    }
    let shown = humantime::format_duration;
    Err(D::Error::custom(format!("{} is not between {} and {}", shown(duration), shown(min), shown(max))))
}

pub(super) fn maybe_within<'de, const MIN: u64, const MAX: u64, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<Duration>, D::Error> {
    within::<MIN, MAX, D>(from).map(Some)
}

pub(super) fn between<'de, const MIN: u32, const MAX: u32, D: Deserializer<'de>>(
    from: D,
) -> Result<u32, D::Error> {
    let number = u32::deserialize(from)?;
    if (MIN..=MAX).contains(&number) {
        return Ok(number);
    }
    Err(D::Error::custom(format!("{number} is not between {MIN} and {MAX}")))
}

pub(super) fn maybe_between<'de, const MIN: u32, const MAX: u32, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<u32>, D::Error> {
    between::<MIN, MAX, D>(from).map(Some)
}

pub(super) fn at_most<'de, const MAX: u32, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    between::<0, MAX, D>(from)
}

pub(super) fn methods<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Method>, D::Error> {
    let method = |text: String| {
        // Methods are case-sensitive (RFC 9110 §9.1): "get" would never match anything.
        let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'-');
        let method = if plain { Method::from_bytes(text.as_bytes()).ok() } else { None };
        method.ok_or_else(|| D::Error::custom(format!("`{text}` is not a method like GET")))
    };
    Vec::<String>::deserialize(from)?.into_iter().map(method).collect()
}

pub(super) fn failure<'de, D: Deserializer<'de>>(from: D) -> Result<Option<StatusCode>, D::Error> {
    let number = u16::deserialize(from)?;
    match StatusCode::from_u16(number) {
        Ok(status) if status.is_client_error() || status.is_server_error() => Ok(Some(status)),
        _ => Err(D::Error::custom(format!("{number} is not a status from 400 to 599"))),
    }
}

pub(super) fn header<'de, D: Deserializer<'de>>(from: D) -> Result<Option<HeaderName>, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map(Some).map_err(|_| D::Error::custom(format!("`{text}` is not the name of a header")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares() {
        for (text, millionths) in [("0%", 0), ("0.0001%", 1), ("50%", 500_000), ("100.0%", 1_000_000)] {
            assert_eq!(text.parse::<Share>().unwrap().millionths(), millionths);
        }
        for text in
            ["", "%", ".5%", "5.%", "50", "1e1%", "-1%", "+1%", "100.0001%", "0.00001%", "50%%", "1.1.1%"]
        {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
        assert_eq!((Share::percent(50).of(3), Share::percent(50).of(1), Share::whole().of(7)), (1, 0, 7));
        let dice = Dice::seeded(1);
        let drawn = (0..100_000).filter(|_| Share::percent(20).draw(&dice)).count();
        assert!((19_500..20_500).contains(&drawn), "{drawn}");
        assert!(!(0..1000).any(|_| Share::default().draw(&dice)));
        assert!((0..1000).all(|_| Share::whole().draw(&dice)));
    }
}
