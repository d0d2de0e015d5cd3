use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::join_all;
use http::StatusCode;
use identity::Clock as _;
use identity::clock::ManualClock;
use ring::rand::SystemRandom;
use serde_json::json;

use super::*;
use crate::config::{IssuerConfig, SealKey};
use crate::https::HttpsError;
use crate::jwt::IdToken;
use crate::store::RedbStore;
use crate::testing::{ISSUER, Network, TestKey, config, now};

const ACCESS_LIFE: u64 = 300;

struct Bench {
    clock: Arc<ManualClock>,
    network: Network,
    sessions: Arc<Sessions>,
    store: Arc<RedbStore>,
    refreshes: Arc<AtomicUsize>,
    _directory: tempfile::TempDir,
}

fn bench(change: impl FnOnce(&mut IssuerConfig)) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let clock = ManualClock::at(now());
    let network = Network::with_issuer(ISSUER, &[&TestKey::new("k1")]);
    let mut config = config(ISSUER);
    change(&mut config);
    let client = network.issuer(&config, &clock);
    let store = Arc::new(RedbStore::open(directory.path()).unwrap());
    let sessions = Sessions::new(
        store.clone(),
        Sealer::new(&[SealKey::new("k".repeat(32).into()).unwrap()]).unwrap(),
        SessionLimits::default(),
        Arc::new(Issuers::new(vec![client]).unwrap()),
        clock.clone(),
        Arc::new(SystemRandom::new()),
        Scope::new(),
    );
    let refreshes = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&refreshes);
    let bench = Bench { clock, network, sessions, store, refreshes, _directory: directory };
    bench.issuer_answers(move |body| {
        let n = count.fetch_add(1, Ordering::SeqCst) + 1;
        let expected = format!("refresh_token=refresh-{}", n - 1);
        assert!(body.contains(&expected), "{body} does not hold {expected}");
        Ok((StatusCode::OK, token_answer(n)))
    });
    bench
}

fn token_answer(n: usize) -> String {
    json!({"token_type": "Bearer", "access_token": "a", "expires_in": ACCESS_LIFE, "refresh_token": format!("refresh-{n}")})
        .to_string()
}

impl Bench {
    fn issuer_answers(
        &self,
        answer: impl Fn(&str) -> Result<(StatusCode, String), HttpsError> + Send + Sync + 'static,
    ) {
        self.network.serve(&format!("{ISSUER}/token"), answer);
    }

    async fn log_in(&self) -> Zeroizing<String> {
        self.log_in_as("alice", None).await
    }

    async fn log_in_as(&self, name: &str, replaces: Option<&str>) -> Zeroizing<String> {
        let user = User {
            id: name.into(),
            issuer: ISSUER.into(),
            client: "gateway".into(),
            scopes: vec!["bank".into()],
            groups: vec![],
            auth_time: 0,
            tenant: None,
            mfa: false,
        };
        let tokens = Tokens {
            id: Some(IdToken {
                subject: name.into(),
                groups: vec![],
                auth_time: 0,
                tenant: None,
                mfa: false,
                expires: now(),
            }),
            id_token: None,
            refresh_token: Some("refresh-0".to_owned().into()),
            scopes: None,
            expires_in: Duration::from_secs(ACCESS_LIFE),
        };
        self.sessions.create(user, tokens, replaces).await.unwrap()
    }

    async fn works(&self, cookie: &str) -> bool {
        self.sessions.authenticate(cookie).await.unwrap().is_some()
    }

    fn refreshes(&self) -> usize {
        self.refreshes.load(Ordering::SeqCst)
    }
}

