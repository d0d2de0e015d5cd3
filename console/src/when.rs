//! Times in words.

use std::cmp::Ordering;

use maud::{Markup, html};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;

/// Near enough for a span that nobody plans by the day.
const YEAR_DAYS: u64 = 365;

/// `2026-03-01 09:30:00 UTC`; a time outside the calendar as its number.
pub(crate) fn full(seconds: u64) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second] UTC");
    parse(seconds).and_then(|at| at.format(format).ok()).unwrap_or_else(|| seconds.to_string())
}

/// A duration in its two largest units, `3 min 20 s`.
pub(crate) fn span(seconds: u64) -> String {
    let (days, hours, minutes, rest) =
        (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest} s"),
        (0, 0, _) => format!("{minutes} min {rest} s"),
        (0, _, _) => format!("{hours} h {minutes} min"),
        (0..YEAR_DAYS, _, _) => format!("{days} d {hours} h"),
        _ => format!("{} y {} d", days / YEAR_DAYS, days % YEAR_DAYS),
    }
}

/// `in 3 min 20 s` or `5 s ago`, with the full time as its title; the page's script keeps it current.
pub(crate) fn relative(at: u64, now: u64) -> Markup {
    let text = match at.cmp(&now) {
        Ordering::Greater => format!("in {}", span(at - now)),
        Ordering::Equal => "now".to_owned(),
        Ordering::Less => format!("{} ago", span(now - at)),
    };
    let machine = parse(at).and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default();
    html! { time datetime=(machine) data-at=(at) title=(full(at)) { (text) } }
}

fn parse(seconds: u64) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_show_two_units() {
        let shown: Vec<String> = [0, 59, 60, 3_600, 90_061, 157_680_000].into_iter().map(span).collect();
        assert_eq!(shown, ["0 s", "59 s", "1 min 0 s", "1 h 0 min", "1 d 1 h", "5 y 0 d"]);
    }

    #[test]
    fn any_number_of_seconds_can_be_shown() {
        assert_eq!(full(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(full(u64::MAX), u64::MAX.to_string());
        assert!(relative(u64::MAX, 0).into_string().contains("in "));
        assert!(relative(5, 10).into_string().contains("5 s ago"));
        assert!(relative(5, 5).into_string().contains(">now<"));
    }
}
