//! Listening, and naming who is in the way when an address is taken.

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;

use crate::failure::Failure;

/// Binds `address`, before anything is started, for `what`, such as "the gateway"; `key` is where mesh.toml sets it.
pub(crate) fn tcp(what: &str, key: &str, address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).map_err(|error| refused(what, key, address, &error))
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