#[tokio::test]
async fn gateway_20_the_id_is_256_random_bits_and_only_its_hash_and_sealed_words_are_stored() {
    let bench = bench(|_| {});
    let (one, two) = (bench.log_in().await, bench.log_in().await);
    assert_ne!(*one, *two);
    let id = jws::decode(&one).unwrap();
    assert_eq!(id.len(), 32);
    let row = bench.store.get(&hash_of(&one).unwrap()).await.unwrap().unwrap();
    let raw: [u8; 32] = id.as_slice().try_into().unwrap();
    assert_eq!(bench.store.get(&raw).await.unwrap(), None);
    let holds = |needle: &[u8]| row.sealed.windows(needle.len()).any(|window| window == needle);
    assert!(!holds(b"refresh-0") && !holds(b"alice") && !holds(&id));
    assert!(bench.works(&one).await);
    for bad in ["", "x", &one[1..], &format!("{}A", *one), &"A".repeat(43), &"A".repeat(10_000)] {
        assert!(!bench.works(bad).await, "{bad}");
    }
}

#[tokio::test]
async fn gateway_22_a_record_moved_to_another_session_does_not_open() {
    let bench = bench(|_| {});
    let (one, two) = (bench.log_in().await, bench.log_in_as("bob", None).await);
    let row = bench.store.get(&hash_of(&two).unwrap()).await.unwrap().unwrap();
    assert!(bench.store.put(&hash_of(&one).unwrap(), Some(1), row.clone()).await.unwrap());
    assert!(!bench.works(&one).await);
    let later = Row { ends: row.ends + 1_000_000, ..row };
    assert!(bench.store.put(&hash_of(&two).unwrap(), Some(1), later).await.unwrap());
    assert!(!bench.works(&two).await, "its end cannot be moved either");
}

#[tokio::test]
async fn gateway_23_two_hundred_requests_on_an_ended_access_token_refresh_once() {
    let bench = bench(|_| {});
    let cookie = bench.log_in().await;
    bench.clock.advance(Duration::from_secs(ACCESS_LIFE));
    let all = join_all((0..200).map(|_| bench.works(&cookie))).await;
    assert!(all.into_iter().all(|works| works));
    assert_eq!(bench.refreshes(), 1);
    bench.clock.advance(Duration::from_secs(ACCESS_LIFE));
    assert!(bench.works(&cookie).await);
    assert_eq!(bench.refreshes(), 2, "with the successor");
}

#[tokio::test]
async fn gateway_23_a_refresh_begins_before_the_end_and_nobody_waits_for_it() {
    let bench = bench(|_| {});
    let cookie = bench.log_in().await;
    bench.clock.advance(Duration::from_secs(ACCESS_LIFE * 69 / 100));
    assert!(bench.works(&cookie).await);
    bench.clock.advance(Duration::from_secs(ACCESS_LIFE * 12 / 100));
    assert!(bench.works(&cookie).await);
    while bench.refreshes() == 0 || !bench.sessions.refreshing.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    bench.clock.advance(Duration::from_secs(ACCESS_LIFE * 30 / 100));
    assert!(bench.works(&cookie).await);
    assert_eq!(bench.refreshes(), 1, "the first token has ended by now, the second is fresh");
}

#[tokio::test]
async fn gateway_23_a_client_that_hangs_up_does_not_cancel_the_refresh() {
    let bench = bench(|_| {});
    let cookie = bench.log_in().await;
    bench.clock.advance(Duration::from_secs(ACCESS_LIFE));
    {
        let mut impatient = Box::pin(bench.sessions.authenticate(&cookie));
        assert!(futures::poll!(&mut impatient).is_pending());
    }
    assert!(bench.works(&cookie).await);
    assert_eq!(bench.refreshes(), 1);
}

#[tokio::test]
async fn gateway_24_invalid_grant_ends_the_session() {
    let bench = bench(|_| {});
    let cookie = bench.log_in().await;
    bench.issuer_answers(|_| Ok((StatusCode::BAD_REQUEST, json!({"error": "invalid_grant"}).to_string())));
    bench.clock.advance(Duration::from_secs(ACCESS_LIFE));
    assert!(!bench.works(&cookie).await);
    assert_eq!(bench.store.get(&hash_of(&cookie).unwrap()).await.unwrap(), None);
}

