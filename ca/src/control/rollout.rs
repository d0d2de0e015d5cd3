//! Which policies each sidecar is to have: a new epoch goes through rings, is watched in each, and is taken back by
//! itself when it is refused or denies more than the one before.
//!
//! Nothing here does I/O or looks at a clock: [`Rollout::step`] is told the time and says what has come of it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Below so many decisions a share says nothing.
pub(super) const MIN_DECISIONS: u64 = 50;
/// After a start of control nothing is concluded from who says nothing: agents are only coming back.
const AGENTS_COME_BACK: Duration = Duration::from_secs(15);

/// Through which rings a new epoch goes, and what stops it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rings {
    /// One after the other; the last is everybody.
    pub rings: Vec<Ring>,
    /// For how long each is watched before the next.
    pub hold: Duration,
    /// How much larger the share of denied requests may be than it was before, 0 to 1; of recorded requests made
    /// again, how large the share of newly denied ones may be.
    pub max_denied: f64,
}

impl Default for Rings {
    fn default() -> Self {
        Self { rings: vec![Ring::Share(1.0)], hold: Duration::ZERO, max_denied: 1.0 }
    }
}

/// One step on the way to everybody.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ring {
    /// Everybody reads it and nobody is judged by it; recorded requests are decided again.
    Shadow,
    /// A share of each service's sidecars, 0 to 1: at least one.
    Share(f64),
}

impl std::fmt::Display for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shadow => f.write_str("shadow"),
            Self::Share(share) => write!(f, "{}%", share * 100.0),
        }
    }
}

/// One version of everybody's policies, as it is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Epoch {
    pub(crate) epoch: u64,
    pub(crate) commit: String,
    /// Seconds since the Unix epoch.
    pub(crate) offered: u64,
    /// The digest of each service's manifest.
    pub(crate) services: BTreeMap<String, String>,
    pub(crate) rings: Rings,
    pub(crate) state: EpochState,
}

/// How far an epoch has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum EpochState {
    /// On its way, in this one of its rings.
    Rolling(usize),
    /// Everybody has it, or is to have it.
    InForce,
    /// Another one came.
    Over,
    /// Taken back, for this reason.
    Stopped(String),
}

/// A sidecar, or whoever else decides by policies: its host, and its name there.
pub(super) type Key = (String, String);

/// What it says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Instance {
    pub(super) service: String,
    pub(super) spiffe_id: String,
    /// In force there; 0 for none.
    pub(super) epoch: u64,
    /// Read there, and not in force.
    pub(super) prepared: u64,
    /// Not taken there, and why.
    pub(super) refused: Option<(u64, String)>,
    pub(super) counts: Counts,
}

/// Decisions by the epoch in force.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) decided: u64,
    pub(super) denied: u64,
}

/// Decisions of each service, and of all together: a service that is asked little is not to be lost among the others.
type CountsOf = BTreeMap<Whose, Counts>;

/// In the order in which they are looked at: what can be said of a service says more.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Whose {
    Of(String),
    All,
}

impl Counts {
    fn and(self, other: Self) -> Self {
        Self {
            decided: self.decided.saturating_add(other.decided),
            denied: self.denied.saturating_add(other.denied),
        }
    }

    /// The share of denied ones, if there are enough to speak of one.
    fn share(self) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        (self.decided >= MIN_DECISIONS).then(|| self.denied as f64 / self.decided as f64)
    }
}

/// What a sidecar is to have; 0 is nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) epoch: u64,
    pub(super) prepare: u64,
}

/// What has come of the time that has passed and of what was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// The candidate's next ring begins.
    Ring,
    /// The candidate is in force everywhere.
    Done,
    /// It must be taken back.
    Stop(String),
}

#[derive(Debug)]
struct Candidate {
    epoch: Epoch,
    ring: usize,
    since: Duration,
    /// Before this moment the ring is not at its end.
    held_until: Duration,
    /// What recorded requests made of it, where that is asked.
    replay: Replay,
    /// It takes another one back: nothing would be won by stopping it.
    withdraws: bool,
}

