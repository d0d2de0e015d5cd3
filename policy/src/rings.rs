//! `rings.toml`: how a change of policies reaches everybody.

use std::path::Path;
use std::time::Duration;

use toml::Spanned;

use crate::problem::{Problem, Problems};

/// `M` is a month, and most who write it mean minutes.
const MAX_HOLD: Duration = Duration::from_secs(30 * 86_400);

/// Through which rings a new commit goes, and what stops it.
#[derive(Debug, Clone, PartialEq)]
pub struct Rings {
    /// One after the other; the last is everybody.
    pub rings: Vec<Ring>,
    /// For how long each is watched before the next.
    pub hold: Duration,
    /// How much larger the share of denied requests may become, 0 to 1.
    pub max_denied: f64,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Ring {
    /// Read by everybody, and nobody is judged by it.
    Shadow,
    /// A share of each service's sidecars, 0 to 1.
    Share(f64),
}

impl Default for Rings {
    /// Everybody at once.
    fn default() -> Self {
        Self { rings: vec![Ring::Share(1.0)], hold: Duration::ZERO, max_denied: 1.0 }
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    rings: Spanned<Vec<Spanned<String>>>,
    hold: Option<Spanned<String>>,
    max_denied: Option<Spanned<String>>,
}

impl Rings {
    /// Reads the file; every mistake in it is a problem.
    pub(crate) fn parse(file: &Path, text: &str, problems: &mut Problems) -> Option<Self> {
        let before = problems.0.len();
        let written: Written = match toml::from_str(text) {
            Ok(written) => written,
            Err(error) => {
                problems.push(Problem::toml(file, text, &error).hint(
                    "rings = [\"shadow\", \"1%\", \"25%\", \"100%\"], hold = \"5m\", max_denied = \"1%\"",
                ));
                return None;
            }
        };
        let mut say = |span, message: &str, hint: &str| {
            problems.push(Problem::at(file, text, span, message).hint(hint));
        };
        let mut read = Vec::new();
        for ring in written.rings.get_ref() {
            match ring.get_ref().as_str() {
                "shadow" if read.is_empty() => read.push(Ring::Shadow),
                "shadow" => say(ring.span(), "a shadow comes first or not at all", "put it first"),
                written => match percent(written).filter(|share| *share > 0.0) {
                    Some(share) => read.push(Ring::Share(share)),
                    None => say(ring.span(), "a ring is shadow or a share", "write \"shadow\" or \"25%\""),
                },
            }
        }
        let shares = read.iter().filter_map(|ring| match ring {
            Ring::Share(share) => Some(*share),
            Ring::Shadow => None,
        });
        let shares: Vec<f64> = shares.collect();
        if !shares.is_sorted_by(|one, next| one < next) || shares.last() != Some(&1.0) {
            say(
                written.rings.span(),
                "each ring is larger than the one before, and the last is everybody",
                "end with \"100%\"",
            );
        }
        let mut hold = Duration::ZERO;
        if let Some(written) = written.hold {
            match humantime::parse_duration(written.get_ref()) {
                Ok(read) if read <= MAX_HOLD => hold = read,
                _ => say(written.span(), "`hold` is a time of at most 30 days", "write 90s, 5m or 1h"),
            }
        }
        let mut max_denied = 1.0;
        if let Some(written) = written.max_denied {
            match percent(written.get_ref()) {
                Some(read) => max_denied = read,
                None => say(written.span(), "`max_denied` is a share", "write \"1%\""),
            }
        }
        (problems.0.len() == before).then_some(Self { rings: read, hold, max_denied })
    }
}

/// `0.5%` to `100%`, as a share of one.
fn percent(text: &str) -> Option<f64> {
    let number = text.strip_suffix('%')?;
    let plain = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let share: f64 = number.parse().ok().filter(|_| plain)?;
    (share <= 100.0).then_some(share / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Rings, String> {
        let mut problems = Problems::default();
        let rings = Rings::parse(Path::new("rings.toml"), text, &mut problems);
        rings.ok_or_else(|| problems.0.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn rings_grow_to_everybody() {
        let text = "rings = [\"shadow\", \"1%\", \"25%\", \"100%\"]\nhold = \"5m\"\nmax_denied = \"0.5%\"\n";
        let rings = read(text).unwrap();
        let shares = [Ring::Shadow, Ring::Share(0.01), Ring::Share(0.25), Ring::Share(1.0)];
        assert_eq!(rings.rings, shares);
        assert_eq!((rings.hold, rings.max_denied), (Duration::from_secs(300), 0.005));
        assert_eq!(read("rings = [\"100%\"]\n"), Ok(Rings::default()));
        for (bad, why) in [
            ("", "missing field `rings`"),
            ("rings = []", "the last is everybody"),
            ("rings = [\"shadow\"]", "the last is everybody"),
            ("rings = [\"25%\"]", "the last is everybody"),
            ("rings = [\"25%\", \"1%\", \"100%\"]", "larger than the one before"),
            ("rings = [\"1%\", \"shadow\", \"100%\"]", "a shadow comes first"),
            ("rings = [\"0%\", \"100%\"]", "shadow or a share"),
            ("rings = [\"101%\"]", "shadow or a share"),
            ("rings = [\"-1%\", \"100%\"]", "shadow or a share"),
            ("rings = [\"100%\"]\nhold = \"5\"", "`hold` is a time"),
            ("rings = [\"100%\"]\nhold = \"5M\"", "`hold` is a time"),
            ("rings = [\"100%\"]\nmax_denied = \"1\"", "`max_denied` is a share"),
            ("rings = [\"100%\"]\nholds = \"5m\"", "unknown field `holds`"),
        ] {
            let told = read(bad).unwrap_err();
            assert!(told.contains(why), "{bad}: {told}");
        }
    }
}
