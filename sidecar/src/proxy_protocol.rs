//! PROXY protocol, versions 1 and 2, on its way in: where a connection came from before the proxy in front of us.
//!
//! Source: the specification of HAProxy (`doc/proxy-protocol.txt`, 2020/03/05). A listener is told to expect it, and
//! then every connection has a header, from an address that was configured: a header that anybody may write
//! proves nothing. Strict: one spelling of addresses and ports, nothing unknown, bounded.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use identity::clock::SharedClock;
use thiserror::Error;

use crate::tcp::Stream;

/// Longest v1 header, its end of line included (§2.1).
const MAX_V1_BYTES: usize = 107;
/// Longest v2 header that is taken: the addresses, and 4 KiB of what follows them.
const MAX_V2_BYTES: usize = V2_HEAD_BYTES + UNIX_BYTES + 4096;
/// Signature, version and command, family, length (§2.2).
const V2_HEAD_BYTES: usize = 16;
const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
const V1_SIGNATURE: &[u8] = b"PROXY ";
/// Two Unix paths of 108 bytes.
const UNIX_BYTES: usize = 216;
/// Type of the checksum among what follows the addresses (§2.2.3).
const CRC32C_TYPE: u8 = 0x03;
/// A proxy sends its header with the first packet.
const HEADER_TIMEOUT: Duration = Duration::from_secs(3);

/// What a header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Header {
    /// The proxy's own connection, such as a health check, or one of which it knows no more than we do.
    Local,
    /// A TCP connection that came to the proxy.
    Tcp {
        /// From here.
        source: SocketAddr,
        /// To here.
        destination: SocketAddr,
    },
    /// A connection over a Unix socket of the proxy's machine; the paths mean nothing on ours.
    Unix,
}

/// What the bytes so far are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// The beginning of a header.
    NeedMore,
    /// A whole header and its length in bytes; what follows belongs to the connection.
    Whole(Header, usize),
}

