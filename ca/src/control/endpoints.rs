//! Where workloads serve, as their hosts' agents say it: in memory, told to every agent whole.
//!
//! Nothing that may still be there is withdrawn for control's or an agent's own restart: what a host said before is kept
//! until its agent, and the workloads behind it, have had time to say it again; a host that is gone stops being served
//! after a while, and is forgotten much later, since between the two its endpoints are better than none.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tonic::Status;

use identity::SpiffeId;

use super::Inner;
use crate::endpoint::{Endpoint, MAX_PER_HOST};
use crate::entry::{Entry, EntrySet};
use crate::model::EndpointStatus;
use crate::pb::control as pb;

/// How long what was said before counts beside what is said anew: longer than the longest waits of a workload and an
/// agent that connect again, one after the other.
const SETTLE: Duration = Duration::from_secs(15);
/// How long a host that is not heard of counts as well.
const LEASE: Duration = Duration::from_secs(30);
/// How long it counts as anything.
const FORGET: Duration = Duration::from_secs(60 * 60);
/// The pause between two messages to the agents: a rack that starts is one change, not a hundred.
const COALESCE: Duration = Duration::from_millis(50);

type Places = BTreeMap<(SpiffeId, SocketAddr), bool>;

/// What the agents have said. Time is the caller's.
#[derive(Debug, Default)]
struct Hosts {
    hosts: BTreeMap<String, Host>,
    streams: u64,
}

#[derive(Debug, Default)]
struct Host {
    /// The newest stream; what older ones still say does not count.
    stream: u64,
    said: Places,
    /// What earlier streams said, until `settles`.
    before: Places,
    settles: Duration,
    /// When the newest stream ended.
    left: Option<Duration>,
}

impl Hosts {
    fn opened(&mut self, host: &str, now: Duration) -> u64 {
        self.streams += 1;
        let host = self.hosts.entry(host.to_owned()).or_default();
        let said = std::mem::take(&mut host.said);
        host.before.extend(said);
        (host.stream, host.settles, host.left) = (self.streams, now + SETTLE, None);
        self.streams
    }

    fn said(&mut self, host: &str, stream: u64, places: Places) {
        if let Some(host) = self.hosts.get_mut(host).filter(|host| host.stream == stream) {
            host.said = places;
        }
    }

    fn closed(&mut self, host: &str, stream: u64, now: Duration) {
        if let Some(host) = self.hosts.get_mut(host).filter(|host| host.stream == stream) {
            host.left = Some(now);
        }
    }

    /// What holds now, of workloads that are registered for the host that says so.
    fn endpoints(&mut self, entries: &EntrySet, now: Duration) -> Vec<Endpoint> {
        self.hosts.retain(|_, host| host.left.is_none_or(|left| now < left + FORGET));
        let mut registered: HashMap<&SpiffeId, Vec<&Entry>> = HashMap::new();
        for entry in entries.by_id.values() {
            registered.entry(&entry.id).or_default().push(entry);
        }
        let mut places = Places::new();
        for (name, host) in &mut self.hosts {
            if now >= host.settles {
                host.before.clear();
            }
            let heard = host.left.is_none_or(|left| now < left + LEASE);
            // What is said anew comes last, and counts.
            for (place, serving) in host.before.iter().chain(&host.said) {
                let of_this_id = registered.get(&place.0).into_iter().flatten();
                if of_this_id.into_iter().any(|entry| entry.applies_to(name)) {
                    places.insert(place.clone(), *serving && heard);
                }
            }
        }
        places.into_iter().map(|((id, address), serving)| Endpoint { id, address, serving }).collect()
    }

    /// When time alone will change them next.
    fn next_change(&self, now: Duration) -> Option<Duration> {
        let of = |host: &Host| {
            let settles = (!host.before.is_empty()).then_some(host.settles);
            let left = host.left.into_iter().flat_map(|left| [left + LEASE, left + FORGET]);
            settles.into_iter().chain(left).filter(|change| *change > now).min()
        };
        self.hosts.values().filter_map(of).min()
    }
}

/// Who serves where, as agents are told.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    endpoints: Vec<Endpoint>,
    /// Whether every agent has had the time to come back since control started.
    complete: bool,
}

