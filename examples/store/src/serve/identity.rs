//! Who a node is. Its number says where it can be asked and stays; its id says which disk it has: a node that lost its
//! disk has forgotten what it promised, and comes back as another one under the same number.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use store_client::{NODE_NUMBER_BITS, node_number, proto};

use crate::lease::NodeId;

/// The greatest number that a node can have.
pub const NUMBER_MAX: u64 = (1 << NODE_NUMBER_BITS) - 1;

/// Disks that a number can have had: far more than anybody replaces, and far from where ids end.
const INCARNATION_MAX: u64 = (1 << 32) - 1;
/// A disk is replaced one at a time, and whoever was away meanwhile may have missed some. What says to be further ahead is
/// made up, and would shut the real node out.
const INCARNATIONS_MISSED_MAX: u64 = 16;

/// The file with the node's own id.
const NODE_FILE: &str = "node";
/// The file with the newest id of each number that the node has heard of.
const KNOWN_FILE: &str = "known";

/// The number in an id.
pub fn number(id: NodeId) -> u64 {
    node_number(id.0)
}

/// How many disks the node had before.
pub fn incarnation(id: NodeId) -> u64 {
    id.0 >> NODE_NUMBER_BITS
}

/// The id of a number's disk.
fn id(number: u64, incarnation: u64) -> NodeId {
    NodeId(incarnation << NODE_NUMBER_BITS | number)
}

/// Where nodes can be asked, by number.
#[derive(Clone, Debug)]
pub struct Addresses(BTreeMap<u64, String>);

impl Addresses {
    /// These.
    pub fn new(addresses: BTreeMap<u64, String>) -> Self {
        Self(addresses)
    }

    /// Where the node of this id, whichever disk it has, can be asked.
    pub fn of(&self, node: NodeId) -> Option<&str> {
        self.0.get(&number(node)).map(String::as_str)
    }

    /// All numbers and addresses.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &str)> {
        self.0.iter().map(|(number, address)| (*number, address.as_str()))
    }
}

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The disk says no.
    #[error("{path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// A file is not what was written.
    #[error("{path} is not what a node writes there")]
    Broken {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The directory is another node's.
    #[error("{path} is of node {found}, and this is node {number}")]
    Other {
        /// Which file.
        path: PathBuf,
        /// Whose it is.
        found: u64,
        /// Who asks.
        number: u64,
    },
}

/// What the file [`NODE_FILE`] has.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Own {
    id: u64,
    /// Nodes of the first split, where this node was there when it was made.
    first: Vec<u64>,
    /// Its log has been begun, and is lost if it is not there.
    begun: bool,
}

/// Who this node is, and whom it has heard of; both on its disk.
#[derive(Debug)]
pub struct Identity {
    directory: PathBuf,
    number: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    own: Option<Own>,
    known: Known,
}

/// The newest id of each number: what a disk was before is nobody any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known(BTreeMap<u64, NodeId>);

impl Known {
    /// Of these ids, and of all that are known, the newest.
    fn hear(&mut self, ids: impl IntoIterator<Item = u64>) {
        let heard = ids.into_iter().filter(|id| *id != 0).map(NodeId);
        for id in heard.filter(|id| incarnation(*id) <= INCARNATION_MAX) {
            let newest = self.0.entry(number(id)).or_insert(id);
            *newest = id.max(*newest);
        }
    }

    fn newest(&self, number: u64) -> Option<NodeId> {
        self.0.get(&number).copied()
    }

    fn ids(&self) -> Vec<u64> {
        let mut ids: Vec<_> = self.0.values().map(|id| id.0).collect();
        ids.sort_unstable();
        ids
    }
}

/// What is known of another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It has the newest disk that is known of its number.
    Known,
    /// So it has, and nobody has heard of that disk here before.
    New,
    /// It had a disk of which it has a newer one by now: whoever speaks for it is not to be heard.
    Replaced,
    /// It says to have had more disks than it can have had.
    Implausible,
}

/// What a node is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Its id.
    pub id: NodeId,
    /// Nodes of the first split, itself among them; none if the universe is there already.
    pub first: Vec<NodeId>,
    /// Its log has been begun before.
    pub begun: bool,
}