/// Whether a shadow's recorded requests have been decided again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Replay {
    /// They are still to be asked for.
    Wanted,
    /// Nothing is held against the candidate.
    Passed,
    /// Something is.
    Failed(String),
}

/// The whole.
#[derive(Debug, Default)]
pub(super) struct Rollout {
    in_force: Option<Epoch>,
    candidate: Option<Candidate>,
    instances: BTreeMap<Key, Instance>,
    /// What those in force before the candidate had decided when it came.
    before: CountsOf,
    stopped: Option<Epoch>,
    /// Those after the one in force that were given up for a newer one: who has one keeps it until the newer one comes.
    given_up: Vec<Epoch>,
}

impl Rollout {
    /// As it was left: epochs in ascending order.
    pub(super) fn restored(epochs: impl IntoIterator<Item = Epoch>, now: Duration) -> Self {
        let mut rollout = Self::default();
        for epoch in epochs {
            match epoch.state {
                EpochState::InForce => {
                    rollout.in_force = Some(epoch);
                    rollout.given_up.clear();
                }
                EpochState::Rolling(ring) => rollout.begin(epoch, ring, false, now),
                EpochState::Stopped(_) => rollout.stopped = Some(epoch),
                EpochState::Over => rollout.given_up.push(epoch),
            }
        }
        // One that was in force before another came into force would have been marked so.
        if let (Some(in_force), Some(candidate)) = (&rollout.in_force, &rollout.candidate)
            && candidate.epoch.epoch < in_force.epoch
        {
            rollout.candidate = None;
        }
        if let Some(candidate) = &mut rollout.candidate {
            candidate.held_until = candidate.held_until.max(now.saturating_add(AGENTS_COME_BACK));
        }
        rollout
    }

    /// A new epoch sets out; the one that was on its way is given up. Returns that.
    pub(super) fn offer(&mut self, epoch: Epoch, withdraws: bool, now: Duration) -> Option<Epoch> {
        let given_up =
            self.candidate.take().map(|given_up| Epoch { state: EpochState::Over, ..given_up.epoch });
        self.given_up.extend(given_up.clone());
        if !withdraws {
            self.stopped = None;
        }
        self.before = self.counts(self.floor());
        self.begin(epoch, 0, withdraws, now);
        given_up
    }

    fn begin(&mut self, epoch: Epoch, ring: usize, withdraws: bool, now: Duration) {
        // The first policies of a mesh have nothing to be compared with.
        let ring = if self.in_force.is_none() { epoch.rings.rings.len().saturating_sub(1) } else { ring };
        let shadow = epoch.rings.rings.get(ring) == Some(&Ring::Shadow);
        let replay = if shadow { Replay::Wanted } else { Replay::Passed };
        let held_until = now.saturating_add(epoch.rings.hold);
        self.candidate = Some(Candidate { epoch, ring, since: now, held_until, replay, withdraws });
    }

    /// The candidate, if its recorded requests are to be decided again.
    pub(super) fn wants_replay(&self) -> Option<(&Epoch, &Epoch)> {
        let candidate = self.candidate.as_ref().filter(|candidate| candidate.replay == Replay::Wanted)?;
        Some((self.in_force.as_ref()?, &candidate.epoch))
    }

    /// What recorded requests made of an epoch.
    pub(super) fn replayed(&mut self, epoch: u64, outcome: Replay) {
        if let Some(candidate) = self.candidate.as_mut().filter(|candidate| candidate.epoch.epoch == epoch) {
            candidate.replay = outcome;
        }
    }

    /// All instances of a host, as its agent says.
    pub(super) fn heard(&mut self, host: &str, said: BTreeMap<String, Instance>) {
        self.gone(host);
        self.instances.extend(said.into_iter().map(|(name, instance)| ((host.to_owned(), name), instance)));
    }

