//! A commit on its way to a fleet: real control, real agents and real workload streams, in a few processes.
//!
//! `cargo bench -p ca --bench fleet -- HOSTS SIDECARS COMMITS`, by default 1000 hosts with 10 sidecars each and 5
//! commits. Prints how long it took from the offer of a commit to control until the middle, 99 % and all sidecars had it
//! in force, and until control knew. Verifying, which a fleet does on its own processors, is done on this machine's: a
//! release is verified once by each agent and once by each sidecar.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::indexing_slicing, reason = "a benchmark")]

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ca::agent::{Agent, AgentConfig, Bootstrap, DEFAULT_SOCKET_MODE};
use ca::authority::DEFAULT_ROOT_TTL;
use ca::control::{
    Control, ControlConfig, ControlHandle, Entry, PoliciesConfig, PolicyOffer, Rings, Selectors, listen,
};
use ca::policies::{Files, Following, Holder, follow};
use ca::random::SystemRandom;
use ca::release::Release;
use identity::{Scope, SpiffeId, SystemClock, TrustDomain, workload_api};
use secrecy::SecretString;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;

const DOMAIN: &str = "bank.example";
const WEB: &str = "spiffe://bank.example/service/web";
/// Bytes of policies: a few dozen rules, a map and two schemas.
const POLICY_BYTES: usize = 20_000;
/// Hosts that join at once; control lets a hundred of one address in, and then five a second.
const JOINED_AT_ONCE: usize = 100;

/// The arguments with which this program is all sidecars, or a part of the agents: one process cannot hold so many
/// streams, each with a hold on the process at its other end.
const SIDECARS: &str = "sidecars";
const AGENTS: &str = "agents";
/// Processes that the agents are spread over.
const AGENT_PROCESSES: usize = 3;

/// A sidecar that does all but read Cedar, and says when policies are in force.
struct Sidecar {
    in_force: mpsc::UnboundedSender<String>,
}

impl Holder for Sidecar {
    type Read = ();

    fn read(&self, _release: &Release, _files: &Files) -> Result<(), String> {
        Ok(())
    }

    fn put_in_force(&self, release: &Release, (): ()) -> Duration {
        let _measured = self.in_force.send(format!("{} {}\n", release.commit, since_boot())).is_ok();
        Duration::from_secs(24 * 3600)
    }

    fn expired(&self) {}

    fn decisions(&self) -> (u64, u64) {
        (0, 0)
    }

    fn stale(&self, _stale: bool) {}
}

/// Nanoseconds, the same in every process.
fn since_boot() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap()
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if args.first().is_some_and(|arg| arg == SIDECARS) {
        runtime.block_on(sidecars(Path::new(&args[1]), args[2].parse().unwrap()));
    } else if args.first().is_some_and(|arg| arg == AGENTS) {
        runtime.block_on(agents(Path::new(&args[1]), args[2].parse().unwrap()));
    } else {
        let number = |at: usize, default| args.get(at).map_or(default, |arg| arg.parse().unwrap());
        runtime.block_on(run(number(0, 1000), number(1, 10), number(2, 5)));
    }
    // Thousands of tasks are not waited for.
    std::process::exit(0);
}

/// Lines of standard input, as they come.
fn lines() -> mpsc::UnboundedReceiver<String> {
    let (sender, receiver) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        std::io::stdin().lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    receiver
}

/// Serves an agent for each line with a host and its join token; says a line when it has joined.
async fn agents(directory: &Path, control: SocketAddr) {
    let (scope, mut hosts, mut serving) = (Scope::new(), lines(), Vec::new());
    while let Some(line) = hosts.recv().await {
        let (name, token) = line.split_once(' ').unwrap();
        serving.push(agent(name, token, directory, control, &scope).await);
        println!("{name}");
    }
}

/// Serves sidecars on each host that a line of standard input names; says a line for each that puts policies in force.
async fn sidecars(directory: &Path, each: usize) {
    let scope = Scope::new();
    let (in_force, mut heard) = mpsc::unbounded_channel::<String>();
    let mut hosts = lines();
    let mut out = std::io::stdout();
    loop {
        tokio::select! {
            said = heard.recv() => {
                out.write_all(said.unwrap().as_bytes()).unwrap();
                out.flush().unwrap();
            }
            host = hosts.recv() => {
                let Some(host) = host else { return };
                let socket = socket(&host, directory);
                let source = workload_api::watch(socket.clone(), SystemClock::shared(), &scope);
                for _ in 0..each {
                    let following = Following {
                        socket: socket.clone(),
                        service: "web".into(),
                        trust_domain: TrustDomain::new(DOMAIN).unwrap(),
                        source: source.clone(),
                    };
                    let sidecar = Sidecar { in_force: in_force.clone() };
                    follow(following, sidecar, SystemClock::shared(), &scope);
                }
            }
        }
    }
}