impl Identity {
    /// What `directory` remembers of the node of this number. The directory is made if it is not there.
    ///
    /// # Errors
    ///
    /// When it cannot be used, or is another node's.
    pub fn open(directory: &Path, number: u64) -> Result<Self, IdentityError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| IdentityError::Io { path, source }
        };
        fs::create_dir_all(directory).map_err(at(directory))?;
        let own: Option<Own> = read(&directory.join(NODE_FILE))?;
        if let Some(own) = &own
            && self::number(NodeId(own.id)) != number
        {
            let found = self::number(NodeId(own.id));
            return Err(IdentityError::Other { path: directory.join(NODE_FILE), found, number });
        }
        let heard: Option<Vec<u64>> = read(&directory.join(KNOWN_FILE))?;
        let mut known = Known::default();
        known.hear(heard.unwrap_or_default());
        Ok(Self { directory: directory.to_owned(), number, state: Mutex::new(State { own, known }) })
    }

    /// What it is already, if it has been before.
    pub fn chosen(&self) -> Option<Chosen> {
        self.state().own.as_ref().map(Own::chosen)
    }

    /// Takes an id by what all the others say, and keeps it. `numbers` are all there are.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    pub fn choose(
        &self,
        others: &[proto::HelloResponse],
        numbers: impl Iterator<Item = u64>,
    ) -> Result<Chosen, IdentityError> {
        let numbers: Vec<_> = numbers.collect();
        let mut state = self.state();
        state.known.hear(others.iter().flat_map(|other| other.known.iter().chain([&other.node])).copied());
        let before = state.known.newest(self.number).map(incarnation);
        let empty = others.iter().all(|other| other.node == 0);
        let own = match before {
            None if empty => Own { id: id(self.number, 0).0, first: numbers, begun: false },
            before => {
                let id = id(self.number, before.unwrap_or(0) + 1);
                Own { id: id.0, first: Vec::new(), begun: false }
            }
        };
        state.known.hear([own.id]);
        self.keep(KNOWN_FILE, &state.known.ids())?;
        self.keep(NODE_FILE, &own)?;
        let chosen = own.chosen();
        state.own = Some(own);
        Ok(chosen)
    }

    /// The node's log is there.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    pub fn begun(&self) -> Result<(), IdentityError> {
        let mut state = self.state();
        match &mut state.own {
            Some(own) if !own.begun => {
                own.begun = true;
                self.keep(NODE_FILE, own)
            }
            _ => Ok(()),
        }
    }

    /// What a node says of itself to another. One that is there but waits for others of the first nodes to be there for
    /// the first time is no universe that one of them could have lost: it says what an empty disk says.
    pub fn hello(&self) -> proto::HelloResponse {
        let state = self.state();
        let has_been = |id: &u64| state.known.newest(number(NodeId(*id))).is_some();
        let own = state.own.as_ref().filter(|own| own.first.iter().all(has_been));
        proto::HelloResponse { node: own.map_or(0, |own| own.id), known: state.known.ids() }
    }

    /// What is known of another node. One that is new is on this disk before the answer.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    pub fn standing(&self, node: NodeId) -> Result<Standing, IdentityError> {
        let mut state = self.state();
        let newest = state.known.newest(number(node));
        let missed = incarnation(node).saturating_sub(newest.map_or(0, incarnation));
        match newest {
            Some(newest) if node < newest => return Ok(Standing::Replaced),
            Some(newest) if node == newest => return Ok(Standing::Known),
            _ if missed > INCARNATIONS_MISSED_MAX || incarnation(node) > INCARNATION_MAX => {
                return Ok(Standing::Implausible);
            }
            _ => {}
        }
        let mut known = state.known.clone();
        known.hear([node.0]);
        self.keep(KNOWN_FILE, &known.ids())?;
        // Only now: what is not on disk is new to whoever asks next, too.
        state.known = known;
        Ok(Standing::New)
    }

    /// The newest id that is known of each number.
    pub fn newest(&self) -> BTreeMap<u64, NodeId> {
        self.state().known.0.clone()
    }

    fn keep(&self, name: &str, value: &impl Serialize) -> Result<(), IdentityError> {
        let path = self.directory.join(name);
        let kept = serde_json::to_vec(value)
            .map_err(io::Error::from)
            .and_then(|bytes| replace(&self.directory, &path, &bytes));
        kept.map_err(|source| IdentityError::Io { path, source })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Own {
    fn chosen(&self) -> Chosen {
        let first = self.first.iter().copied().map(NodeId).collect();
        Chosen { id: NodeId(self.id), first, begun: self.begun }
    }
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>, IdentityError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(IdentityError::Io { path: path.to_owned(), source }),
    };
    let broken = |source| IdentityError::Broken { path: path.to_owned(), source };
    serde_json::from_slice(&bytes).map(Some).map_err(broken)
}

