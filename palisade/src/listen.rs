//! Listening: on sockets that were given to this process, or on new ones; and naming who is in the way when
//! an address is taken.

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;

use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;
use socket2::{Domain, Protocol, Socket, Type};

use crate::failure::Failure;
use crate::handover::Named;

/// Connections that wait to be accepted. Where this many are too few, clients are told nothing and ask again a second
/// later; the kernel's own bound (net.core.somaxconn) is this by default.
const BACKLOG: i32 = 4096;

/// Listening sockets that this process was given, and those it listens on.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    given: Vec<Given>,
    queued: bool,
    /// For a successor: copies of what has been taken.
    taken: Vec<Named>,
}

#[derive(Debug)]
struct Given {
    name: String,
    listener: TcpListener,
    by: Giver,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Giver {
    /// systemd and its like (`sd_listen_fds(3)`): the operator has written down what each is for.
    Manager,
    /// The process that served before, perhaps with another configuration.
    Predecessor,
}

impl Listeners {
    /// Those of the service manager, if it passed any. To be called once, before there are threads.
    pub(crate) fn from_manager() -> Result<Self, Failure> {
        let own = std::process::id().to_string();
        if std::env::var("LISTEN_PID").ok() != Some(own) {
            return Ok(Self::default());
        }
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':').map(str::to_owned);
        let mut passed = ListenFd::from_env();
        let mut listeners = Self::default();
        for index in 0..passed.len() {
            let name = names.next().unwrap_or_default();
            let unusable = |error: &io::Error| {
                Failure::new(format!(
                    "the service manager's socket `{name}` is none to accept connections on"
                ))
                .because(error)
                .hint("use ListenStream= with an address and a port")
            };
            let Some(listener) = passed.take_tcp_listener(index).map_err(|error| unusable(&error))? else {
                continue;
            };
            if !socket_acceptconn(&listener).is_ok_and(|listens| listens) {
                return Err(unusable(&io::Error::other("it does not listen")));
            }
            listeners.given.push(Given { name, listener, by: Giver::Manager });
            listeners.queued = true;
        }
        Ok(listeners)
    }

    /// Whether the service manager's sockets are among them, at which clients may wait already.
    pub(crate) fn queued(&self) -> bool {
        self.queued
    }

    /// Adds those of the process that served before.
    pub(crate) fn add_predecessors(&mut self, listeners: Vec<Named>) {
        let given =
            listeners.into_iter().map(|(name, listener)| Given { name, listener, by: Giver::Predecessor });
        self.given.extend(given);
    }

    /// The socket that was given as `name`, or a new one. `what` and `key` as in [`tcp`].
    pub(crate) fn tcp(
        &mut self,
        name: &str,
        what: &str,
        key: &str,
        address: SocketAddr,
    ) -> Result<TcpListener, Failure> {
        let listener = match self.take(name, what, key, address)? {
            Some(listener) => listener,
            None => tcp(what, key, address)?,
        };
        let copy = listener.try_clone().map_err(|error| refused(what, key, address, &error))?;
        self.taken.push((name.to_owned(), copy));
        Ok(listener)
    }

    fn take(
        &mut self,
        name: &str,
        what: &str,
        key: &str,
        address: SocketAddr,
    ) -> Result<Option<TcpListener>, Failure> {
        while let Some(index) = self.given.iter().position(|given| given.name == name) {
            let Given { listener, by, .. } = self.given.swap_remove(index);
            let at = listener.local_addr().ok();
            if at == Some(address) {
                return Ok(Some(listener));
            }
            // A predecessor's configuration may have been another; what the operator wrote may not differ.
            if by == Giver::Manager {
                let at = at.map_or_else(|| "no address".to_owned(), |at| at.to_string());
                let message = format!("{what} is to listen on {address}, and its socket `{name}` is on {at}");
                return Err(Failure::invalid(message).hint(format!(
                    "write the same address in the socket unit's ListenStream= and in {key}"
                )));
            }
        }
        Ok(None)
    }