    /// The agent of a host is gone: what it said is not known to hold.
    pub(super) fn gone(&mut self, host: &str) {
        let from = (host.to_owned(), String::new());
        let names = self.instances.range(from..).map(|(key, _)| key).take_while(|(of, _)| of == host);
        for key in names.cloned().collect::<Vec<_>>() {
            self.instances.remove(&key);
        }
    }

    /// What everybody is to have.
    pub(super) fn orders(&self) -> BTreeMap<Key, Order> {
        let base = self.floor();
        let chosen = self.chosen();
        let orders = self.instances.iter().map(|(key, instance)| {
            let offered = self.candidate.as_ref().map_or(0, |candidate| candidate.epoch.epoch);
            let order = match chosen.contains_key(key) {
                true => Order { epoch: offered, prepare: 0 },
                false => Order { epoch: base, prepare: offered },
            };
            // Whoever has a later one keeps it, until another later one comes: an epoch never falls.
            let kept = instance.epoch > order.epoch && instance.epoch <= self.newest();
            let order = if kept { Order { epoch: instance.epoch, ..order } } else { order };
            (key.clone(), order)
        });
        orders.collect()
    }

    fn newest(&self) -> u64 {
        let candidate = self.candidate.as_ref().map(|candidate| candidate.epoch.epoch);
        candidate.or(self.in_force.as_ref().map(|epoch| epoch.epoch)).unwrap_or(0)
    }

    /// Who is in the candidate's ring.
    fn chosen(&self) -> BTreeMap<&Key, &Instance> {
        let Some(candidate) = &self.candidate else { return BTreeMap::new() };
        let Some(Ring::Share(share)) = candidate.epoch.rings.rings.get(candidate.ring) else {
            return BTreeMap::new();
        };
        let mut services: BTreeMap<&str, Vec<(&Key, &Instance)>> = BTreeMap::new();
        for (key, instance) in &self.instances {
            services.entry(&instance.service).or_default().push((key, instance));
        }
        let mut chosen = BTreeMap::new();
        for mut instances in services.into_values() {
            // Those that have it, or its predecessor that was given up, first; then by lot, another one each time.
            instances.sort_by_cached_key(|(key, instance)| {
                (std::cmp::Reverse(instance.epoch), lot(key, candidate.epoch.epoch))
            });
            chosen.extend(instances.iter().take(part(instances.len(), *share)).copied());
        }
        chosen
    }

    /// Decisions of those that have an epoch.
    fn counts(&self, epoch: u64) -> CountsOf {
        let mut counts = CountsOf::new();
        for instance in self.instances.values().filter(|instance| instance.epoch == epoch) {
            for whose in [Whose::Of(instance.service.clone()), Whose::All] {
                let sum = counts.entry(whose).or_default();
                *sum = sum.and(instance.counts);
            }
        }
        counts
    }

    /// Goes on, if it is time. To be called until it says nothing more.
    pub(super) fn step(&mut self, now: Duration) -> Option<Step> {
        let step = self.next_step(now)?;
        match &step {
            Step::Ring => {
                if let Some(candidate) = &mut self.candidate {
                    candidate.ring += 1;
                    candidate.since = now;
                    candidate.held_until = now.saturating_add(candidate.epoch.rings.hold);
                    candidate.epoch.state = EpochState::Rolling(candidate.ring);
                }
            }
            Step::Done => {
                if let Some(Candidate { mut epoch, .. }) = self.candidate.take() {
                    epoch.state = EpochState::InForce;
                    self.in_force = Some(epoch);
                    self.given_up.clear();
                }
            }
            Step::Stop(reason) => {
                if let Some(Candidate { mut epoch, .. }) = self.candidate.take() {
                    epoch.state = EpochState::Stopped(reason.clone());
                    self.stopped = Some(epoch);
                }
            }
        }
        Some(step)
    }