/// Puts `bytes` at `path`, all of them or none, durably.
fn replace(directory: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn hello(node: u64, known: &[u64]) -> proto::HelloResponse {
        proto::HelloResponse { node, known: known.to_vec() }
    }

    fn fresh(number: u64) -> (TempDir, Identity) {
        let home = tempfile::tempdir().unwrap();
        let identity = Identity::open(home.path(), number).unwrap();
        (home, identity)
    }

    #[test]
    fn empty_disks_make_a_universe_in_whatever_order_they_say_hello() {
        let (_a, a) = fresh(1);
        let (_b, b) = fresh(2);
        let first = vec![NodeId(1), NodeId(2)];
        let chosen = a.choose(&[b.hello()], 1..=2).unwrap();
        assert_eq!(chosen, Chosen { id: NodeId(1), first: first.clone(), begun: false });
        // It has taken its id, but what it waits for has not been there yet.
        assert_eq!(a.hello(), hello(0, &[1]));
        let chosen = b.choose(&[a.hello()], 1..=2).unwrap();
        assert_eq!(chosen, Chosen { id: NodeId(2), first, begun: false });
        assert_eq!(a.standing(NodeId(2)).unwrap(), Standing::New);
        assert_eq!(a.hello(), hello(1, &[1, 2]));
    }

    #[test]
    fn a_disk_that_was_lost_is_another_node() {
        let (_a, a) = fresh(1);
        let chosen = a.choose(&[hello(2, &[1, 2, 3]), hello(3, &[1, 2, 3, 1 << 16 | 1])], 1..=3).unwrap();
        assert_eq!(chosen, Chosen { id: NodeId(2 << 16 | 1), first: Vec::new(), begun: false });
    }

    #[test]
    fn it_is_so_even_while_the_others_wait_for_a_third() {
        let (_a, a) = fresh(1);
        let chosen = a.choose(&[hello(0, &[1, 2]), hello(0, &[])], 1..=3).unwrap();
        assert_eq!(chosen.id, NodeId(1 << 16 | 1));
        assert_eq!(chosen.first, []);
    }

    #[test]
    fn a_number_that_is_new_to_a_universe_joins_it() {
        let (_d, d) = fresh(4);
        let universe = hello(1, &[1, 2, 3]);
        let chosen = d.choose(&[universe.clone(), universe.clone(), universe], 1..=4).unwrap();
        assert_eq!((chosen.id, chosen.first), (NodeId(1 << 16 | 4), Vec::new()));
        assert_eq!(d.hello().node, 1 << 16 | 4);
    }

    #[test]
    fn what_was_chosen_and_heard_stays() {
        let (home, a) = fresh(1);
        let chosen = a.choose(&[hello(0, &[])], 1..=2).unwrap();
        a.begun().unwrap();
        assert_eq!(a.standing(NodeId(1 << 16 | 2)).unwrap(), Standing::New);
        drop(a);
        let a = Identity::open(home.path(), 1).unwrap();
        assert_eq!(a.chosen(), Some(Chosen { begun: true, ..chosen }));
        assert_eq!(a.standing(NodeId(2)).unwrap(), Standing::Replaced);
        assert_eq!(a.standing(NodeId(1 << 16 | 2)).unwrap(), Standing::Known);
        assert_eq!(a.newest()[&2], NodeId(1 << 16 | 2));
        assert!(matches!(Identity::open(home.path(), 2), Err(IdentityError::Other { found: 1, .. })));
    }

    #[test]
    fn what_cannot_be_kept_is_not_known() {
        let (home, a) = fresh(1);
        a.choose(&[hello(0, &[])], 1..=2).unwrap();
        drop(home);
        for _ in 0..2 {
            assert!(matches!(a.standing(NodeId(2)), Err(IdentityError::Io { .. })));
        }
    }

    #[test]
    fn nobody_has_had_more_disks_than_can_have_been_missed() {
        let (_a, a) = fresh(1);
        a.choose(&[hello(0, &[])], 1..=2).unwrap();
        for incarnation in [INCARNATIONS_MISSED_MAX + 1, INCARNATION_MAX, (1 << 48) - 1] {
            assert_eq!(a.standing(NodeId(incarnation << 16 | 2)).unwrap(), Standing::Implausible);
        }
        assert_eq!(a.standing(NodeId(2)).unwrap(), Standing::New);
        assert_eq!(a.standing(NodeId(2 << 16 | 2)).unwrap(), Standing::New);
        assert_eq!(a.standing(NodeId(2)).unwrap(), Standing::Replaced);
        // Of each number one id is kept.
        assert_eq!(a.hello().known, [1, 2 << 16 | 2]);
    }

    #[test]
    fn made_up_ids_do_not_make_a_new_disk_an_old_one() {
        let (_a, a) = fresh(1);
        let chosen = a.choose(&[hello(2, &[1, 2, u64::MAX << 16 | 1])], 1..=2).unwrap();
        assert_eq!(chosen.id, NodeId(1 << 16 | 1));
    }
}
