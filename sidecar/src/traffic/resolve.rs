//! Where endpoints come from: a list, a name in DNS, or whoever pushes them.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use identity::Scope;
use identity::clock::SharedClock;
use tokio::sync::watch;

use super::endpoint::{Endpoint, Endpoints};
use super::random::Dice;

/// How often a name is looked up again. The system's resolver tells no TTL; this is the shortest that
/// names behind load balancers use, and a caching resolver bears it.
pub const LOOKUP_INTERVAL: Duration = Duration::from_secs(5);
/// An answer may take so long; the next attempt is made at its usual time.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(4);
/// Waits are up to this part shorter or longer, so that sidecars do not ask in step.
const JITTER: f64 = 0.1;

/// Finds addresses of names.
pub trait Resolver: Send + Sync {
    /// All addresses of `name`, with `port`.
    fn lookup(&self, name: Arc<str>, port: u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>>;
}

/// The system's resolver: `/etc/hosts`, DNS, whatever `nsswitch.conf` names.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemResolver;

impl Resolver for SystemResolver {
    fn lookup(&self, name: Arc<str>, port: u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> {
        Box::pin(async move { Ok(tokio::net::lookup_host((&*name, port)).await?.collect()) })
    }
}

/// Where a service's endpoints come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// They are known and stay.
    Static(Vec<Endpoint>),
    /// All addresses of a name, looked up every [`LOOKUP_INTERVAL`]; the last good answer is kept while
    /// there is no other.
    Dns {
        /// The name.
        name: Arc<str>,
        /// The port of each.
        port: u16,
    },
    /// Whoever holds the other end says.
    Pushed(watch::Receiver<Arc<[Endpoint]>>),
}

impl From<Vec<SocketAddr>> for Source {
    fn from(addresses: Vec<SocketAddr>) -> Self {
        Self::Static(addresses.into_iter().map(Endpoint::from).collect())
    }
}

/// As it was configured: addresses, or the name.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Static(list) => {
                let addresses: Vec<_> = list.iter().map(|endpoint| endpoint.address.to_string()).collect();
                f.write_str(&addresses.join(", "))
            }
            Self::Dns { name, port } => write!(f, "{name}:{port}"),
            Self::Pushed(_) => f.write_str("as they are announced"),
        }
    }
}

/// Keeps `endpoints` as `source` says, by the system's resolver, until `scope` drains. What stays is there at once.
pub(crate) fn keep<C: Default + Send + Sync + 'static>(
    source: &Source,
    endpoints: &Arc<Endpoints<C>>,
    clock: &SharedClock,
    dice: Dice,
    scope: &Scope,
) {
    if let Source::Static(list) = source {
        return endpoints.replace(list.iter().cloned());
    }
    let following =
        follow(source.clone(), Arc::clone(endpoints), Arc::new(SystemResolver), clock.clone(), dice);
    let draining = scope.clone();
    scope.spawn("endpoints", async move {
        tokio::select! {
            () = following => {}
            () = draining.draining() => {}
        }
    });
}

/// Keeps `endpoints` as `source` says; ends when nothing can change them any more.
pub async fn follow<C: Default>(
    source: Source,
    endpoints: Arc<Endpoints<C>>,
    resolver: Arc<dyn Resolver>,
    clock: SharedClock,
    dice: Dice,
) {
    match source {
        Source::Static(list) => endpoints.replace(list),
        Source::Pushed(mut pushed) => loop {
            let list = Arc::clone(&pushed.borrow_and_update());
            endpoints.replace(list.iter().cloned());
            if pushed.changed().await.is_err() {
                return;
            }
        },
        Source::Dns { name, port } => {
            let mut known = Vec::new();
            let mut failing = false;
            loop {
                let answer = tokio::select! {
                    answer = resolver.lookup(Arc::clone(&name), port) => answer,
                    () = clock.sleep(LOOKUP_TIMEOUT) => Err(io::ErrorKind::TimedOut.into()),
                };
                match usable(answer) {
                    Ok(found) => {
                        if found != known {
                            tracing::info!(%name, count = found.len(), "the name's addresses have changed");
                            endpoints.replace(found.iter().copied().map(Endpoint::from));
                            known = found;
                        }
                        failing = false;
                    }
                    // Once a failure, not every five seconds.
                    Err(error) if !failing => {
                        tracing::warn!(%name, %error, kept = known.len(), "the name cannot be looked up");
                        failing = true;
                    }
                    Err(_) => {}
                }
                clock.sleep(jittered(LOOKUP_INTERVAL, &dice)).await;
            }
        }
    }
}