impl View {
    pub(super) fn message(&self) -> pb::EndpointsResponse {
        let endpoints = self.endpoints.iter().map(Endpoint::to_control).collect();
        pb::EndpointsResponse { endpoints, complete: self.complete }
    }
}

/// What the agents have said, and who is told.
#[derive(Debug)]
pub(super) struct Registry {
    hosts: Mutex<Hosts>,
    news: Notify,
    view: watch::Sender<View>,
    settles: Duration,
}

impl Registry {
    pub(super) fn new(started: Duration) -> Self {
        Self {
            hosts: Mutex::default(),
            news: Notify::new(),
            view: watch::Sender::default(),
            settles: started + SETTLE,
        }
    }

    /// The view now and at every change.
    pub(super) fn subscribe(&self) -> watch::Receiver<View> {
        let mut receiver = self.view.subscribe();
        receiver.mark_changed();
        receiver
    }

    /// For people.
    pub(super) fn statuses(&self) -> Vec<EndpointStatus> {
        let view = self.view.borrow();
        let status = |endpoint: &Endpoint| EndpointStatus {
            spiffe_id: endpoint.id.to_string(),
            address: endpoint.address.to_string(),
            serving: endpoint.serving,
        };
        view.endpoints.iter().map(status).collect()
    }

    fn hosts(&self) -> MutexGuard<'_, Hosts> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the agents what has changed, for as long as the scope lives.
pub(super) async fn publish(inner: Arc<Inner>) {
    let registry = &inner.endpoints;
    let mut entries = inner.entries.subscribe();
    loop {
        let set = entries.borrow_and_update().clone();
        let now = inner.clock.now();
        let (endpoints, next) = {
            let mut hosts = registry.hosts();
            (hosts.endpoints(&set, now), hosts.next_change(now))
        };
        let view = View { endpoints, complete: now >= registry.settles };
        let next = [next, (!view.complete).then_some(registry.settles)].into_iter().flatten().min();
        let changed = registry.view.send_if_modified(|told| {
            let news = *told != view;
            *told = view;
            news
        });
        if changed {
            inner.changed();
        }
        tokio::select! {
            () = registry.news.notified() => inner.clock.sleep(COALESCE).await,
            // The entries' sender is `inner`'s own.
            changed = entries.changed() => if changed.is_err() { return },
            () = inner.clock.sleep(next.map_or(FORGET, |next| next.saturating_sub(now))) => {}
            () = inner.scope.draining() => return,
        }
    }
}

/// One agent's open stream of announcements.
pub(super) struct Announcing {
    inner: Arc<Inner>,
    host: String,
    stream: u64,
}

impl Announcing {
    pub(super) fn open(inner: Arc<Inner>, host: String) -> Self {
        let stream = inner.endpoints.hosts().opened(&host, inner.clock.now());
        Self { inner, host, stream }
    }

