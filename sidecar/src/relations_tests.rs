use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use futures::FutureExt as _;
use http::HeaderValue;
use identity::TrustDomain;
use identity::clock::{Clock as _, ManualClock};
use policy::{Caller, Layer, Occasion, Policies, Principal, ServicePolicy, Verdict};

use super::*;

const MESH: &str = include_str!("../../examples/bank/policies/mesh.cedarschema");
const SCHEMA: &str = "namespace Shop {\n  entity Order = { owner: String };\n  \
    action Read appliesTo { principal: [Mesh::Workload], resource: [Order], context: Mesh::Context };\n}\n";
const MAP: &str = "relations = \"store\"\n[[route]]\nmatch = \"GET /orders/{id:int}\"\naction = \"Read\"\n\
    object = 'Order::\"{id}\"'\nattributes = { owner = \"relations\" }\n";
const POLICY: &str = "@id(\"read\")\npermit (principal is Mesh::Workload, action, resource)\nwhen { resource.owner == \"x\" };\n";
const MAX_AGE: Duration = Duration::from_secs(5);
const START: Duration = Duration::from_secs(1_000);

fn policy() -> Arc<ServicePolicy> {
    let files: BTreeMap<String, Vec<u8>> = [
        ("mesh.cedarschema", MESH),
        ("services/shop/shop.cedarschema", SCHEMA),
        ("services/shop/map.toml", MAP),
        ("services/shop/shop.cedar", POLICY),
    ]
    .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
    .into();
    let domain = TrustDomain::new("bank.example").unwrap();
    Policies::from_files(&files, Path::new("shop"), None, &domain).unwrap().service("shop").unwrap()
}

fn mapped(policy: &ServicePolicy) -> Mapped {
    let (parts, ()) = http::Request::get("/orders/17").body(()).unwrap().into_parts();
    policy.map(&parts).unwrap()
}

fn headers(tokens: &[&str]) -> HeaderMap {
    tokens.iter().map(|token| (TOKEN.clone(), HeaderValue::from_str(token).unwrap())).collect()
}

fn owner(name: &str) -> Vec<(String, String, Option<String>)> {
    vec![("Order".into(), "17".into(), Some(format!("{{\"owner\":\"{name}\"}}")))]
}

/// The rule that decides about order 17, and why.
fn decided(policy: &ServicePolicy, mapped: &Mapped, attributes: &Attributes) -> (String, String) {
    let domain = TrustDomain::new("bank.example").unwrap();
    let principal = Principal::Workload(domain.workload("/service/web").unwrap());
    let caller = Caller { principal, user: None, chain: Arc::from([]), address: None };
    let occasion = Occasion {
        receipt: "r-7k2m0q9xw4e8t5hz".parse().unwrap(),
        now: START,
        layer: Layer::Sidecar,
        method: "GET",
        target: "/orders/17",
        transaction: None,
        trace_id: None,
    };
    match policy.decide(&caller, mapped, attributes, &occasion) {
        Verdict::Permit(permit) => {
            let record = permit.record(&caller, mapped, attributes, &occasion);
            (permit.rule().name().to_owned(), record.objects[0].told_by["owner"].clone())
        }
        Verdict::Deny(denial) => (denial.rule().name().to_owned(), denial.reason().to_owned()),
    }
}

#[tokio::test]
async fn what_is_too_old_is_not_decided_by_and_says_so() {
    let (clock, policy) = (ManualClock::at(START), policy());
    let (relations, mapped) = (Relations::new(clock.clone()), mapped(&policy));
    let ask = async || {
        let told = relations.tell(MAX_AGE, &mapped, &HeaderMap::new()).await.unwrap();
        decided(&policy, &mapped, &told)
    };
    let (rule, why) = ask().await;
    assert_eq!(rule, "relations.stale");
    assert!(why.contains("of no known age"), "{why}");
    relations.take("e1", 42, None, owner("x")).unwrap();
    assert_eq!(ask().await.0, "relations.stale", "nobody has said how old it is");
    relations.as_of(START);
    assert_eq!(ask().await, ("read".to_owned(), "relations at revision 42".to_owned()));
    clock.advance(MAX_AGE);
    assert_eq!(ask().await.0, "read");
    clock.advance(Duration::from_millis(1));
    let (rule, why) = ask().await;
    assert_eq!(rule, "relations.stale");
    assert!(why.contains("relations_max_age is 5s"), "{why}");
    // A clock that was set back does not make it young.
    clock.set(START - Duration::from_secs(60));
    assert_eq!(ask().await.0, "relations.stale");
    relations.as_of(clock.now());
    assert_eq!(ask().await.0, "read");
    // What changes, and what is gone, counts at once.
    relations.take("e1", 43, Some(42), owner("y")).unwrap();
    assert_eq!(ask().await.0, "none");
    relations.take("e1", 44, Some(43), [("Order".into(), "17".into(), None)]).unwrap();
    let (rule, why) = ask().await;
    assert_eq!(
        (rule.as_str(), why.as_str()),
        ("attributes.missing", "Shop::Order::\"17\" is not among the relations at revision 44")
    );
    // Nothing is kept of what nobody asks for.
    relations.want(true);
    relations.want(false);
    assert_eq!(ask().await.0, "relations.stale");
}

