//! Policies on their way from a commit to the workload that decides by them.

use std::collections::{BTreeMap, HashMap};

use ca::control::{OfferError, PoliciesConfig, PolicyOffer, Replayed, Replayer, Ring, Rings};
use ca::model::{PoliciesStatus, StoredDecision};
use ca::policies::{Files, Following, Holder, follow};
use ca::release::Release;

use super::*;

/// What a workload has done with policies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Done {
    in_force: Option<(String, String)>,
    read: u32,
    put: u32,
    expired: u32,
    stale: bool,
}

/// A workload whose policies are one file; it does not take those that say `bad`.
struct Reader {
    done: watch::Sender<Done>,
    lifetime: Duration,
}

impl Holder for Reader {
    type Read = String;

    fn read(&self, _release: &Release, files: &Files) -> Result<String, String> {
        self.done.send_modify(|done| done.read += 1);
        let text = String::from_utf8(files["web.cedar"].clone()).unwrap();
        if text == "bad" { Err("it says bad".to_owned()) } else { Ok(text) }
    }

    fn put_in_force(&self, release: &Release, read: String) -> Duration {
        self.done.send_modify(|done| {
            done.in_force = Some((release.commit.clone(), read));
            done.put += 1;
        });
        self.lifetime
    }

    fn expired(&self) {
        self.done.send_modify(|done| done.expired += 1);
    }

    fn decisions(&self) -> (u64, u64) {
        (0, 0)
    }

    fn stale(&self, stale: bool) {
        self.done.send_if_modified(|done| std::mem::replace(&mut done.stale, stale) != stale);
    }
}

/// A workload that is running.
struct Workload {
    done: watch::Receiver<Done>,
    scope: Scope,
}

impl Workload {
    async fn start(world: &World, clock: SharedClock, lifetime: Duration) -> Self {
        let scope = Scope::new();
        let (done, receiver) = watch::channel(Done::default());
        // The clock may be one that stands still: nothing is to be waited for by it.
        let source = workload_api::watch(world.socket(), super::clock(), &scope);
        within(source.ready()).await.unwrap();
        let following = Following {
            socket: world.socket(),
            service: "web".into(),
            trust_domain: TrustDomain::new("bank.example").unwrap(),
            source,
        };
        let reader = Reader { done, lifetime };
        follow(following, reader, clock, &scope);
        Self { done: receiver, scope }
    }

    async fn has(&mut self, commit: &str, text: &str) {
        let wanted = Some((commit.to_owned(), text.to_owned()));
        let met = within(self.done.wait_for(|done| done.in_force == wanted)).await;
        assert!(met.is_ok(), "{commit}");
    }

    async fn stop(self) {
        self.scope.drain();
        assert_eq!(self.scope.finished(PATIENCE).await, Ok(()));
    }
}

#[derive(Debug)]
struct Denies(u64);

impl Replayer for Denies {
    fn replay(
        &self,
        _decisions: &[StoredDecision],
        before: &BTreeMap<String, Files>,
        after: &BTreeMap<String, Files>,
    ) -> Result<BTreeMap<String, Replayed>, String> {
        assert_ne!(before["web"], after["web"]);
        // Beside one that is asked much more.
        let web = Replayed { decided: 100, newly_denied: self.0, example: Some("web may not".into()) };
        let busy = Replayed { decided: 100_000, ..Replayed::default() };
        Ok([("web".to_owned(), web), ("busy".to_owned(), busy)].into())
    }
}

fn config(world: &World, address: &str, replayer: Option<Arc<dyn Replayer>>) -> ControlConfig {
    let services = HashMap::from([(SpiffeId::new(WEB).unwrap(), "web".to_owned())]);
    let policies = Some(PoliciesConfig { services, replayer, schemas: None });
    ControlConfig { policies, ..world.control_config(address.parse().unwrap(), vec![web()]) }
}

fn offer(commit: &str, text: &str, rings: Rings) -> PolicyOffer {
    let files = Files::from([("web.cedar".to_owned(), text.as_bytes().to_vec())]);
    PolicyOffer { commit: commit.to_owned(), services: [("web".to_owned(), files)].into(), rings }
}

fn rings(rings: &[Ring], max_denied: f64) -> Rings {
    Rings { rings: rings.to_vec(), hold: Duration::ZERO, max_denied }
}

/// Waits until control says of its policies what is wanted.
async fn says(control: &Running<Control>, wanted: impl Fn(&PoliciesStatus) -> bool) -> PoliciesStatus {
    let handle = control.it.handle();
    let mut changes = handle.subscribe();
    let mut status = handle.status().await.unwrap().policies.unwrap();
    let met = tokio::time::timeout(PATIENCE, async {
        while !wanted(&status) {
            // One that lags has missed some, and looks again.
            let _lags = changes.recv().await.is_err();
            status = handle.status().await.unwrap().policies.unwrap();
        }
    });
    let met = met.await;
    assert!(met.is_ok(), "{status:#?}");
    status
}

