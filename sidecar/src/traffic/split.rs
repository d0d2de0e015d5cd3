//! A weighted split of calls between services, and mirroring: a copy of some calls for another service.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::config::Mirror;
use super::random::{Dice, mix, scale};

/// Services that share one service's calls: more is a mistake, and each is looked at.
pub const MAX_ARMS: usize = 16;
/// The most that one of them may weigh.
pub const MAX_WEIGHT: u32 = 1000;
/// What a copied call carries, so that whoever gets it knows that nobody waits for its answer. Its value
/// is the service that the call was meant for. The app behind the other sidecar sees it: it is a caller's word, as
/// any header that proves nothing.
pub const MIRRORED: HeaderName = HeaderName::from_static("x-mirrored-from");

/// So that a key's arm says nothing of its endpoint there.
const SALT: u64 = 0x73_706c_6974;

/// Which of several services gets a call.
#[derive(Debug)]
pub struct Split {
    /// Names, each with the end of its stretch of 0..total.
    arms: Box<[(Box<str>, u64)]>,
    total: u64,
}

/// Whether these weights can be a split; empty is none.
pub(super) fn check(weights: &BTreeMap<String, u32>) -> Result<(), String> {
    if weights.len() > MAX_ARMS {
        return Err(format!("{} services share these calls, at most {MAX_ARMS} may", weights.len()));
    }
    if let Some((name, weight)) = weights.iter().find(|(_, weight)| **weight > MAX_WEIGHT) {
        return Err(format!("{name}'s weight {weight} is not between 0 and {MAX_WEIGHT}"));
    }
    if !weights.is_empty() && weights.values().all(|weight| *weight == 0) {
        return Err("no weight is above zero".to_owned());
    }
    Ok(())
}

impl Split {
    /// A split by these weights, as [`super::config::Traffic::split`] has them; `None` if there is none.
    pub fn new(weights: &BTreeMap<String, u32>) -> Option<Self> {
        let mut total = 0;
        let arms: Box<[_]> = weights
            .iter()
            .filter(|(_, weight)| **weight > 0)
            .map(|(name, weight)| {
                total += u64::from(*weight);
                (name.as_str().into(), total)
            })
            .collect();
        (total > 0).then_some(Self { arms, total })
    }

    /// The service for a call: the same for the same key while weights stay, at random without one.
    pub fn choose(&self, key: Option<u64>, dice: &Dice) -> &str {
        let bits = key.map_or_else(|| dice.bits(), |key| mix(key ^ SALT));
        let position = scale(bits, self.total);
        let arm = self.arms.get(self.arms.partition_point(|(_, end)| *end <= position));
        arm.or(self.arms.last()).map_or("", |(name, _)| name)
    }

    /// The services that may be chosen.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.arms.iter().map(|(name, _)| &**name)
    }
}

impl Mirror {
    /// Whether this call is copied. `body_bytes` is `None` if the body's length is not known: such a body
    /// would have to be held in memory, or make the original wait for its copy.
    pub fn copies(&self, body_bytes: Option<u64>, dice: &Dice) -> bool {
        body_bytes.is_some_and(|bytes| bytes <= u64::from(self.max_body)) && self.share.draw(dice)
    }

    /// Marks the head of a copy of a call to `service`.
    ///
    /// The copy is a call of its own: it takes its endpoint, its breaker and its outliers from the service
    /// mirrored to, and shares nothing with the original's.
    pub fn mark(&self, headers: &mut HeaderMap, service: &str) {
        // A service's name is a host label; were it ever not a value, a copy is still marked as one.
        let value = HeaderValue::from_str(service).unwrap_or(HeaderValue::from_static("yes"));
        headers.insert(MIRRORED, value);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::traffic::config::Share;

    fn weights(pairs: &[(&str, u32)]) -> BTreeMap<String, u32> {
        pairs.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect()
    }

    #[test]
    fn weights_are_shares_and_zero_is_none() {
        let split = Split::new(&weights(&[("a", 90), ("b", 0), ("c", 10)])).unwrap();
        let dice = Dice::seeded(3);
        let c = (0..100_000).filter(|_| split.choose(None, &dice) == "c").count();
        assert!((9_600..10_400).contains(&c), "{c}");
        assert_eq!(split.names().collect::<Vec<_>>(), ["a", "c"]);
        assert!(Split::new(&weights(&[])).is_none() && Split::new(&weights(&[("a", 0)])).is_none());
    }

    #[test]
    fn a_growing_arm_takes_keys_and_returns_none() {
        let dice = Dice::seeded(3);
        let of = |share| Split::new(&weights(&[("new", share), ("old", 100 - share)])).unwrap();
        let (less, more) = (of(5), of(20));
        for key in (0..10_000).map(mix) {
            let (before, after) = (less.choose(Some(key), &dice), more.choose(Some(key), &dice));
            assert!(before == after || (before, after) == ("old", "new"));
        }
    }

    #[test]
    fn what_cannot_be_split() {
        let many: BTreeMap<_, _> = (0..17).map(|n| (format!("s{n}"), 1)).collect();
        assert!(check(&many).unwrap_err().contains("at most 16"));
        assert!(check(&weights(&[("a", 1001)])).unwrap_err().contains("a's weight 1001"));
    }

    #[test]
    fn copies_are_sampled_bounded_and_marked() {
        let mirror = Mirror { to: "next".into(), share: Share::percent(10), max_body: 100 };
        let dice = Dice::seeded(5);
        let copied = (0..10_000).filter(|_| mirror.copies(Some(100), &dice)).count();
        assert!((900..1_100).contains(&copied), "{copied}");
        assert!(!(0..10_000).any(|_| mirror.copies(Some(101), &dice) || mirror.copies(None, &dice)));
        let mut headers = HeaderMap::new();
        mirror.mark(&mut headers, "accounts");
        assert_eq!(headers[MIRRORED], "accounts");
    }

    proptest! {
        #[test]
        fn the_choice_is_one_of_those_with_weight(
            weights in prop::collection::btree_map("[a-z]{1,8}", 0u32..=1000, 0..=16),
            key: Option<u64>, seed: u64,
        ) {
            match Split::new(&weights) {
                Some(split) => prop_assert!(weights[split.choose(key, &Dice::seeded(seed))] > 0),
                None => prop_assert!(weights.values().all(|weight| *weight == 0)),
            }
        }
    }
}
