//! Relations between control, agent and workloads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use ca::control::{PoliciesConfig, PolicyOffer, RelationsConfig, RelationsOf, Rings, Schema, Schemas};
use ca::policies::Files;
use ca::relations::{Attributes, Change, Object, Replica, Update, WriteError, Writer, follow};

use super::*;

/// A copy as a sidecar has it.
#[derive(Debug, Clone, Default)]
struct Held {
    epoch: String,
    revision: u64,
    objects: BTreeMap<String, String>,
    as_of: Duration,
    resets: usize,
}

struct Copy(watch::Sender<Held>);

impl Replica for Copy {
    fn take(&self, update: Update) -> Result<(), String> {
        let mut outcome = Ok(());
        self.0.send_modify(|held| {
            match update.after {
                Some(after) if (after, &update.epoch) != (held.revision, &held.epoch) => {
                    outcome = Err("a gap".to_owned());
                    return;
                }
                Some(_) => {}
                None => {
                    held.objects.clear();
                    held.resets += 1;
                }
            }
            for changed in update.changed {
                match changed.attributes {
                    Some(text) => drop(held.objects.insert(changed.id, text)),
                    None => drop(held.objects.remove(&changed.id)),
                }
            }
            (held.epoch, held.revision) = (update.epoch, update.revision);
        });
        outcome
    }

    fn as_of(&self, time: Duration) {
        self.0.send_modify(|held| held.as_of = time);
    }
}

fn change(id: &str, owner: Option<&str>) -> Change {
    Change {
        kind: "Account".into(),
        id: id.into(),
        attributes: owner.map(|owner| Attributes::parse(&format!("{{\"owner\":{owner:?}}}")).unwrap()),
        delete: owner.is_none(),
        must_be: None,
        must_exist: false,
    }
}

fn config(world: &World, address: &str) -> ControlConfig {
    let id = SpiffeId::new(WEB).unwrap();
    let own = RelationsOf { readers: [id.clone()].into(), writers: [id].into() };
    let services = [("web".to_owned(), own), ("ledger".to_owned(), RelationsOf::default())].into();
    let config = world.control_config(address.parse().unwrap(), vec![web()]);
    ControlConfig { relations: RelationsConfig { services }, ..config }
}

#[tokio::test]
async fn what_a_workload_writes_is_told_at_once_and_outlives_control() {
    let world = World::new();
    let control = world.start(config(&world, "127.0.0.1:0")).await;
    let agent = world.agent(&control).await;
    let scope = Scope::new();
    let (wanted_sender, wanted) = watch::channel(false);
    let (sender, mut held) = watch::channel(Held::default());
    follow(world.socket(), Copy(sender), wanted, clock(), &scope);
    let writer = Writer::new(&world.socket(), clock());
    // An identity first: a workload without one is nobody.
    within(workload_api::fetch_once(&world.socket())).await.unwrap();

    let first = within(writer.write("web", &[change("17", Some("alice"))])).await.unwrap();
    assert_eq!(first.token.split('.').next_back().unwrap(), first.revision.to_string());
    assert_eq!(held.borrow().resets, 0, "nobody wants them yet");
    wanted_sender.send_replace(true);
    let started = clock().now();
    within(held.wait_for(|held| held.as_of >= started)).await.unwrap();
    let second =
        within(writer.write("web", &[change("17", Some("bob")), change("18", Some("bob"))])).await.unwrap();
    within(held.wait_for(|held| held.revision == second.revision)).await.unwrap();
    within(writer.write("web", &[change("18", None)])).await.unwrap();
    within(held.wait_for(|held| held.objects.len() == 1)).await.unwrap();
    assert_eq!(held.borrow().resets, 1, "all once, then what changes");
    assert_eq!(held.borrow().objects["17"], "{\"owner\":\"bob\"}");

    // Neither for others, nor without what must hold, nor what is none.
    let refused = within(writer.write("ledger", &[change("1", Some("eve"))])).await.unwrap_err();
    assert!(
        matches!(&refused, WriteError::Denied(why) if why.starts_with("relations.not_a_writer: ")),
        "{refused}"
    );
    let refused = within(writer.write("nobody", &[change("1", Some("eve"))])).await.unwrap_err();
    assert!(matches!(refused, WriteError::Malformed(_)), "{refused}");
    let raced = Change { must_be: Some(first.revision), ..change("17", Some("eve")) };
    let refused = within(writer.write("web", &[raced])).await.unwrap_err();
    assert!(matches!(refused, WriteError::Precondition(_)), "{refused}");
    let refused = within(writer.write("web", &[change("1 7", Some("eve"))])).await.unwrap_err();
    assert!(matches!(refused, WriteError::Malformed(_)), "{refused}");

    // An operator sees who wrote what, and writes what everybody hears.
    let admin = world.admin();
    let object = Object::new("Account", "17").unwrap();
    let kept = within(admin.relation("web", &object)).await.unwrap().unwrap();
    assert_eq!((kept.by.as_str(), kept.revision), (WEB, second.revision));
    let by_hand = within(admin.write_relations("web", vec![change("19", Some("carol"))])).await.unwrap();
    within(held.wait_for(|held| held.revision == by_hand.revision)).await.unwrap();
    let page = within(admin.read_relations("web", None, None)).await.unwrap();
    assert_eq!((page.token, page.relations.len(), page.more), (by_hand.token.clone(), 2, false));
    let status = within(admin.status()).await.unwrap();
    let of_web = status.relations.iter().find(|store| store.service == "web").unwrap();
    assert_eq!((of_web.objects, of_web.revision), (2, by_hand.revision));
    assert_eq!(of_web.readers[0].spiffe_id, WEB);

    // A control that was away, and what it had acknowledged.
    let address = control.it.local_addr().to_string();
    control.stop().await;
    let control = world.start(config(&world, &address)).await;
    within(held.wait_for(|held| held.resets == 2)).await.unwrap();
    let again = clock().now();
    within(held.wait_for(|held| held.as_of >= again)).await.unwrap();
    assert_eq!((held.borrow().revision, held.borrow().objects.len()), (by_hand.revision, 2));
    let later = within(admin.write_relations("web", vec![change("19", None)])).await.unwrap();
    assert!(later.revision > by_hand.revision);
    assert_eq!(later.token.rsplit_once('.').unwrap().0, by_hand.token.rsplit_once('.').unwrap().0);
    within(held.wait_for(|held| held.revision == later.revision)).await.unwrap();

    // A registration that goes takes the stream with it.
    control.it.handle().replace_entries(vec![]).unwrap();
    let mut changes = control.it.handle().subscribe();
    while !control.it.handle().status().await.unwrap().relations[0].readers.is_empty() {
        within(changes.recv()).await.unwrap();
    }
    scope.drain();
    assert_eq!(scope.finished(PATIENCE).await, Ok(()));
    agent.stop().await;
    control.stop().await;
}