/// Why there is no header to believe.
#[derive(Debug, Error)]
pub enum ProxyError {
    /// The connection comes from an address that may not say where others come from.
    #[error("{0} is not a proxy that is trusted")]
    Untrusted(IpAddr),
    /// The bytes are no header.
    #[error("no PROXY protocol header: {0}")]
    Malformed(&'static str),
    /// It did not come in time.
    #[error("no PROXY protocol header in time")]
    Timeout,
    /// The connection failed or ended.
    #[error("the connection ended before its PROXY protocol header: {0}")]
    Io(#[from] io::Error),
}

/// Reads one header from the beginning of `bytes`.
pub fn parse(bytes: &[u8]) -> Result<Parsed, ProxyError> {
    if begins(bytes, V2_SIGNATURE) {
        parse_v2(bytes)
    } else if begins(bytes, V1_SIGNATURE) {
        parse_v1(bytes)
    } else {
        Err(ProxyError::Malformed("neither version's first bytes"))
    }
}

/// Takes the header off a connection from `remote` and says where it came from: `remote` itself, where the header
/// tells nothing better.
pub async fn accept(
    stream: &mut Stream,
    remote: SocketAddr,
    trusted: &Networks,
    clock: &SharedClock,
) -> Result<SocketAddr, ProxyError> {
    if !trusted.contain(remote.ip()) {
        return Err(ProxyError::Untrusted(remote.ip()));
    }
    let mut enough = clock.sleep(HEADER_TIMEOUT);
    loop {
        if let Parsed::Whole(header, length) = parse(stream.unread())? {
            stream.take(length);
            return Ok(match header {
                Header::Tcp { source, .. } => source,
                Header::Local | Header::Unix => remote,
            });
        }
        tokio::select! {
            more = stream.read_more(MAX_V2_BYTES) => if !more? {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            },
            () = &mut enough => return Err(ProxyError::Timeout),
        }
    }
}

/// Whether `bytes` begin, or may go on to begin, with `signature`.
fn begins(bytes: &[u8], signature: &[u8]) -> bool {
    bytes.starts_with(signature) || signature.starts_with(bytes)
}

fn parse_v1(bytes: &[u8]) -> Result<Parsed, ProxyError> {
    let seen = bytes.get(..bytes.len().min(MAX_V1_BYTES)).unwrap_or_default();
    let Some(end) = seen.windows(2).position(|two| two == b"\r\n") else {
        if seen.len() == MAX_V1_BYTES {
            return Err(ProxyError::Malformed("the line is too long"));
        }
        return Ok(Parsed::NeedMore);
    };
    let line = seen.get(..end).unwrap_or_default();
    let line = std::str::from_utf8(line).map_err(|_| ProxyError::Malformed("the line is not text"))?;
    let mut words = line.split(' ');
    let header = match (words.next(), words.next()) {
        // Whatever it says then is to be ignored (§2.1).
        (Some("PROXY"), Some("UNKNOWN")) => Header::Local,
        (Some("PROXY"), Some("TCP4")) => v1_addresses::<Ipv4Addr>(words)?,
        (Some("PROXY"), Some("TCP6")) => v1_addresses::<Ipv6Addr>(words)?,
        _ => return Err(ProxyError::Malformed("neither TCP4, TCP6 nor UNKNOWN")),
    };
    Ok(Parsed::Whole(header, end + 2))
}

fn v1_addresses<'a, A: FromStr + Into<IpAddr>>(
    mut words: impl Iterator<Item = &'a str>,
) -> Result<Header, ProxyError> {
    let mut address = || words.next()?.parse::<A>().ok().map(Into::into);
    let (source, destination) = (address(), address());
    let mut port = || {
        let word = words.next()?;
        let plain = word.bytes().all(|byte| byte.is_ascii_digit()) && (word == "0" || !word.starts_with('0'));
        if plain { word.parse::<u16>().ok() } else { None }
    };
    let (source_port, destination_port) = (port(), port());
    match (source, destination, source_port, destination_port, words.next()) {
        (Some(source), Some(destination), Some(from), Some(to), None) => Ok(Header::Tcp {
            source: SocketAddr::new(source, from),
            destination: SocketAddr::new(destination, to),
        }),
        _ => Err(ProxyError::Malformed("two addresses and two ports of one family, one space apart")),
    }
}

fn parse_v2(bytes: &[u8]) -> Result<Parsed, ProxyError> {
    let Some((head, _)) = bytes.split_first_chunk::<V2_HEAD_BYTES>() else { return Ok(Parsed::NeedMore) };
    let [.., version_and_command, family, high, low] = *head;
    let length = V2_HEAD_BYTES + usize::from(u16::from_be_bytes([high, low]));
    if version_and_command >> 4 != 2 {
        return Err(ProxyError::Malformed("not version 2"));
    }
    if length > MAX_V2_BYTES {
        return Err(ProxyError::Malformed("longer than is taken"));
    }
    let Some(whole) = bytes.get(..length) else { return Ok(Parsed::NeedMore) };
    let body = whole.get(V2_HEAD_BYTES..).unwrap_or_default();
    let header = match (version_and_command & 0xf, family) {
        // The receiver uses the connection's own addresses (§2.2).
        (0, _) => Header::Local,
        (1, 0x00) => {
            check_extensions(whole, body)?;
            Header::Local
        }
        (1, 0x11) => {
            let (addresses, extensions) = body.split_first_chunk::<12>().ok_or(SHORT)?;
            check_extensions(whole, extensions)?;
            let [a, b, c, d, e, f, g, h, ports @ ..] = *addresses;
            tcp(Ipv4Addr::new(a, b, c, d).into(), Ipv4Addr::new(e, f, g, h).into(), ports)
        }
        (1, 0x21) => {
            let (source, rest) = body.split_first_chunk::<16>().ok_or(SHORT)?;
            let (destination, rest) = rest.split_first_chunk::<16>().ok_or(SHORT)?;
            let (ports, extensions) = rest.split_first_chunk::<4>().ok_or(SHORT)?;
            check_extensions(whole, extensions)?;
            tcp(Ipv6Addr::from(*source).into(), Ipv6Addr::from(*destination).into(), *ports)
        }
        (1, 0x31) => {
            let (_, extensions) = body.split_first_chunk::<UNIX_BYTES>().ok_or(SHORT)?;
            check_extensions(whole, extensions)?;
            Header::Unix
        }
        (1, 0x12 | 0x22 | 0x32) => return Err(ProxyError::Malformed("datagrams")),
        (1, _) => return Err(ProxyError::Malformed("an unknown family")),
        _ => return Err(ProxyError::Malformed("an unknown command")),
    };
    Ok(Parsed::Whole(header, length))
}

const SHORT: ProxyError = ProxyError::Malformed("shorter than its addresses");

fn tcp(source: IpAddr, destination: IpAddr, ports: [u8; 4]) -> Header {
    let [a, b, c, d] = ports;
    Header::Tcp {
        source: SocketAddr::new(source, u16::from_be_bytes([a, b])),
        destination: SocketAddr::new(destination, u16::from_be_bytes([c, d])),
    }
}

/// What follows the addresses has to be whole, and its checksum, if there is one, right.
fn check_extensions(whole: &[u8], mut extensions: &[u8]) -> Result<(), ProxyError> {
    const CUT: ProxyError = ProxyError::Malformed("what follows the addresses is cut short");
    while let Some((&[kind, high, low], rest)) = extensions.split_first_chunk::<3>() {
        let (value, rest) = rest.split_at_checked(u16::from_be_bytes([high, low]).into()).ok_or(CUT)?;
        if kind == CRC32C_TYPE {
            let stated = value.first_chunk::<4>().filter(|_| value.len() == 4);
            let stated =
                u32::from_be_bytes(*stated.ok_or(ProxyError::Malformed("the checksum has four bytes"))?);
            let at = whole.len() - rest.len() - 4;
            // Computed over the header with the checksum itself as zeros (§2.2.3).
            let bytes =
                whole.iter().enumerate().map(|(i, byte)| if (at..at + 4).contains(&i) { 0 } else { *byte });
            if crc32c(bytes) != stated {
                return Err(ProxyError::Malformed("the checksum is wrong"));
            }
        }
        extensions = rest;
    }
    if extensions.is_empty() { Ok(()) } else { Err(CUT) }
}

/// CRC-32C (RFC 9260, appendix A). Bit by bit: headers are short and few carry one.
fn crc32c(bytes: impl Iterator<Item = u8>) -> u32 {
    !bytes.fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

/// A list of networks in CIDR notation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Networks(Vec<Network>);

/// A network, such as `10.0.0.0/8` or `2001:db8::/32`; a bare address is a network of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix_bits: u8,
}

/// Why a text is no network.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "`{0}` is not a network such as 10.0.0.0/8: an address, its host bits zero, a slash and the bits of the prefix"
)]
pub struct NetworkError(String);