#[tokio::test]
async fn a_token_is_waited_for_a_second_and_no_longer() {
    let (clock, policy) = (ManualClock::at(START), policy());
    let (relations, mapped) = (Relations::new(clock.clone()), mapped(&policy));
    relations.take("e1", 42, None, owner("x")).unwrap();
    relations.as_of(START);
    let told = relations.tell(MAX_AGE, &mapped, &headers(&["r1.e1.42"])).await.unwrap();
    assert_eq!(decided(&policy, &mapped, &told).0, "read");

    let newer = headers(&["r1.e1.43"]);
    let mut waits = std::pin::pin!(relations.tell(MAX_AGE, &mapped, &newer));
    assert!(waits.as_mut().now_or_never().is_none());
    relations.take("e1", 43, Some(42), owner("y")).unwrap();
    assert_eq!(decided(&policy, &mapped, &waits.await.unwrap()).0, "none", "by what was written");

    let newest = headers(&["r1.e1.44"]);
    let mut waits = std::pin::pin!(relations.tell(MAX_AGE, &mapped, &newest));
    assert!(waits.as_mut().now_or_never().is_none());
    clock.advance(MAX_WAIT);
    let (rule, why) = decided(&policy, &mapped, &waits.await.unwrap());
    assert_eq!(
        (rule.as_str(), why.as_str()),
        ("relations.behind", "the relations are at 43, and the request needs those of revision 44")
    );

    for (tokens, status) in
        [(&["r1.e2.1"][..], 403), (&["r1.e1.x"], 400), (&["42"], 400), (&["r1.e1.42", "r1.e1.42"], 400)]
    {
        let refusal = relations.tell(MAX_AGE, &mapped, &headers(tokens)).await.unwrap_err();
        assert_eq!((refusal.rule(), refusal.status()), (WRONG_TOKEN, status), "{tokens:?}");
    }
}

/// Numbers from a seed (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound
    }
}

/// What is on its way to the copy, in order.
enum OnItsWay {
    Whole(u64),
    Batch { after: u64, revision: u64 },
    Pong(Duration),
}

/// Control writes, the stream is slow, is lost and opened anew, control restarts; readers ask at any time. One with a
/// token is never decided about by older data, one without never by data older than the bound: not by what was written
/// over, at that time, for longer than that.
#[tokio::test]
async fn simulation_no_reader_decides_by_what_is_too_old_for_it() {
    let policy = policy();
    let mapped = mapped(&policy);
    let (mut decided_by, mut stale, mut behind) = (0, 0, 0);
    for seed in 1..=200 {
        let mut numbers = Numbers(seed);
        let clock = ManualClock::at(START);
        let relations = Relations::new(clock.clone());
        // When each revision was acknowledged: the owner of order 17 is its number.
        let mut written: Vec<(u64, Duration)> = vec![(1, START)];
        let mut stream: Option<std::collections::VecDeque<OnItsWay>> = None;
        let mut pings: std::collections::VecDeque<Duration> = Default::default();
        for _ in 0..400 {
            let newest = written.last().unwrap().0;
            match numbers.below(12) {
                0 | 1 => {
                    let revision = newest + 1 + numbers.below(3);
                    if let Some(stream) = &mut stream {
                        stream.push_back(OnItsWay::Batch { after: newest, revision });
                    }
                    written.push((revision, clock.now()));
                }
                2 => clock.advance(Duration::from_millis(numbers.below(2_500))),
                // Lost, with all that was on its way.
                3 if numbers.below(3) == 0 => (stream, pings) = (None, Default::default()),
                // Opened: all there is.
                4 if stream.is_none() => stream = Some([OnItsWay::Whole(newest)].into()),
                // A ping is sent; control answers it behind what was written, some time later.
                5 => pings.push_back(clock.now()),
                6 => {
                    if let (Some(stream), Some(sent)) = (&mut stream, pings.pop_front()) {
                        stream.push_back(OnItsWay::Pong(sent));
                    }
                }
                7..=9 => {
                    let arrived = stream.as_mut().and_then(std::collections::VecDeque::pop_front);
                    let content = |revision: u64| owner(&revision.to_string());
                    match arrived {
                        Some(OnItsWay::Whole(revision)) => {
                            relations.take("e1", revision, None, content(revision)).unwrap();
                        }
                        Some(OnItsWay::Batch { after, revision }) => {
                            relations.take("e1", revision, Some(after), content(revision)).unwrap();
                        }
                        Some(OnItsWay::Pong(sent)) => relations.as_of(sent),
                        None => {}
                    }
                }
                _ => {
                    let of = usize::try_from(numbers.below(written.len() as u64)).unwrap();
                    let needs = (numbers.below(2) == 0).then(|| written[of].0);
                    let tokens =
                        needs.map(|revision| headers(&[&format!("r1.e1.{revision}")])).unwrap_or_default();
                    let asked = clock.now();
                    let mut told = std::pin::pin!(relations.tell(MAX_AGE, &mapped, &tokens));
                    let told = match told.as_mut().now_or_never() {
                        Some(told) => told,
                        None => {
                            clock.advance(MAX_WAIT);
                            told.await
                        }
                    };
                    let told = told.unwrap();
                    let object = &mapped.objects()[0];
                    let Some(policy::AttributeValue::Text(by)) = told.get(object, "owner") else {
                        match decided(&policy, &mapped, &told).0.as_str() {
                            "relations.stale" => stale += 1,
                            "relations.behind" => behind += 1,
                            other => panic!("seed {seed}: {other}"),
                        }
                        continue;
                    };
                    let by: u64 = by.parse().unwrap();
                    assert!(needs.is_none_or(|needs| by >= needs), "seed {seed}: by {by}, not {needs:?}");
                    let must: u64 = written
                        .iter()
                        .filter(|(_, at)| *at + MAX_AGE < asked)
                        .map(|(revision, _)| *revision)
                        .max()
                        .unwrap_or(1);
                    assert!(by >= must, "seed {seed}: by {by}, although {must} is older than the bound");
                    decided_by += 1;
                }
            }
        }
    }
    assert!(decided_by > 500 && stale > 500 && behind > 100, "{decided_by} {stale} {behind}");
}