async fn run(hosts: usize, each: usize, commits: usize) {
    let directory = tempfile::tempdir().unwrap();
    let scope = Scope::new();
    let control = control(directory.path(), &scope).await;
    let handle = control.handle();
    std::fs::write(directory.path().join("bundle.pem"), handle.bundle().pem()).unwrap();
    let (mut sidecars, mut heard, _child) = part(SIDECARS, directory.path(), &each.to_string());
    let address = control.local_addr().to_string();
    let mut parts: Vec<_> = (0..AGENT_PROCESSES).map(|_| part(AGENTS, directory.path(), &address)).collect();
    let began = Instant::now();
    for host in 0..hosts {
        let name = format!("h{host}");
        let token = handle.create_join_token(&name, Duration::from_secs(60)).await.unwrap().token;
        let (says, hears, _) = &mut parts[host % AGENT_PROCESSES];
        says.write_all(format!("{name} {token}\n").as_bytes()).await.unwrap();
        assert_eq!(hears.next_line().await.unwrap(), Some(name.clone()));
        sidecars.write_all(format!("{name}\n").as_bytes()).await.unwrap();
        if host >= JOINED_AT_ONCE {
            tokio::time::sleep(Duration::from_millis(210)).await;
        }
        if (host + 1).is_multiple_of(100) {
            println!("{} hosts joined after {:.0?}", host + 1, began.elapsed());
        }
    }
    let all = hosts * each;
    println!("{all} sidecars on {hosts} hosts, {POLICY_BYTES} bytes of policies");
    println!("{:>8} {:>9} {:>9} {:>9} {:>14}", "commit", "50 %", "99 %", "all", "acknowledged");
    // The first is for those that are still connecting.
    for commit in 0..=commits {
        let (began, start) = (Instant::now(), since_boot());
        let name = offer(&handle, commit).await;
        let acknowledged = async {
            acknowledged(&handle, &name).await;
            began.elapsed()
        };
        let measuring = async {
            let mut took = Vec::with_capacity(all);
            while took.len() < all {
                let line = heard.next_line().await.unwrap().unwrap();
                let (of, at) = line.split_once(' ').unwrap();
                if of == name {
                    took.push(Duration::from_nanos(at.parse::<u64>().unwrap() - start));
                }
            }
            took.sort_unstable();
            took
        };
        let (took, known) = tokio::join!(measuring, acknowledged);
        let at = |share: usize| took[(took.len() * share / 100).min(took.len() - 1)];
        if commit > 0 {
            println!("{name:>8} {:>9.2?} {:>9.2?} {:>9.2?} {known:>14.2?}", at(50), at(99), at(100));
        }
    }
}

async fn control(directory: &Path, scope: &Scope) -> Control {
    let own = std::env::current_exe().unwrap().canonicalize().unwrap();
    let entry = Entry {
        id: SpiffeId::new(WEB).unwrap(),
        selectors: Selectors { path: Some(own), ..Selectors::default() },
        dns: Vec::new(),
        ips: Vec::new(),
        ttl: None,
        hosts: None,
    };
    let services = HashMap::from([(SpiffeId::new(WEB).unwrap(), "web".to_owned())]);
    let config = ControlConfig {
        trust_domain: TrustDomain::new(DOMAIN).unwrap(),
        listener: listen("127.0.0.1:0".parse().unwrap()).unwrap(),
        admin_socket: directory.join("admin/control.sock"),
        state: directory.join("control"),
        svid_ttl: Duration::from_secs(24 * 3600),
        rotate_after: Duration::from_secs(12 * 3600),
        root_ttl: DEFAULT_ROOT_TTL,
        entries: vec![entry],
        passphrase: SecretString::from("not a secret"),
        decisions_kept: 1_000,
        relations: Default::default(),
        policies: Some(PoliciesConfig { services, replayer: None, schemas: None }),
    };
    Control::start(config, SystemClock::shared(), SystemRandom::shared(), scope).await.unwrap()
}

fn socket(host: &str, directory: &Path) -> std::path::PathBuf {
    directory.join(host).join("agent.sock")
}

type Part = (ChildStdin, Lines<BufReader<ChildStdout>>, Child);

/// This program again, as a part of the fleet.
fn part(what: &str, directory: &Path, about: &str) -> Part {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .arg(what)
        .arg(directory)
        .arg(about)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    (stdin, BufReader::new(stdout).lines(), child)
}

async fn agent(name: &str, token: &str, directory: &Path, control: SocketAddr, scope: &Scope) -> Agent {
    let config = AgentConfig {
        host: name.to_owned(),
        trust_domain: TrustDomain::new(DOMAIN).unwrap(),
        socket: socket(name, directory),
        socket_mode: DEFAULT_SOCKET_MODE,
        state: directory.join(name).join("state"),
        control,
        bootstrap: Some(Bootstrap {
            join_token: SecretString::from(token),
            bundle_pem: std::fs::read_to_string(directory.join("bundle.pem")).unwrap(),
        }),
        refusals: None,
        redactor: None,
    };
    Agent::start(config, SystemClock::shared(), SystemRandom::shared(), scope).await.unwrap()
}

async fn offer(control: &ControlHandle, commit: usize) -> String {
    let name = format!("c{commit}");
    let mut text = format!("// {name}\n");
    text.extend(std::iter::repeat_n('x', POLICY_BYTES));
    let files = Arc::new(Files::from([("services/web/web.cedar".to_owned(), text.into_bytes())]));
    let services = BTreeMap::from([("web".to_owned(), files.as_ref().clone())]);
    let offer = PolicyOffer { commit: name.clone(), services, rings: Rings::default() };
    control.offer_policies(offer).await.unwrap();
    name
}

/// Until control knows that everybody has it.
async fn acknowledged(control: &ControlHandle, commit: &str) {
    let mut changes = control.subscribe();
    loop {
        let status = control.policies_in_force();
        if status.is_some_and(|(in_force, rolling)| in_force == commit && !rolling) {
            return;
        }
        let _lags = changes.recv().await.is_err();
    }
}