fn in_force(commit: &'static str) -> impl Fn(&PoliciesStatus) -> bool {
    move |status| {
        let wanted = status.in_force.as_ref().filter(|epoch| epoch.commit == commit);
        let all = |epoch: u64| status.holders.iter().all(|holder| holder.epoch == epoch);
        status.rolling.is_none() && wanted.is_some_and(|wanted| all(wanted.epoch))
    }
}

#[tokio::test]
async fn policy_36_a_commit_reaches_whoever_decides_by_it_and_one_that_is_refused_is_taken_back() {
    let world = World::new();
    let control = world.start(config(&world, "127.0.0.1:0", None)).await;
    let agent = world.agent(&control).await;
    let handle = control.it.handle();
    let mut web = Workload::start(&world, clock(), Duration::from_secs(3600)).await;
    let first = handle.offer_policies(offer("c1", "one", Rings::default())).await.unwrap();
    web.has("c1", "one").await;
    let status = says(&control, in_force("c1")).await;
    let [holder] = &status.holders[..] else { panic!("{status:?}") };
    assert_eq!((holder.epoch, holder.commit.as_deref()), (first, Some("c1")));
    assert_eq!((holder.service.as_str(), holder.name.as_str()), ("web", "service/web#1"));

    // Nothing was changed: a new epoch, and what decides is not touched.
    handle.offer_policies(offer("c2", "one", Rings::default())).await.unwrap();
    says(&control, in_force("c2")).await;
    assert_eq!((web.done.borrow().read, web.done.borrow().put), (1, 1));

    // One that is not taken: those before it come again, above it, and nobody was without.
    let bad = handle.offer_policies(offer("c3", "bad", Rings::default())).await.unwrap();
    let again = |status: &PoliciesStatus| status.in_force.as_ref().is_some_and(|epoch| epoch.epoch > bad);
    let status = says(&control, |status| again(status) && in_force("c2")(status)).await;
    assert_eq!(status.stopped.as_ref().unwrap().reason, "web on host-1 does not take it: it says bad");
    assert_eq!(status.holders[0].commit.as_deref(), Some("c2"));
    assert_eq!(web.done.borrow().in_force, Some(("c1".into(), "one".into())));

    // The repository goes on; and back, by a new epoch with old contents.
    handle.offer_policies(offer("c4", "four", Rings::default())).await.unwrap();
    web.has("c4", "four").await;
    assert!(says(&control, in_force("c4")).await.stopped.is_none());
    assert_eq!(handle.policy_head().await.unwrap().as_deref(), Some("c4"));
    let unknown = handle.roll_back_policies(Some("c9")).await.unwrap_err();
    assert!(matches!(unknown, OfferError::Unknown(_)), "{unknown}");
    let back = world.admin().roll_back_policies(None).await.unwrap();
    web.has("c2", "one").await;
    assert_eq!(says(&control, in_force("c2")).await.in_force.unwrap().epoch, back);
    assert_eq!(handle.policy_head().await.unwrap().as_deref(), Some("c4"), "and c4 is not offered again");
    web.stop().await;
    says(&control, |status| status.holders.is_empty()).await;
    agent.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn a_shadow_asks_what_would_have_been_denied() {
    let world = World::new();
    let control = world.start(config(&world, "127.0.0.1:0", Some(Arc::new(Denies(5))))).await;
    let agent = world.agent(&control).await;
    let handle = control.it.handle();
    let mut web = Workload::start(&world, clock(), Duration::from_secs(3600)).await;
    handle.offer_policies(offer("c1", "one", Rings::default())).await.unwrap();
    web.has("c1", "one").await;
    says(&control, in_force("c1")).await;

    let shadow = |max| rings(&[Ring::Shadow, Ring::Share(1.0)], max);
    handle.offer_policies(offer("c2", "two", shadow(0.04))).await.unwrap();
    let stopped = says(&control, |status| status.stopped.is_some()).await.stopped.unwrap();
    assert_eq!(stopped.reason, "of 100 recorded requests to web 5 would be newly denied: web may not");
    says(&control, in_force("c1")).await;
    handle.offer_policies(offer("c3", "three", shadow(0.05))).await.unwrap();
    web.has("c3", "three").await;
    says(&control, in_force("c3")).await;
    assert_eq!(web.done.borrow().put, 2, "c2 was in force nowhere");
    web.stop().await;
    agent.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn policy_39_what_was_in_force_outlives_control_and_the_agent_but_not_its_time() {
    let world = World::new();
    let control = world.start(config(&world, "127.0.0.1:0", None)).await;
    let agent = world.agent(&control).await;
    let mut web = Workload::start(&world, clock(), Duration::from_secs(3600)).await;
    control.it.handle().offer_policies(offer("c1", "one", Rings::default())).await.unwrap();
    web.has("c1", "one").await;
    says(&control, in_force("c1")).await;
    web.stop().await;
    agent.stop().await;
    let address = control.it.local_addr();

    // Control stays away: the agent has the policies on its disk. The workload needs an identity, which control signs,
    // so it starts with control there, and no policies from it.
    control.stop().await;
    let mute = world.control_config(address, vec![super::web()]);
    let control = world.start(mute).await;
    let agent = world.try_agent(world.agent_config(address, None)).await.unwrap();
    let manual = ManualClock::at(clock().now());
    let mut web = Workload::start(&world, manual.clone(), Duration::from_secs(600)).await;
    web.has("c1", "one").await;
    assert_eq!(web.done.borrow().expired, 0);
    manual.advance(Duration::from_secs(601));
    assert!(within(web.done.wait_for(|done| done.expired == 1)).await.is_ok());
    web.stop().await;

    // What is on the disk is no use to anybody who changes it.
    agent.stop().await;
    let kept = std::fs::read_dir(world.path("agent/policies")).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(&kept).unwrap();
    std::fs::write(&kept, text.replace("b25l", "dHdv")).unwrap();
    assert_ne!(std::fs::read_to_string(&kept).unwrap(), text, "the file's content is base64 of \"one\"");
    control.stop().await;
    let control = world.start(config(&world, &address.to_string(), None)).await;
    let agent = world.try_agent(world.agent_config(address, None)).await.unwrap();
    control.it.handle().offer_policies(offer("c2", "two", Rings::default())).await.unwrap();
    let mut web = Workload::start(&world, clock(), Duration::from_secs(600)).await;
    web.has("c2", "two").await;
    assert_eq!(web.done.borrow().put, 1, "and nothing before it");
    web.stop().await;
    agent.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn one_identity_cannot_take_the_policies_of_its_host_from_others() {
    let world = World::new();
    let control = world.start(config(&world, "127.0.0.1:0", None)).await;
    let agent = world.agent(&control).await;
    let mut many = Vec::new();
    for _ in 0..120 {
        many.push(Workload::start(&world, clock(), Duration::from_secs(3600)).await);
    }
    control.it.handle().offer_policies(offer("c1", "one", Rings::default())).await.unwrap();
    let status = says(&control, |status| status.holders.len() == 100 && in_force("c1")(status)).await;
    assert!(status.holders.iter().all(|holder| holder.refused.is_none()));
    // Whoever ends makes room.
    for web in many.drain(..60) {
        web.stop().await;
    }
    says(&control, |status| status.holders.len() == 60 && in_force("c1")(status)).await;
    for mut web in many {
        web.has("c1", "one").await;
        web.stop().await;
    }
    agent.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn a_minute_without_control_is_said_and_changes_nothing() {
    let world = World::new();
    let control = world.start(config(&world, "127.0.0.1:0", None)).await;
    let address = control.it.local_addr();
    let bootstrap = bootstrap(&control).await;
    let (scope, manual) = (Scope::new(), ManualClock::at(clock().now()));
    let config_of_agent = world.agent_config(address, Some(bootstrap));
    let its_clock = Arc::clone(&manual) as SharedClock;
    Agent::start(config_of_agent, its_clock, SystemRandom::shared(), &scope).await.unwrap();
    let mut web = Workload::start(&world, clock(), Duration::from_secs(3600)).await;
    control.it.handle().offer_policies(offer("c1", "one", Rings::default())).await.unwrap();
    // The agent does things by its own clock, in steps.
    let mut until = async |step: Duration, holds: fn(&Done) -> bool| {
        within(async {
            while !holds(&web.done.borrow()) {
                manual.advance(step);
                let _later =
                    tokio::time::timeout(Duration::from_millis(20), web.done.changed()).await.is_ok();
            }
        })
        .await;
    };
    let (small, large) = (Duration::from_millis(100), Duration::from_secs(5));
    until(small, |done| done.in_force.is_some()).await;
    control.stop().await;
    until(large, |done| done.stale).await;
    // Not past the end of control's certificate.
    let control = world.start(config(&world, &address.to_string(), None)).await;
    until(small, |done| !done.stale).await;
    assert_eq!((web.done.borrow().put, web.done.borrow().expired), (1, 0));
    web.stop().await;
    scope.drain();
    assert_eq!(scope.finished(PATIENCE).await, Ok(()));
    control.stop().await;
}
