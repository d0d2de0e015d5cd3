//! Where splits are, as far as a node has heard. The splits themselves know for certain: a node that is asked for a key
//! that its split does not hold says so.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::{keys::Key, lease::NodeId, txn::SplitId, wire::Route};

/// Splits by where they begin. They never overlap: of two that would, the one of the higher generation is right.
#[derive(Debug, Default)]
pub(super) struct Routes(BTreeMap<Bytes, Route>);

impl Routes {
    /// Takes what somebody says, unless something newer is known.
    pub(super) fn learn(&mut self, route: Route) {
        if route.range.is_empty() {
            return;
        }
        let against = |known: &Route| known.split == route.split || known.range.overlaps(&route.range);
        let rank = |route: &Route| (route.generation, route.term, route.leader.is_some());
        let newer = |known: &Route| match known.split == route.split {
            true => rank(known) > rank(&route),
            false => known.generation >= route.generation,
        };
        if self.0.values().any(|known| against(known) && newer(known)) {
            return;
        }
        self.0.retain(|_, known| !against(known));
        self.0.insert(route.range.start().clone(), route);
    }

    /// The split that has `key`.
    pub(super) fn of(&self, key: &Key) -> Option<&Route> {
        self.at(key.as_bytes())
    }

    /// The split that has what is at `start`.
    pub(super) fn at(&self, start: &Bytes) -> Option<&Route> {
        let (_, route) = self.0.range(..=start.clone()).next_back()?;
        route.range.end().is_none_or(|end| start < end).then_some(route)
    }

    /// The split `split`.
    pub(super) fn get(&self, split: SplitId) -> Option<&Route> {
        self.0.values().find(|route| route.split == split)
    }

    /// Who leads `split`.
    pub(super) fn leader(&self, split: SplitId) -> Option<NodeId> {
        self.get(split).and_then(|route| route.leader)
    }

    /// All of them, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Route> {
        self.0.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Range;

    fn route(split: u64, from: &'static str, to: Option<&'static str>, generation: u64) -> Route {
        let range = Range::between(from.into(), to.map(Bytes::from)).unwrap();
        Route { split: SplitId(split), range, generation, nodes: vec![], leader: None, term: 0 }
    }

    fn known(routes: &Routes) -> Vec<u64> {
        routes.iter().map(|route| route.split.0).collect()
    }

    #[test]
    fn what_is_newer_takes_the_place_of_what_it_overlaps() {
        let mut routes = Routes::default();
        routes.learn(route(1, "", None, 1));
        routes.learn(route(2, "m", None, 2));
        assert_eq!(known(&routes), [2], "where the left half begins and ends, nobody has said yet");
        routes.learn(route(1, "", Some("m"), 2));
        assert_eq!(known(&routes), [1, 2]);
        routes.learn(route(1, "", None, 1));
        assert_eq!(known(&routes), [1, 2], "old news");
        routes.learn(route(1, "", None, 3));
        assert_eq!(known(&routes), [1]);
        assert_eq!(routes.at(&Bytes::from_static(b"z")).unwrap().split, SplitId(1));
    }

    #[test]
    fn a_later_leader_is_believed_and_an_earlier_one_is_not() {
        let mut routes = Routes::default();
        let led = |leader, term| Route { leader: Some(NodeId(leader)), term, ..route(1, "", None, 1) };
        routes.learn(led(1, 5));
        routes.learn(led(2, 4));
        assert_eq!(routes.leader(SplitId(1)), Some(NodeId(1)));
        routes.learn(led(2, 6));
        assert_eq!(routes.leader(SplitId(1)), Some(NodeId(2)));
    }
}
