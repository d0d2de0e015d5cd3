//! Money as people write it.

/// Euros have two decimals.
const CENTS: i64 = 100;

/// `€1,234.56`, negative amounts with a minus sign before the euro's.
pub(super) fn shown(cents: i64) -> String {
    let (euros, rest) = (cents.unsigned_abs() / 100, cents.unsigned_abs() % 100);
    let digits = euros.to_string();
    let mut grouped = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    let sign = if cents < 0 { "\u{2212}" } else { "" };
    format!("{sign}€{grouped}.{rest:02}")
}

/// Cents of what was typed into the form: `12`, `12.5`, `12.50` or `12,50`. No sign, no grouping, no
/// third decimal: what could be read in two ways is asked for again.
pub(super) fn typed(text: &str) -> Option<i64> {
    let text = text.trim();
    let (euros, cents) = text.split_once(['.', ',']).unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(euros) || !digits(cents) || cents.len() > 2 {
        return None;
    }
    let tens = if cents.len() == 1 { 10 } else { 1 };
    euros.parse::<i64>().ok()?.checked_mul(CENTS)?.checked_add(cents.parse::<i64>().ok()? * tens)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn amounts_are_shown_with_grouping_and_two_decimals() {
        assert_eq!(shown(0), "€0.00");
        assert_eq!(shown(123_456_789), "€1,234,567.89");
        assert_eq!(shown(-5), "−€0.05");
        assert_eq!(shown(i64::MIN), "−€92,233,720,368,547,758.08");
    }

    #[test]
    fn only_plain_amounts_are_read() {
        for (text, cents) in
            [("12", 1200), ("12.5", 1250), ("12,05", 1205), (" 0.01 ", 1), ("92233720368547758.07", i64::MAX)]
        {
            assert_eq!(typed(text), Some(cents), "{text}");
        }
        for text in
            ["", "-1", "+1", "1.234", "1,234.56", "1e3", ".5", "5.", "€5", "٥", "92233720368547758.08", "1 0"]
        {
            assert_eq!(typed(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back(cents in 0..i64::MAX) {
            let text = shown(cents).replace(['€', ','], "");
            prop_assert_eq!(typed(&text), Some(cents));
        }

        #[test]
        fn reading_never_panics_and_is_never_negative(text in "\\PC{0,40}") {
            prop_assert!(typed(&text).is_none_or(|cents| cents >= 0));
        }
    }
}