#[tokio::test]
async fn whoever_watches_hears_of_every_batch() {
    let world = World::new();
    let control = world.start(config(&world, "127.0.0.1:0")).await;
    let admin = world.admin();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let watched = async {
        let each = |page: ca::relations::RelationsPage| {
            let mut seen = noted.lock().unwrap();
            seen.push((page.relations[0].id.clone(), page.relations[0].attributes.is_some()));
            if seen.len() < 3 { Ok(()) } else { Err("enough") }
        };
        within(admin.watch_relations("web", each)).await.unwrap()
    };
    let writes = async {
        let handle = control.it.handle();
        // Written again until it was seen: nothing tells when somebody has begun to watch.
        let mut next = 0;
        while seen.lock().unwrap().len() < 3 {
            handle
                .write_relations("web", vec![change(&next.to_string(), (next % 2 == 0).then_some("alice"))])
                .await
                .unwrap();
            next += 1;
        }
    };
    let (ended, ()) = futures::future::join(watched, writes).await;
    assert_eq!(ended, Err("enough"));
    let seen = seen.lock().unwrap().clone();
    let first: usize = seen[0].0.parse().unwrap();
    let wanted: Vec<_> = (first..first + 3).map(|n| (n.to_string(), n % 2 == 0)).collect();
    assert_eq!(seen, wanted);
    control.stop().await;
}

/// A schema is a list of the attributes that there are.
#[derive(Debug)]
struct Words;

#[derive(Debug)]
struct Known(Vec<String>);

impl Schemas for Words {
    fn read(&self, service: &str, files: &Files) -> Result<Arc<dyn Schema>, String> {
        assert_eq!(service, "web");
        let text = String::from_utf8(files["web.cedarschema"].clone()).unwrap();
        Ok(Arc::new(Known(text.split(' ').map(str::to_owned).collect())))
    }
}

impl Schema for Known {
    fn check(&self, object: &Object, attributes: &Attributes) -> Result<(), String> {
        match attributes.as_map().keys().find(|name| !self.0.contains(name)) {
            Some(unknown) => Err(format!("{} has no attribute `{unknown}`", object.kind())),
            None => Ok(()),
        }
    }
}

#[tokio::test]
async fn what_the_schema_does_not_have_is_not_written_where_control_hands_out_policies() {
    let world = World::new();
    let id = SpiffeId::new(WEB).unwrap();
    let services = [(id, "web".to_owned())].into();
    let policies = Some(PoliciesConfig { services, replayer: None, schemas: Some(Arc::new(Words)) });
    let control = world.start(ControlConfig { policies, ..config(&world, "127.0.0.1:0") }).await;
    let agent = world.agent(&control).await;
    within(workload_api::fetch_once(&world.socket())).await.unwrap();
    let (handle, writer) = (control.it.handle(), Writer::new(&world.socket(), clock()));
    let offer = async |commit: &str, words: &str, rings: Rings| {
        let files = Files::from([("web.cedarschema".to_owned(), words.as_bytes().to_vec())]);
        let services = [("web".to_owned(), files)].into();
        handle.offer_policies(PolicyOffer { commit: commit.to_owned(), services, rings }).await.unwrap();
    };
    let painted = |id: &str| Change {
        attributes: Some(Attributes::parse("{\"colour\":\"red\"}").unwrap()),
        ..change(id, Some("alice"))
    };
    let refused = "relations.schema: Account::\"17\": Account has no attribute `colour`";
    // Nothing is known of the schema yet.
    within(writer.write("web", &[painted("17")])).await.unwrap();
    offer("c1", "owner", Rings::default()).await;
    let before = within(writer.write("web", &[change("17", Some("alice"))])).await.unwrap();
    let error = within(writer.write("web", &[change("18", Some("alice")), painted("17")])).await.unwrap_err();
    assert!(matches!(&error, WriteError::Malformed(why) if why.to_string() == refused), "{error}");
    let error = within(world.admin().write_relations("web", vec![painted("17")])).await.unwrap_err();
    assert!(error.to_string().contains(refused), "{error}");
    let page = within(world.admin().read_relations("web", None, None)).await.unwrap();
    assert_eq!((page.revision, page.relations.len()), (before.revision, 1), "all of a batch or nothing");
    // What comes with a change of policies may be there before it is everywhere; what is deleted may be of any schema.
    offer("c2", "owner colour", Rings { hold: Duration::from_secs(3600), ..Rings::default() }).await;
    within(writer.write("web", &[painted("17"), change("18", Some("alice"))])).await.unwrap();
    within(writer.write("web", &[change("17", None)])).await.unwrap();
    agent.stop().await;
    control.stop().await;
}
