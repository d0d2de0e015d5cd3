//! Where nodes are asked: where they say, or where this client was told.

use std::collections::BTreeMap;

use crate::{
    Error, Told, node_number,
    proto::{ListSplitsResponse, NodeInfo},
};

/// Where nodes are asked.
#[derive(Clone, Debug)]
pub(crate) enum Book {
    /// At these to begin with, and then where nodes say that they are.
    Announced(Vec<String>),
    /// At these, by number, and nowhere else: what nodes say of addresses is of their own network.
    Own(BTreeMap<u64, String>),
}

impl Book {
    /// Reads addresses: `HOST:PORT` each, or `NUMBER=HOST:PORT` each.
    pub(crate) fn parse(written: impl IntoIterator<Item = String>) -> Result<Self, Error> {
        let (mut announced, mut own) = (Vec::new(), BTreeMap::new());
        for text in written {
            match text.split_once('=') {
                None => announced.push(text),
                Some((number, address)) => {
                    let number = number.parse().ok().filter(|number| node_number(*number) == *number);
                    let Some(number) = number.filter(|number| *number != 0) else {
                        return Err(invalid(format!(
                            "{text:?} is not NUMBER=HOST:PORT, such as 1=127.0.0.1:7001"
                        )));
                    };
                    if own.insert(number, address.to_owned()).is_some() {
                        return Err(invalid(format!("node {number} is named twice")));
                    }
                }
            }
        }
        match (announced.is_empty(), own.is_empty()) {
            (true, true) => Err(invalid("the store's nodes are to be named, HOST:PORT or NUMBER=HOST:PORT each".to_owned())),
            (false, false) => Err(invalid(
                "either all nodes are named by number, NUMBER=HOST:PORT, or none is: those without would not be asked"
                    .to_owned(),
            )),
            (false, true) => Ok(Self::Announced(announced)),
            (true, false) => Ok(Self::Own(own)),
        }
    }

    /// Those that were written.
    pub(crate) fn written(&self) -> impl Iterator<Item = &String> {
        let (announced, own) = match self {
            Self::Announced(addresses) => (Some(addresses), None),
            Self::Own(addresses) => (None, Some(addresses)),
        };
        announced.into_iter().flatten().chain(own.into_iter().flat_map(BTreeMap::values))
    }

    /// Where to ask the node of this id, which says that it is at `announced`. None where nobody knows.
    pub(crate) fn find(&self, node: u64, announced: &str) -> Option<String> {
        match self {
            Self::Announced(_) => Some(announced.to_owned()).filter(|address| !address.is_empty()),
            Self::Own(addresses) => addresses.get(&node_number(node)).cloned(),
        }
    }

    /// What a node says of splits, with the addresses of this client.
    pub(crate) fn translated(&self, mut told: ListSplitsResponse) -> ListSplitsResponse {
        for split in &mut told.splits {
            split.leader_address = self.find(split.leader, &split.leader_address).unwrap_or_default();
        }
        let nodes = told.nodes.into_iter();
        let node =
            |node: NodeInfo| Some(NodeInfo { id: node.id, address: self.find(node.id, &node.address)? });
        told.nodes = nodes.filter_map(node).collect();
        told
    }
}

fn invalid(message: String) -> Error {
    Error::InvalidArgument(Told { message, reason: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::SplitInfo;

    fn book(written: &[&str]) -> Result<Book, String> {
        Book::parse(written.iter().map(|text| (*text).to_owned())).map_err(|error| error.to_string())
    }

    fn told() -> ListSplitsResponse {
        let node = |id: u64, address: &str| NodeInfo { id, address: address.to_owned() };
        let split = |id, leader, leader_address: &str| SplitInfo {
            id,
            leader,
            leader_address: leader_address.to_owned(),
            ..SplitInfo::default()
        };
        ListSplitsResponse {
            splits: vec![split(1, 1 << 16 | 2, "theirs:2"), split(2, 0, ""), split(3, 4, "theirs:4")],
            nodes: vec![node(1, "theirs:1"), node(1 << 16 | 2, "theirs:2"), node(4, "theirs:4")],
        }
    }

    #[test]
    fn nodes_are_asked_where_they_say() {
        let book = book(&["a:1", "b:2"]).unwrap();
        assert_eq!(book.written().collect::<Vec<_>>(), ["a:1", "b:2"]);
        assert_eq!(book.find(9, "c:3").as_deref(), Some("c:3"));
        assert_eq!(book.translated(told()), told());
    }

    #[test]
    fn nodes_of_numbers_are_asked_where_this_client_was_told_whichever_disk_they_have() {
        let book = book(&["2=ours:2", "1=ours:1"]).unwrap();
        assert_eq!(book.written().collect::<Vec<_>>(), ["ours:1", "ours:2"]);
        let told = book.translated(told());
        let leaders: Vec<_> = told.splits.iter().map(|split| split.leader_address.as_str()).collect();
        assert_eq!(
            leaders,
            ["ours:2", "", ""],
            "a node of which nothing was told is not looked for where it says"
        );
        let nodes: Vec<_> = told.nodes.iter().map(|node| (node.id, node.address.as_str())).collect();
        assert_eq!(nodes, [(1, "ours:1"), (1 << 16 | 2, "ours:2")]);
    }

    #[test]
    fn what_is_no_book_says_what_one_is() {
        for (wrong, why) in [
            (&[][..], "are to be named"),
            (&["1=a:1", "b:2"], "either all nodes"),
            (&["1=a:1", "1=b:2"], "named twice"),
            (&["x=a:1"], "NUMBER=HOST:PORT"),
            (&["0=a:1"], "NUMBER=HOST:PORT"),
            (&["65537=a:1"], "NUMBER=HOST:PORT"),
        ] {
            let told = book(wrong).unwrap_err();
            assert!(told.contains(why), "{wrong:?}: {told}");
        }
    }
}