impl Networks {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of them contains `address`; an IPv4 address mapped into IPv6 is the IPv4 address.
    pub fn contain(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(address))
    }

    /// Each of them, in the order they were given.
    pub fn iter(&self) -> impl Iterator<Item = &Network> {
        self.0.iter()
    }
}

impl FromIterator<Network> for Networks {
    fn from_iter<T: IntoIterator<Item = Network>>(networks: T) -> Self {
        Self(networks.into_iter().collect())
    }
}

impl Network {
    /// How many bits addresses in it share.
    pub fn prefix_bits(&self) -> u8 {
        self.prefix_bits
    }

    /// Whether it contains `address`.
    pub fn contains(&self, address: IpAddr) -> bool {
        let (own, own_bits) = bits(self.address);
        let (other, other_bits) = bits(address.to_canonical());
        own_bits == other_bits
            && (own ^ other).checked_shr(u32::from(own_bits - self.prefix_bits)).unwrap_or(0) == 0
    }
}

/// An address as a number, and how many bits it has.
fn bits(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(address) => (u32::from(address).into(), 32),
        IpAddr::V6(address) => (address.into(), 128),
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let error = || NetworkError(text.to_owned());
        let (address, prefix) =
            text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let address: IpAddr = address.parse().map_err(|_| error())?;
        let (number, most) = bits(address);
        let prefix_bits = match prefix {
            None => most,
            Some(text) if text == "0" || !text.starts_with(['0', '+']) => {
                text.parse().map_err(|_| error())?
            }
            Some(_) => return Err(error()),
        };
        let host_bits = u32::from(most.checked_sub(prefix_bits).ok_or_else(error)?);
        // Bits beyond the prefix would be ignored: a mistake, or a wider network than was meant.
        let host_mask = 1u128.checked_shl(host_bits).map_or(u128::MAX, |bit| bit - 1);
        if number & host_mask == 0 { Ok(Self { address, prefix_bits }) } else { Err(error()) }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

#[cfg(test)]
mod tests;
