//! Telling the service manager how this process is: the protocol of `sd_notify(3)`, over the Unix datagram
//! socket that `$NOTIFY_SOCKET` names.
//!
//! A path and an abstract name (`@…`) are spoken to; `vsock:` addresses, which virtual machines get, are not.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// What a service manager sets for the processes it starts, and they must not hand on.
pub(crate) const VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// A manager that takes no message for this long is not waited for.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);
/// Shortest pause between two signs of life, whatever the manager asks.
const MIN_WATCHDOG_PAUSE: Duration = Duration::from_millis(10);

/// The service manager, if there is one.
#[derive(Debug)]
pub(crate) struct Notifier {
    manager: Option<SocketAddr>,
    /// How often it wants a sign of life at least.
    watchdog: Option<Duration>,
}

impl Notifier {
    /// The manager that the environment names.
    pub(crate) fn from_env() -> Self {
        Self::named(|variable| std::env::var_os(variable), std::process::id())
    }

    fn named(variable: impl Fn(&str) -> Option<OsString>, own_pid: u32) -> Self {
        let manager = variable("NOTIFY_SOCKET").and_then(|name| {
            let found = address(&name);
            if let Err(error) = &found {
                tracing::warn!(%error, socket = %name.display(), "NOTIFY_SOCKET cannot be used");
            }
            found.ok()
        });
        let number = |name| variable(name)?.to_str()?.parse::<u64>().ok();
        // Meant for another process, such as the shell that started this one.
        let ours = variable("WATCHDOG_PID").is_none() || number("WATCHDOG_PID") == Some(own_pid.into());
        let watchdog = number("WATCHDOG_USEC").filter(|usec| ours && *usec > 0).map(Duration::from_micros);
        Self { manager, watchdog }
    }

    /// How long to pause between two [`alive`](Self::alive)s: half of what the manager bears.
    pub(crate) fn watchdog_pause(&self) -> Option<Duration> {
        let watchdog = self.watchdog.filter(|_| self.manager.is_some())?;
        Some((watchdog / 2).max(MIN_WATCHDOG_PAUSE))
    }

    /// Everything is there; also ends a reload.
    pub(crate) fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\nSTATUS={}", line(status)));
    }

    /// A reload begins; [`ready`](Self::ready) ends it, whether it changed anything or not.
    pub(crate) fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let usec = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1_000;
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={usec}\nSTATUS=reloading"));
    }

    /// No new work is taken any more.
    pub(crate) fn stopping(&self, status: &str) {
        self.tell(&format!("STOPPING=1\nSTATUS={}", line(status)));
    }

    /// How things are, for people.
    pub(crate) fn status(&self, status: &str) {
        self.tell(&format!("STATUS={}", line(status)));
    }

    /// A sign of life. Never waits: it comes from the runtime that serves requests.
    pub(crate) fn alive(&self) {
        self.send("WATCHDOG=1", Wait::No);
    }

    fn tell(&self, message: &str) {
        self.send(message, Wait::Bounded);
    }

    fn send(&self, message: &str, wait: Wait) {
        let Some(manager) = &self.manager else { return };
        if let Err(error) = send(manager, message, wait) {
            tracing::warn!(%error, message, "the service manager was not told");
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    No,
    Bounded,
}

fn send(manager: &SocketAddr, message: &str, wait: Wait) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    match wait {
        Wait::No => socket.set_nonblocking(true)?,
        Wait::Bounded => socket.set_write_timeout(Some(SEND_TIMEOUT))?,
    }
    socket.send_to_addr(message.as_bytes(), manager).map(|_whole_datagram| ())
}

fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => Err(io::Error::new(io::ErrorKind::Unsupported, "neither a path nor an abstract name")),
    }
}

/// A status is one line of the message: what would begin another is a space.
fn line(text: &str) -> String {
    text.replace(['\n', '\0'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Manager {
        socket: UnixDatagram,
        notifier: Notifier,
    }

    impl Manager {
        fn at(name: &OsStr, more: &[(&str, &str)]) -> Self {
            let socket = UnixDatagram::bind_addr(&address(name).unwrap()).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let variable = |wanted: &str| {
                if wanted == "NOTIFY_SOCKET" {
                    return Some(name.to_owned());
                }
                more.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.into())
            };
            Self { socket, notifier: Notifier::named(variable, 42) }
        }

        fn heard(&self) -> String {
            let mut bytes = [0; 512];
            let length = self.socket.recv(&mut bytes).unwrap();
            String::from_utf8(bytes[..length].to_vec()).unwrap()
        }
    }

    #[test]
    fn a_manager_hears_each_state_at_a_path_and_at_an_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("@palisade-notify-test-{}", std::process::id());
        for name in [path.as_os_str(), OsStr::new(&name)] {
            let manager = Manager::at(name, &[]);
            manager.notifier.ready("serves\nMAINPID=1");
            assert_eq!(manager.heard(), "READY=1\nSTATUS=serves MAINPID=1");
            manager.notifier.stopping("drains");
            assert_eq!(manager.heard(), "STOPPING=1\nSTATUS=drains");
            manager.notifier.alive();
            assert_eq!(manager.heard(), "WATCHDOG=1");
        }
    }

    #[test]
    fn a_reload_says_when_it_began_on_the_clock_that_the_manager_compares() {
        let manager = Manager::at(OsStr::new(&format!("@palisade-reload-{}", std::process::id())), &[]);
        let micros = || {
            let now = clock_gettime(ClockId::Monotonic);
            now.tv_sec * 1_000_000 + now.tv_nsec / 1_000
        };
        let before = micros();
        manager.notifier.reloading();
        let heard = manager.heard();
        let lines: Vec<&str> = heard.lines().collect();
        assert_eq!((lines[0], lines[2]), ("RELOADING=1", "STATUS=reloading"));
        let said: i64 = lines[1].strip_prefix("MONOTONIC_USEC=").unwrap().parse().unwrap();
        assert!((before..=micros()).contains(&said));
    }

    #[test]
    fn the_watchdog_is_fed_at_half_time_and_only_by_whom_it_is_meant_for() {
        let name = |part| OsString::from(format!("@palisade-watchdog-{part}-{}", std::process::id()));
        let pause = |part, more: &[_]| Manager::at(&name(part), more).notifier.watchdog_pause();
        assert_eq!(pause("a", &[("WATCHDOG_USEC", "3000000")]), Some(Duration::from_millis(1500)));
        assert_eq!(
            pause("b", &[("WATCHDOG_USEC", "3000000"), ("WATCHDOG_PID", "42")]),
            Some(Duration::from_millis(1500))
        );
        assert_eq!(pause("c", &[("WATCHDOG_USEC", "3000000"), ("WATCHDOG_PID", "41")]), None);
        assert_eq!(pause("d", &[("WATCHDOG_USEC", "0")]), None);
        assert_eq!(pause("e", &[]), None);
    }

    #[test]
    fn no_manager_or_an_unusable_one_is_no_failure() {
        for socket in [None, Some("vsock:2:1234"), Some("/nowhere/notify"), Some("")] {
            let named = |name: &str| socket.filter(|_| name == "NOTIFY_SOCKET").map(OsString::from);
            Notifier::named(named, 42).ready("serves");
        }
    }
}