    /// An error if the service manager passed what nobody wanted.
    pub(crate) fn all_wanted(&self) -> Result<(), Failure> {
        for Given { name, by, .. } in &self.given {
            if *by == Giver::Manager {
                let known: Vec<&str> = self.taken.iter().map(|(name, _)| name.as_str()).collect();
                return Err(Failure::invalid(format!("nothing here listens on the socket `{name}`"))
                    .hint(format!("FileDescriptorName= in a socket unit is one of {}", known.join(", "))));
            }
            tracing::info!(name, "the predecessor's listener is not wanted any more");
        }
        Ok(())
    }

    /// What is listened on now, for a successor.
    pub(crate) fn taken(self) -> Vec<Named> {
        self.taken
    }
}

/// Binds `address`, before anything is started, for `what`, such as "the gateway"; `key` is where mesh.toml sets it.
pub(crate) fn tcp(what: &str, key: &str, address: SocketAddr) -> Result<TcpListener, Failure> {
    listen(address).map_err(|error| refused(what, key, address, &error))
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Connections of the process before may linger: that must not keep this one from starting.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    if address.ip().is_loopback() {
        sidecar::unpaced(&socket);
    }
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Why `address` could not be bound.
pub(crate) fn refused(what: &str, key: &str, address: SocketAddr, error: &io::Error) -> Failure {
    let failure = Failure::new(format!("{what} cannot listen on {address}")).because(error);
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            let by = match holder(Path::new("/proc"), address) {
                Some(holder) => format!("port {} is held by {holder}", address.port()),
                None => {
                    format!("port {} is held by a process that this user may not look into", address.port())
                }
            };
            failure.hint(format!("{by}; end it, or set another address with {key}"))
        }
        io::ErrorKind::PermissionDenied => failure
            .hint(format!("ports below 1024 need CAP_NET_BIND_SERVICE; choose a higher one with {key}")),
        io::ErrorKind::AddrNotAvailable => failure
            .hint(format!("{} is no address of this machine; see `ip address`, then {key}", address.ip())),
        _ => failure,
    }
}

/// A process that has a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Holder {
    pid: u32,
    name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.name)
    }
}

/// The process that holds `address`, as far as `proc` (the proc file system) lets this user see.
fn holder(proc: &Path, address: SocketAddr) -> Option<Holder> {
    let inode = socket_inode(proc, address)?;
    let wanted = format!("socket:[{inode}]");
    let mut processes: Vec<u32> =
        fs::read_dir(proc).ok()?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    processes.sort_unstable();
    let pid = processes.into_iter().find(|pid| {
        let open = fs::read_dir(proc.join(pid.to_string()).join("fd")).into_iter().flatten().flatten();
        open.filter_map(|fd| fs::read_link(fd.path()).ok())
            .any(|target| target.as_os_str() == wanted.as_str())
    })?;
    let name = fs::read_to_string(proc.join(pid.to_string()).join("comm")).unwrap_or_default();
    Some(Holder { pid, name: name.trim_end().to_owned() })
}

/// The state of a socket that listens, in `/proc/net/tcp`.
const LISTENING: &str = "0A";

fn socket_inode(proc: &Path, address: SocketAddr) -> Option<u64> {
    let tables =
        ["net/tcp", "net/tcp6"].map(|table| fs::read_to_string(proc.join(table)).unwrap_or_default());
    let rows = || tables.iter().flat_map(|table| table.lines().skip(1)).filter_map(row);
    let at = |row: &Row| {
        let same = row.local.ip() == address.ip()
            || row.local.ip().is_unspecified()
            || address.ip().is_unspecified();
        row.local.port() == address.port() && same && row.inode != 0
    };
    // A listener first; else whoever uses the port as the near end of a connection.
    let listener = rows().find(|row| at(row) && row.listening);
    listener.or_else(|| rows().find(at)).map(|row| row.inode)
}

struct Row {
    local: SocketAddr,
    listening: bool,
    inode: u64,
}

fn row(line: &str) -> Option<Row> {
    let mut fields = line.split_whitespace();
    let local = socket_address(fields.nth(1)?)?;
    let listening = fields.nth(1)? == LISTENING;
    let inode = fields.nth(5)?.parse().ok()?;
    Some(Row { local, listening, inode })
}

