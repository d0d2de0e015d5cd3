//! Which node to ask for which rows, as far as is known.

use std::{cmp::Reverse, collections::BTreeMap};

use bytes::Bytes;

use crate::proto::{ListSplitsResponse, NodeInfo, SplitInfo};

/// A split, and whom to ask for it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Route {
    pub(crate) split: u64,
    start: Bytes,
    end: Option<Bytes>,
    nodes: Vec<u64>,
    leader: Option<String>,
}

/// Splits that do not overlap, in order. There may be gaps while nodes have not heard.
#[derive(Clone, Debug, Default)]
pub(crate) struct Routes {
    splits: Vec<Route>,
    nodes: BTreeMap<u64, String>,
}

impl Routes {
    /// What nodes say.
    pub(crate) fn of(answers: Vec<(String, ListSplitsResponse)>) -> Self {
        let ListSplitsResponse { splits, nodes } = merged(answers);
        let route = |split: SplitInfo| Route {
            split: split.id,
            start: split.start,
            end: split.end,
            nodes: split.nodes,
            leader: Some(split.leader_address).filter(|address| !address.is_empty()),
        };
        Self {
            splits: splits.into_iter().map(route).collect(),
            nodes: nodes.into_iter().map(|node| (node.id, node.address)).collect(),
        }
    }

    /// The split that has `place`.
    pub(crate) fn at(&self, place: &[u8]) -> Option<&Route> {
        let after = self.splits.partition_point(|route| *route.start <= *place);
        let route = self.splits.get(after.checked_sub(1)?)?;
        route.end.as_ref().is_none_or(|end| place < end).then_some(route)
    }

    /// The split of this number.
    pub(crate) fn split(&self, split: u64) -> Option<&Route> {
        self.splits.iter().find(|route| route.split == split)
    }

    /// Every node there is, by address.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = &String> {
        self.nodes.values()
    }

    /// The same, but that `split` is led at `address`.
    pub(crate) fn led(&self, split: u64, address: &str) -> Self {
        let mut routes = self.clone();
        for route in &mut routes.splits {
            if route.split == split {
                route.leader = Some(address.to_owned());
            }
        }
        routes
    }

    /// The same, but that nothing is known of `splits`.
    pub(crate) fn without(&self, splits: &[u64]) -> Self {
        let mut routes = self.clone();
        routes.splits.retain(|route| !splits.contains(&route.split));
        routes
    }

    /// Where to ask for the split's leader, or else anybody who may know it.
    pub(crate) fn leader<'a>(&'a self, route: &'a Route, turn: usize) -> Option<&'a str> {
        route.leader.as_deref().or_else(|| self.replicas(route, turn).next())
    }

    /// Where to ask for any replica of it, another one first at every turn.
    pub(crate) fn replicas<'a>(&'a self, route: &'a Route, turn: usize) -> impl Iterator<Item = &'a str> {
        let count = route.nodes.len().max(1);
        let order = route.nodes.iter().cycle().skip(turn % count).take(count);
        order.filter_map(|node| self.nodes.get(node)).map(String::as_str)
    }
}

/// What nodes say, by the address each was asked at. Each may be behind: of two splits in one place the one with the
/// higher generation is right, and nobody knows better who leads, and what is in a split, than its leader.
pub(crate) fn merged(answers: Vec<(String, ListSplitsResponse)>) -> ListSplitsResponse {
    let mut nodes = BTreeMap::new();
    let mut told: Vec<(String, SplitInfo)> = Vec::new();
    for (by, answer) in answers {
        nodes.extend(answer.nodes.into_iter().map(|node| (node.id, node.address)));
        told.extend(answer.splits.into_iter().map(|split| (by.clone(), split)));
    }
    told.sort_by_key(|(by, split)| {
        (Reverse(split.generation), split.leader_address != *by, split.leader_address.is_empty(), split.id)
    });
    let mut splits: Vec<SplitInfo> = Vec::new();
    for (_, split) in told {
        if !splits.iter().any(|other| overlap(other, &split)) {
            splits.push(split);
        }
    }
    splits.sort_by(|a, b| a.start.cmp(&b.start));
    let nodes = nodes.into_iter().map(|(id, address)| NodeInfo { id, address }).collect();
    ListSplitsResponse { splits, nodes }
}

fn overlap(a: &SplitInfo, b: &SplitInfo) -> bool {
    let before = |a: &SplitInfo, b: &SplitInfo| b.end.as_ref().is_none_or(|end| a.start < *end);
    a.id == b.id || (before(a, b) && before(b, a))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(
        id: u64,
        start: &'static str,
        end: Option<&'static str>,
        generation: u64,
        leader: u64,
    ) -> SplitInfo {
        SplitInfo {
            id,
            start: Bytes::from_static(start.as_bytes()),
            end: end.map(|end| Bytes::from_static(end.as_bytes())),
            generation,
            nodes: vec![1, 2, 3],
            leader,
            leader_address: if leader == 0 { String::new() } else { format!("n{leader}") },
            ..SplitInfo::default()
        }
    }

    fn answer(by: &str, splits: Vec<SplitInfo>) -> (String, ListSplitsResponse) {
        let nodes = (1..=3).map(|id| NodeInfo { id, address: format!("n{id}") }).collect();
        (by.to_owned(), ListSplitsResponse { splits, nodes })
    }

    #[test]
    fn the_higher_generation_is_right() {
        let old = answer("n1", vec![info(1, "", None, 1, 1)]);
        let new = answer("n2", vec![info(1, "", Some("m"), 2, 1), info(2, "m", None, 2, 2)]);
        let routes = Routes::of(vec![old, new]);
        assert_eq!(routes.at(b"a").map(|route| route.split), Some(1));
        assert_eq!(routes.at(b"m").map(|route| route.split), Some(2));
        assert_eq!(routes.at(b"zz").and_then(|route| routes.leader(route, 0)), Some("n2"));
    }

    #[test]
    fn the_leader_is_believed_before_all_others() {
        let routes = Routes::of(vec![
            answer("n1", vec![info(1, "", None, 1, 0)]),
            answer("n2", vec![info(1, "", None, 1, 1)]),
            answer("n3", vec![info(1, "", None, 1, 3)]),
        ]);
        let route = routes.at(b"a").unwrap();
        assert_eq!(routes.leader(route, 0), Some("n3"));
        assert_eq!(routes.led(1, "n2").split(1).unwrap().leader.as_deref(), Some("n2"));
    }

    #[test]
    fn nothing_is_known_in_a_gap() {
        let routes = Routes::of(vec![answer("n1", vec![info(2, "m", None, 2, 2)])]);
        assert_eq!(routes.at(b"a"), None);
    }

    #[test]
    fn what_is_forgotten_is_a_gap_between_what_is_known() {
        let splits = vec![info(1, "", Some("m"), 2, 1), info(2, "m", None, 2, 2)];
        let routes = Routes::of(vec![answer("n1", splits)]).without(&[2]);
        assert_eq!(routes.at(b"a").map(|route| route.split), Some(1));
        assert_eq!(routes.at(b"m"), None);
        assert_eq!(routes.nodes().count(), 3, "who can be asked is known still");
    }

    #[test]
    fn replicas_take_turns() {
        let routes = Routes::of(vec![answer("n1", vec![info(1, "", None, 1, 0)])]);
        let route = routes.at(b"a").unwrap();
        let asked: Vec<_> = (0..4).filter_map(|turn| routes.replicas(route, turn).next()).collect();
        assert_eq!(asked, ["n1", "n2", "n3", "n1"]);
    }
}