    fn next_step(&self, now: Duration) -> Option<Step> {
        let candidate = self.candidate.as_ref()?;
        if let Some(reason) = self.held_against(candidate) {
            return Some(Step::Stop(reason));
        }
        let rings = &candidate.epoch.rings.rings;
        let epoch = candidate.epoch.epoch;
        let acknowledged = match rings.get(candidate.ring) {
            Some(Ring::Shadow) => {
                candidate.replay == Replay::Passed
                    && self.instances.values().all(|one| one.prepared.max(one.epoch) >= epoch)
            }
            _ => self.chosen().values().all(|instance| instance.epoch >= epoch),
        };
        if !acknowledged || now < candidate.held_until {
            return None;
        }
        Some(if candidate.ring + 1 < rings.len() { Step::Ring } else { Step::Done })
    }

    /// Why the candidate must not go on, if it must not.
    fn held_against(&self, candidate: &Candidate) -> Option<String> {
        if candidate.withdraws || self.in_force.is_none() {
            return None;
        }
        let epoch = candidate.epoch.epoch;
        let refused = self.instances.iter().find_map(|((host, _), instance)| {
            let (refused, why) = instance.refused.as_ref()?;
            (*refused == epoch).then(|| format!("{} on {host} does not take it: {why}", instance.service))
        });
        if refused.is_some() {
            return refused;
        }
        if let Replay::Failed(why) = &candidate.replay {
            return Some(why.clone());
        }
        let in_force = self.counts(self.floor());
        self.counts(epoch).into_iter().find_map(|(whose, after)| {
            let of = |counts: &CountsOf| counts.get(&whose).copied().unwrap_or_default();
            let (then, now) = (of(&self.before), of(&in_force));
            let before = if now.decided > then.decided { now } else { then };
            let (was, is) = (before.share()?, after.share()?);
            let to = match &whose {
                Whose::Of(service) => format!(" to {service}"),
                Whose::All => String::new(),
            };
            (is > was + candidate.epoch.rings.max_denied).then(|| {
                let (decided, is, was) = (after.decided, is * 100.0, was * 100.0);
                format!("of {decided} requests{to} {is:.1} % were denied, and before {was:.1} %")
            })
        })
    }

    /// When to look again although nothing was said.
    pub(super) fn next_look(&self) -> Option<Duration> {
        self.candidate.as_ref().map(|candidate| candidate.held_until)
    }

    /// No release below this may be used.
    pub(super) fn floor(&self) -> u64 {
        self.in_force.as_ref().map_or(0, |epoch| epoch.epoch)
    }

    /// The epochs that somebody may be told to have, the newest last.
    pub(super) fn current(&self) -> impl Iterator<Item = &Epoch> {
        let kept = |epoch: &&Epoch| self.instances.values().any(|instance| instance.epoch == epoch.epoch);
        let given_up = self.given_up.iter().filter(kept);
        self.in_force.iter().chain(given_up).chain(self.candidate.iter().map(|candidate| &candidate.epoch))
    }

    pub(super) fn in_force(&self) -> Option<&Epoch> {
        self.in_force.as_ref()
    }

    /// The candidate, and since when it is in its ring.
    pub(super) fn rolling(&self) -> Option<(&Epoch, Ring, Duration)> {
        let candidate = self.candidate.as_ref()?;
        let ring = candidate.epoch.rings.rings.get(candidate.ring).copied().unwrap_or(Ring::Share(1.0));
        Some((&candidate.epoch, ring, candidate.since))
    }

    /// What is in force, and the epoch above it that was stopped, while nothing has come out above that.
    pub(super) fn to_withdraw(&self) -> Option<(Epoch, u64)> {
        let (good, stopped) = (self.in_force.as_ref()?, self.stopped.as_ref()?);
        (self.candidate.is_none() && stopped.epoch > good.epoch).then(|| (good.clone(), stopped.epoch))
    }