/// Resolvers rotate their answers: in order, two with the same addresses are the same. An empty answer is
/// more likely a mistake than a service without endpoints.
fn usable(answer: io::Result<Vec<SocketAddr>>) -> io::Result<Vec<SocketAddr>> {
    let mut found = answer?;
    found.sort_unstable();
    found.dedup();
    if found.is_empty() { Err(io::Error::other("the answer holds no address")) } else { Ok(found) }
}

/// A wait up to [`JITTER`] shorter or longer.
pub(super) fn jittered(wait: Duration, dice: &Dice) -> Duration {
    wait.mul_f64(1.0 - JITTER + 2.0 * JITTER * dice.unit())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Mutex;

    use futures::FutureExt as _;
    use identity::clock::ManualClock;

    use super::*;
    use crate::traffic::config::Prefer;
    use crate::traffic::endpoint::tests::{address, members, placement};

    /// Gives these answers, then never one again.
    struct Script(Mutex<VecDeque<io::Result<Vec<SocketAddr>>>>);

    impl Resolver for Script {
        fn lookup(&self, name: Arc<str>, port: u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> {
            assert_eq!((&*name, port), ("accounts.internal", 8443));
            match self.0.lock().unwrap().pop_front() {
                Some(answer) => Box::pin(async { answer }),
                None => Box::pin(std::future::pending()),
            }
        }
    }

    fn found(endpoints: &Endpoints<()>) -> Vec<SocketAddr> {
        members(endpoints).iter().map(|member| member.address).collect()
    }

    #[test]
    fn names_are_looked_up_again_and_the_last_good_answer_is_kept() {
        let clock = ManualClock::at(Duration::from_secs(1000));
        let endpoints = Arc::new(Endpoints::<()>::new(placement(Prefer::Any)));
        let script = Script(Mutex::new(VecDeque::from([
            Err(io::ErrorKind::NotFound.into()),
            Ok(vec![address(2), address(1), address(2)]),
            Ok(vec![]),
            Err(io::ErrorKind::TimedOut.into()),
            Ok(vec![address(1), address(3)]),
        ])));
        let source = Source::Dns { name: "accounts.internal".into(), port: 8443 };
        let task = follow(source, Arc::clone(&endpoints), Arc::new(script), clock.clone(), Dice::seeded(1));
        let mut task = Box::pin(task);
        let mut step = || {
            assert!(task.as_mut().now_or_never().is_none());
            clock.advance(LOOKUP_INTERVAL.mul_f64(1.0 + JITTER));
            found(&endpoints)
        };
        assert_eq!(step(), []);
        let first = step();
        assert_eq!(first, [address(1), address(2)]);
        let kept = Arc::clone(&members(&endpoints)[0]);
        assert_eq!(step(), first, "an empty answer changes nothing");
        assert_eq!(step(), first, "no answer changes nothing");
        assert_eq!(step(), [address(1), address(3)]);
        assert!(Arc::ptr_eq(&kept, &members(&endpoints)[0]));
        assert_eq!(step(), [address(1), address(3)], "a resolver that hangs is given up on");
    }

    #[test]
    fn waits_are_spread() {
        let dice = Dice::seeded(4);
        let waits: Vec<_> =
            (0..1000).map(|_| jittered(Duration::from_secs(10), &dice).as_secs_f64()).collect();
        assert!(waits.iter().all(|wait| (9.0..=11.0).contains(wait)));
        assert!(waits.iter().any(|wait| *wait < 9.2) && waits.iter().any(|wait| *wait > 10.8));
    }

    #[test]
    fn pushed_endpoints_arrive_and_the_last_stay() {
        let clock = ManualClock::at(Duration::from_secs(1000));
        let endpoints = Arc::new(Endpoints::<()>::new(placement(Prefer::Any)));
        let (push, pushed) = watch::channel(Arc::from([Endpoint::from(address(1))]));
        let task = follow(
            Source::Pushed(pushed),
            Arc::clone(&endpoints),
            Arc::new(SystemResolver),
            clock,
            Dice::seeded(1),
        );
        let mut task = Box::pin(task);
        assert!(task.as_mut().now_or_never().is_none());
        assert_eq!(found(&endpoints), [address(1)]);
        push.send(Arc::from([Endpoint::from(address(2)), Endpoint::from(address(3))])).unwrap();
        assert!(task.as_mut().now_or_never().is_none());
        assert_eq!(found(&endpoints), [address(2), address(3)]);
        drop(push);
        assert!(task.now_or_never().is_some());
        assert_eq!(found(&endpoints).len(), 2);
    }
}