    /// Takes all that the host says now; one malformed endpoint refuses the message.
    pub(super) fn say(&self, endpoints: Vec<pb::Endpoint>) -> Result<(), Status> {
        if endpoints.len() > MAX_PER_HOST {
            return Err(Status::invalid_argument("too many endpoints of one host"));
        }
        let read = |wire: &pb::Endpoint| {
            let Endpoint { id, address, serving } = Endpoint::of_control(wire)?;
            Some(((id, address), serving))
        };
        let places: Option<Places> = endpoints.iter().map(read).collect();
        let places = places.ok_or_else(|| Status::invalid_argument("not an endpoint"))?;
        self.inner.endpoints.hosts().said(&self.host, self.stream, places);
        self.inner.endpoints.news.notify_one();
        Ok(())
    }
}

impl Drop for Announcing {
    fn drop(&mut self) {
        self.inner.endpoints.hosts().closed(&self.host, self.stream, self.inner.clock.now());
        self.inner.endpoints.news.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use identity::TrustDomain;

    use super::*;
    use crate::entry::Selectors;

    const START: Duration = Duration::from_secs(1_700_000_000);

    fn id(service: &str) -> SpiffeId {
        SpiffeId::new(&format!("spiffe://bank.example/service/{service}")).unwrap()
    }

    fn entries(hosts: Option<&[&str]>) -> EntrySet {
        let entry = Entry {
            id: id("web"),
            selectors: Selectors { uid: Some(7), ..Selectors::default() },
            dns: vec![],
            ips: vec![],
            ttl: None,
            hosts: hosts.map(|hosts| hosts.iter().map(ToString::to_string).collect()),
        };
        EntrySet::new(1, &TrustDomain::new("bank.example").unwrap(), vec![entry]).unwrap()
    }

    fn places(all: &[(&str, u16, bool)]) -> Places {
        let place = |(service, port, serving): &(&str, u16, bool)| {
            ((id(service), SocketAddr::from(([10, 0, 0, 1], *port))), *serving)
        };
        all.iter().map(place).collect()
    }

    /// Ports and whether they serve, `after` the start.
    fn seen(hosts: &mut Hosts, after: Duration) -> Vec<(u16, bool)> {
        let endpoints = hosts.endpoints(&entries(None), START + after);
        endpoints.iter().map(|endpoint| (endpoint.address.port(), endpoint.serving)).collect()
    }

    #[test]
    fn what_a_host_says_holds_until_it_says_something_else() {
        let mut hosts = Hosts::default();
        let one = hosts.opened("h1", START);
        hosts.said("h1", one, places(&[("web", 1, true), ("web", 2, false)]));
        let two = hosts.opened("h2", START);
        hosts.said("h2", two, places(&[("web", 3, true)]));
        assert_eq!(seen(&mut hosts, Duration::ZERO), [(1, true), (2, false), (3, true)]);
        hosts.said("h1", one, places(&[("web", 2, true)]));
        assert_eq!(seen(&mut hosts, Duration::ZERO), [(2, true), (3, true)]);
        assert_eq!(hosts.next_change(START), None);
    }

    #[test]
    fn an_agent_that_comes_back_empty_handed_takes_nothing_away_at_once() {
        let mut hosts = Hosts::default();
        let first = hosts.opened("h1", START);
        hosts.said("h1", first, places(&[("web", 1, true), ("web", 2, true)]));
        let second = hosts.opened("h1", START + SETTLE);
        hosts.said("h1", second, places(&[]));
        // The older stream ends late, and says something late: neither counts.
        hosts.said("h1", first, places(&[("web", 9, true)]));
        hosts.closed("h1", first, START + SETTLE);
        assert_eq!(seen(&mut hosts, SETTLE), [(1, true), (2, true)]);
        hosts.said("h1", second, places(&[("web", 1, false)]));
        assert_eq!(seen(&mut hosts, SETTLE), [(1, false), (2, true)], "what is said anew counts");
        assert_eq!(hosts.next_change(START + SETTLE), Some(START + 2 * SETTLE));
        assert_eq!(seen(&mut hosts, 2 * SETTLE), [(1, false)]);
    }

    #[test]
    fn a_host_that_is_gone_stops_serving_and_is_forgotten_later() {
        let mut hosts = Hosts::default();
        let stream = hosts.opened("h1", START);
        hosts.said("h1", stream, places(&[("web", 1, true)]));
        hosts.closed("h1", stream, START + SETTLE);
        let just_before = |until: Duration| until - Duration::from_millis(1);
        assert_eq!(seen(&mut hosts, just_before(SETTLE + LEASE)), [(1, true)]);
        assert_eq!(hosts.next_change(START + SETTLE), Some(START + SETTLE + LEASE));
        assert_eq!(seen(&mut hosts, SETTLE + LEASE), [(1, false)]);
        assert_eq!(seen(&mut hosts, just_before(SETTLE + FORGET)), [(1, false)]);
        assert_eq!(seen(&mut hosts, SETTLE + FORGET), []);
        assert_eq!(hosts.next_change(START + SETTLE + FORGET), None);
    }

    #[test]
    fn a_host_speaks_for_workloads_that_are_registered_there_only() {
        let mut hosts = Hosts::default();
        let stream = hosts.opened("h1", START);
        hosts.said("h1", stream, places(&[("web", 1, true), ("accounts", 2, true)]));
        assert_eq!(seen(&mut hosts, Duration::ZERO), [(1, true)]);
        assert_eq!(hosts.endpoints(&entries(Some(&["h2"])), START), []);
    }
}