/// An address as the kernel prints it: the words of the IP in host byte order, then the port.
fn socket_address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let words: Vec<u32> = ip
        .as_bytes()
        .chunks(8)
        .map(|word| u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok())
        .collect::<Option<_>>()?;
    let ip = match words.as_slice() {
        [word] => IpAddr::from(Ipv4Addr::from(word.to_ne_bytes())),
        [a, b, c, d] => {
            let mut bytes = [0; 16];
            let all = [a, b, c, d].into_iter().flat_map(|word| word.to_ne_bytes());
            bytes.iter_mut().zip(all).for_each(|(to, from)| *to = from);
            IpAddr::from(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(name: &str, by: Giver) -> (Listeners, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let given = vec![Given { name: name.into(), listener, by }];
        (Listeners { given, ..Listeners::default() }, address)
    }

    #[test]
    fn a_given_socket_is_used_instead_of_a_new_one() {
        for by in [Giver::Manager, Giver::Predecessor] {
            let (mut listeners, address) = given("inbound", by);
            // A new one could not be bound: the address is taken by the one that was given.
            let listener = listeners.tcp("inbound", "the sidecar", "inbound", address).unwrap();
            assert_eq!(listener.local_addr().unwrap(), address);
            listeners.all_wanted().unwrap();
            let kept = listeners.taken();
            assert_eq!((kept.len(), kept[0].0.as_str()), (1, "inbound"));
        }
    }

    #[test]
    fn a_managers_socket_elsewhere_is_a_mistake_and_a_predecessors_is_left() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (mut listeners, address) = given("admin", Giver::Manager);
        let failure = listeners.tcp("admin", "the admin port", "[service.web] admin", free).unwrap_err();
        let expected =
            format!("the admin port is to listen on {free}, and its socket `admin` is on {address}");
        assert_eq!(failure.message, expected);
        assert!(failure.hint.unwrap().contains("[service.web] admin"));

        let (mut listeners, _) = given("admin", Giver::Predecessor);
        let listener = listeners.tcp("admin", "the admin port", "", free).unwrap();
        assert_eq!(listener.local_addr().unwrap(), free);
    }

    #[test]
    fn what_the_manager_passed_for_nobody_is_a_mistake() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (mut listeners, _) = given("inbuond", Giver::Manager);
        listeners.tcp("inbound", "the sidecar", "", free).unwrap();
        let failure = listeners.all_wanted().unwrap_err();
        assert_eq!(failure.message, "nothing here listens on the socket `inbuond`");
        assert_eq!(failure.hint.unwrap().as_ref(), "FileDescriptorName= in a socket unit is one of inbound");
        assert!(given("old", Giver::Predecessor).0.all_wanted().is_ok());
    }

    #[test]
    fn a_taken_port_names_the_process_that_has_it_and_the_key_to_change() {
        let first = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = first.local_addr().unwrap();
        let failure = tcp("the gateway", "[gateway] listen", address).unwrap_err();
        assert_eq!(failure.message, format!("the gateway cannot listen on {address}"));
        let hint = failure.hint.unwrap();
        assert!(
            hint.contains(&format!("port {} is held by process {} (", address.port(), std::process::id())),
            "{hint}"
        );
        assert!(hint.ends_with("end it, or set another address with [gateway] listen"), "{hint}");
    }

    #[test]
    fn ipv6_wildcards_hold_ipv4_ports_too() {
        let line = "   1: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A \
                    00000000:00000000 00:00000000 00000000     0        0 4242 1 0000000000000000 100 0 0 10 0";
        let row = row(line).unwrap();
        assert_eq!((row.local.port(), row.listening, row.inode), (8080, true, 4242));
        assert!(row.local.ip().is_unspecified());
        assert_eq!(socket_address("0100007F:0050"), Some("127.0.0.1:80".parse().unwrap()));
        assert_eq!(socket_address("0100007F"), None);
        assert_eq!(socket_address("xyz:1"), None);
    }
}