    /// The last one that was taken back, until another one is offered.
    pub(super) fn stopped(&self) -> Option<&Epoch> {
        self.stopped.as_ref()
    }

    pub(super) fn instances(&self) -> &BTreeMap<Key, Instance> {
        &self.instances
    }
}

/// How many of `all` a share is: at least one of any.
fn part(all: usize, share: f64) -> usize {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "of instances"
    )]
    let part = (all as f64 * share).ceil() as usize;
    part.clamp(1, all.max(1))
}

/// A number for each instance that differs from epoch to epoch (FNV-1a).
fn lot((host, name): &Key, epoch: u64) -> u64 {
    let bytes = host.bytes().chain([0]).chain(name.bytes()).chain(epoch.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: Duration = Duration::from_secs(1_000);
    const HOLD: Duration = Duration::from_secs(60);

    fn epoch(number: u64, rings: &[Ring]) -> Epoch {
        Epoch {
            epoch: number,
            commit: format!("c{number}"),
            offered: 0,
            services: BTreeMap::new(),
            rings: Rings { rings: rings.to_vec(), hold: HOLD, max_denied: 0.05 },
            state: EpochState::Rolling(0),
        }
    }

    fn instance(epoch: u64) -> Instance {
        Instance {
            service: "web".into(),
            spiffe_id: "spiffe://bank.example/service/web".into(),
            epoch,
            prepared: 0,
            refused: None,
            counts: Counts::default(),
        }
    }

    /// A mesh of `count` hosts with one sidecar each, on the first epoch.
    struct World {
        rollout: Rollout,
        hosts: BTreeMap<String, Instance>,
    }

    impl World {
        fn new(count: usize) -> Self {
            let mut rollout = Rollout::default();
            assert_eq!(rollout.offer(epoch(1, &[Ring::Shadow, Ring::Share(1.0)]), false, START - HOLD), None);
            let hosts = (0..count).map(|number| (format!("h{number}"), instance(0))).collect();
            let mut world = Self { rollout, hosts };
            world.obey();
            assert_eq!(world.rollout.step(START), Some(Step::Done), "the first has no rings");
            world
        }

        /// Everybody does as told.
        fn obey(&mut self) {
            self.say();
            let orders = self.rollout.orders();
            for (host, instance) in &mut self.hosts {
                let order = orders[&(host.clone(), "web".to_owned())];
                assert!(order.epoch >= instance.epoch, "an epoch never falls");
                if instance.epoch != order.epoch {
                    instance.counts = Counts::default();
                }
                (instance.epoch, instance.prepared) = (order.epoch, order.prepare);
            }
            self.say();
        }

        fn say(&mut self) {
            for (host, instance) in &self.hosts {
                self.rollout.heard(host, [("web".to_owned(), instance.clone())].into());
            }
        }

        fn having(&self, epoch: u64) -> usize {
            self.hosts.values().filter(|instance| instance.epoch == epoch).count()
        }

        fn decide(&mut self, epoch: u64, decided: u64, denied: u64) {
            for instance in self.hosts.values_mut().filter(|instance| instance.epoch == epoch) {
                instance.counts = Counts { decided, denied };
            }
            self.say();
        }
    }

    const ALL: [Ring; 4] = [Ring::Shadow, Ring::Share(0.01), Ring::Share(0.25), Ring::Share(1.0)];

    #[test]
    fn ring_after_ring_to_everybody_each_held_and_acknowledged() {
        let mut world = World::new(200);
        world.rollout.offer(epoch(2, &ALL), false, START);
        let mut now = START;
        world.obey();
        assert_eq!(world.having(2), 0, "a shadow judges nobody");
        now += HOLD;
        assert_eq!(world.rollout.step(now), None, "recorded requests are not decided again yet");
        assert!(world.rollout.wants_replay().is_some_and(|(one, other)| one.epoch == 1 && other.epoch == 2));
        world.rollout.replayed(2, Replay::Passed);
        for (having, step) in [(2, Step::Ring), (50, Step::Ring), (200, Step::Done)] {
            assert_eq!(world.rollout.step(now), Some(Step::Ring), "to {having}");
            assert_eq!(world.rollout.step(now + HOLD), None, "nobody has said that it has it");
            world.obey();
            assert_eq!(world.having(2), having);
            assert_eq!(world.rollout.step(now + HOLD - Duration::from_millis(1)), None, "held");
            now += HOLD;
            if step == Step::Done {
                assert_eq!((world.rollout.floor(), world.rollout.step(now)), (1, Some(Step::Done)));
            }
        }
        assert_eq!((world.rollout.floor(), world.rollout.step(now)), (2, None));
    }

    #[test]
    fn one_that_does_not_take_it_or_denies_more_stops_it() {
        let mut world = World::new(10);
        world.rollout.offer(epoch(2, &ALL), false, START);
        world.hosts.get_mut("h3").unwrap().refused = Some((2, "unknown operator".into()));
        world.say();
        let stop = world.rollout.step(START).unwrap();
        assert_eq!(stop, Step::Stop("web on h3 does not take it: unknown operator".into()));
        assert!(
            matches!(&world.rollout.stopped().unwrap().state, EpochState::Stopped(why) if why.contains("h3"))
        );

        let mut world = World::new(10);
        world.decide(1, 1_000, 20);
        world.rollout.offer(epoch(2, &[Ring::Share(0.3), Ring::Share(1.0)]), false, START);
        world.obey();
        world.decide(2, 100, 6);
        assert_eq!(world.rollout.step(START), None, "6 % is within 2 % and 5 %");
        world.decide(2, 100, 8);
        let Some(Step::Stop(why)) = world.rollout.step(START) else { panic!("went on") };
        assert_eq!(why, "of 300 requests to web 8.0 % were denied, and before 2.0 %");
        // Taken back by a new epoch, which nothing stops and which no sidecar that has the bad one lacks.
        world.rollout.offer(epoch(3, &[Ring::Share(1.0)]), true, START);
        assert!(world.rollout.stopped().is_some(), "still to be seen");
        world.obey();
        world.decide(3, 1_000, 1_000);
        assert_eq!((world.having(3), world.rollout.step(START + HOLD)), (10, Some(Step::Done)));

        // A service that is asked little, beside one that is asked much.
        let mut world = World::new(10);
        world.hosts.get_mut("h0").unwrap().service = "rare".into();
        world.decide(1, 1_000, 0);
        world.rollout.offer(epoch(2, &[Ring::Share(0.01), Ring::Share(1.0)]), false, START);
        world.obey();
        for instance in world.hosts.values_mut().filter(|instance| instance.epoch == 2) {
            let rare = instance.service == "rare";
            instance.counts = if rare {
                Counts { decided: 60, denied: 60 }
            } else {
                Counts { decided: 100_000, denied: 0 }
            };
        }
        world.say();
        let stop = Step::Stop("of 60 requests to rare 100.0 % were denied, and before 0.0 %".into());
        assert_eq!(world.rollout.step(START), Some(stop));

        let mut world = World::new(1);
        world.rollout.offer(epoch(2, &ALL), false, START);
        world.rollout.replayed(2, Replay::Failed("7 newly denied".into()));
        assert_eq!(world.rollout.step(START), Some(Step::Stop("7 newly denied".into())));
    }

    #[test]
    fn a_newer_one_takes_over_and_whoever_had_the_older_gets_it_first() {
        let mut world = World::new(8);
        world.rollout.offer(epoch(2, &[Ring::Share(0.25), Ring::Share(1.0)]), false, START);
        world.obey();
        let early: Vec<_> =
            world.hosts.iter().filter(|(_, one)| one.epoch == 2).map(|(h, _)| h.clone()).collect();
        assert_eq!(world.rollout.offer(epoch(3, &ALL), false, START).unwrap().epoch, 2);
        world.obey();
        assert_eq!(world.having(2), 2, "kept: an epoch never falls");
        let signed = |world: &World| world.rollout.current().map(|epoch| epoch.epoch).collect::<Vec<_>>();
        assert_eq!(signed(&world), [1, 2, 3], "or it would expire where it is kept");
        world.rollout.replayed(3, Replay::Passed);
        assert_eq!(world.rollout.step(START + HOLD), Some(Step::Ring));
        world.obey();
        assert!(world.hosts[&early[0]].epoch == 3 || world.hosts[&early[1]].epoch == 3);
        for host in early {
            world.hosts.get_mut(&host).unwrap().epoch = 3;
        }
        world.say();
        assert_eq!(signed(&world), [1, 3]);
    }

    #[test]
    fn it_goes_on_where_it_was_left() {
        let stored = |number, state| Epoch { state, ..epoch(number, &ALL) };
        let rollout = Rollout::restored(
            [
                stored(1, EpochState::Over),
                stored(2, EpochState::InForce),
                stored(3, EpochState::Stopped("no".into())),
                stored(4, EpochState::Rolling(2)),
            ],
            START,
        );
        assert_eq!((rollout.floor(), rollout.rolling().unwrap().1), (2, Ring::Share(0.25)));
        assert_eq!(rollout.stopped().unwrap().epoch, 3);
        let left = [stored(1, EpochState::InForce), stored(2, EpochState::Stopped("no".into()))];
        let withdrawn = Rollout::restored(left, START).to_withdraw();
        assert!(withdrawn.is_some_and(|(good, stopped)| (good.epoch, stopped) == (1, 2)));
        assert!(Rollout::restored([], START).orders().is_empty());

        // Nobody has come back yet, which is nobody's consent.
        let at_once = Rings { hold: Duration::ZERO, ..epoch(2, &ALL).rings };
        let rolling = Epoch { rings: at_once, ..stored(2, EpochState::Rolling(1)) };
        let mut rollout = Rollout::restored([stored(1, EpochState::InForce), rolling], START);
        assert_eq!(rollout.step(START), None);
        assert_eq!(rollout.next_look(), Some(START + AGENTS_COME_BACK));
        assert_eq!(rollout.step(START + AGENTS_COME_BACK), Some(Step::Ring));
    }

    proptest! {
        #[test]
        fn whatever_comes_no_sidecar_is_sent_back_and_it_ends(
            count in 1usize..12,
            deeds in prop::collection::vec((0u8..6, 0usize..12), 0..80),
        ) {
            let mut world = World::new(count);
            let (mut now, mut next) = (START, 2);
            for (deed, which) in deeds {
                let host = format!("h{}", which % count);
                match deed {
                    0 => {
                        world.rollout.offer(epoch(next, &ALL), false, now);
                        next += 1;
                    }
                    1 => now += HOLD,
                    2 => world.rollout.gone(&host),
                    3 => {
                        let newest = world.rollout.newest();
                        world.hosts.get_mut(&host).unwrap().refused = Some((newest, "no".into()));
                        world.say();
                    }
                    4 => world.rollout.replayed(world.rollout.newest(), Replay::Passed),
                    _ => world.obey(),
                }
                if let Some(Step::Stop(_)) = world.rollout.step(now) {
                    world.rollout.offer(epoch(next, &[Ring::Share(1.0)]), true, now);
                    next += 1;
                }
            }
            // Left alone, all end up with one epoch.
            for _ in 0..2 * ALL.len() {
                world.hosts.values_mut().for_each(|instance| instance.refused = None);
                world.obey();
                world.rollout.replayed(world.rollout.newest(), Replay::Passed);
                now += HOLD;
                let stopped = matches!(world.rollout.step(now), Some(Step::Stop(_)));
                prop_assert!(!stopped);
            }
            world.obey();
            prop_assert_eq!(world.having(world.rollout.floor()), count);
        }
    }
}