#[tokio::test]
async fn gateway_24_an_issuer_that_is_down_logs_nobody_out_and_is_not_hammered() {
    let bench = bench(|_| {});
    let cookie = bench.log_in().await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    bench.issuer_answers(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        Ok((StatusCode::SERVICE_UNAVAILABLE, String::new()))
    });
    bench.clock.advance(Duration::from_secs(ACCESS_LIFE));
    for _ in 0..10 {
        let outcome = bench.sessions.authenticate(&cookie).await;
        assert!(matches!(outcome, Err(SessionError::IssuerUnavailable)));
    }
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    bench.issuer_answers(|_| Ok((StatusCode::OK, token_answer(1))));
    bench.clock.advance(Duration::from_secs(REFRESH_BACKOFF_SECONDS));
    assert!(bench.works(&cookie).await);
}

#[tokio::test]
async fn gateway_24_a_lost_answer_is_asked_for_again_only_where_that_is_safe() {
    for (safe, expected) in [(true, 2), (false, 1)] {
        let bench = bench(|config| config.refresh_retry_safe = safe);
        let cookie = bench.log_in().await;
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        bench.issuer_answers(move |_| match count.fetch_add(1, Ordering::SeqCst) {
            0 => Err(HttpsError::Timeout),
            _ => Ok((StatusCode::OK, token_answer(1))),
        });
        bench.clock.advance(Duration::from_secs(ACCESS_LIFE));
        assert_eq!(bench.sessions.authenticate(&cookie).await.is_ok(), safe);
        assert_eq!(asked.load(Ordering::SeqCst), expected);
    }
}

#[tokio::test]
async fn gateway_26_idle_and_absolute_limits_hold_and_a_refresh_is_no_use() {
    let bench = bench(|_| {});
    let idle = SessionLimits::default().idle;
    let cookie = bench.log_in().await;
    bench.clock.advance(idle - Duration::from_secs(1));
    assert!(bench.works(&cookie).await);
    bench.clock.advance(idle - Duration::from_secs(1));
    assert!(bench.works(&cookie).await, "used in between");
    bench.clock.advance(idle);
    assert!(!bench.works(&cookie).await);

    let refreshed = bench.log_in().await;
    bench.issuer_answers(|_| Ok((StatusCode::OK, token_answer(7))));
    bench.clock.advance(Duration::from_secs(ACCESS_LIFE));
    let id = hash_of(&refreshed).unwrap();
    bench.sessions.refresh_once(&id).await.unwrap();
    bench.clock.advance(idle - Duration::from_secs(ACCESS_LIFE));
    assert!(!bench.works(&refreshed).await, "the refresh was not a request");

    let busy = bench.log_in().await;
    let begun = bench.clock.now();
    while bench.clock.now() < begun + SessionLimits::default().absolute - Duration::from_secs(600) {
        bench.clock.advance(Duration::from_secs(600));
        assert!(bench.works(&busy).await);
    }
    bench.clock.advance(Duration::from_secs(600));
    assert!(!bench.works(&busy).await, "twelve hours, however busy");
}

#[tokio::test]
async fn gateway_20_security_47_the_session_from_before_a_login_ends() {
    let bench = bench(|_| {});
    let planted = bench.log_in_as("mallory", None).await;
    let new = bench.log_in_as("alice", Some(&planted)).await;
    assert!(!bench.works(&planted).await && bench.works(&new).await);
    let again = bench.log_in_as("alice", Some(&new)).await;
    assert!(bench.works(&new).await, "requests in flight of another tab finish");
    bench.clock.advance(Duration::from_secs(REPLACED_GRACE_SECONDS));
    assert!(!bench.works(&new).await && bench.works(&again).await);
}

#[tokio::test]
async fn gateway_27_a_refresh_in_flight_does_not_bring_back_a_session_that_was_logged_out() {
    let bench = bench(|_| {});
    let cookie = bench.log_in().await;
    bench.clock.advance(Duration::from_secs(ACCESS_LIFE));
    let mut request = Box::pin(bench.sessions.authenticate(&cookie));
    assert!(futures::poll!(&mut request).is_pending());
    assert!(bench.sessions.end(&cookie).await.unwrap().is_some());
    assert!(request.await.unwrap().is_none());
    assert!(!bench.works(&cookie).await);
    assert_eq!(bench.store.get(&hash_of(&cookie).unwrap()).await.unwrap(), None);
}
