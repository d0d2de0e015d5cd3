//! Bytes that no decent client sends.

use std::time::Duration;

use identity::tls::{ALPN_H2, ALPN_HTTP11};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::World;

/// Bounds a hang.
const PATIENCE: Duration = Duration::from_secs(20);

/// What became of bytes that were sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// An answer with this status, and whether there is a receipt in it.
    Status(u16, bool),
    /// The stream or the connection was ended without one.
    Ended,
}

impl Told {
    /// 400 or 403, or nothing at all where the bytes are no request.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Status(400 | 403 | 404 | 405 | 505, _) | Self::Ended)
    }
}

/// Sends these bytes as web does over HTTP/1.1, and hears the answer to the first request.
pub(crate) async fn http1(world: &World, bytes: &[u8]) -> Told {
    let mut stream = world.connect(&world.authority.issue("/service/web"), ALPN_HTTP11).await;
    stream.write_all(bytes).await.unwrap();
    let mut heard = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut heard));
    let _reset = read.await.expect("neither an answer nor an end");
    let text = String::from_utf8_lossy(&heard);
    let status = text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    status.map_or(Told::Ended, |status| Told::Status(status, text.contains("\"receipt\"")))
}

/// A header block that is not compressed (RFC 7541 §6.2.2).
fn block(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            put_length(&mut block, text.len());
            block.extend_from_slice(text);
        }
    }
    block
}

/// An integer with a prefix of seven bits (RFC 7541 §5.1).
fn put_length(block: &mut Vec<u8>, mut length: usize) {
    if length < 127 {
        return block.push(length as u8);
    }
    block.push(127);
    length -= 127;
    while length >= 128 {
        block.push((length % 128) as u8 | 128);
        length /= 128;
    }
    block.push(length as u8);
}

pub(crate) fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[..], &[kind, flags, 0, 0, 0, stream], payload].concat()
}

/// Sends a request of these fields, and of this body if there is any, as web does over HTTP/2, and hears what becomes of it.
pub(crate) async fn http2(world: &World, fields: &[(&[u8], &[u8])], body: &[u8]) -> Told {
    let mut stream = world.connect(&world.authority.issue("/service/web"), ALPN_H2).await;
    let begin = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[])].concat();
    // HEADERS, with END_STREAM where no DATA follows.
    let request = match body {
        [] => frame(1, 5, 1, &block(fields)),
        body => [frame(1, 4, 1, &block(fields)), frame(0, 1, 1, body)].concat(),
    };
    stream.write_all(&[begin, request].concat()).await.unwrap();
    let heard = async {
        let mut head = [0; 9];
        while stream.read_exact(&mut head).await.is_ok() {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; length];
            if stream.read_exact(&mut payload).await.is_err() {
                break;
            }
            match head[3] {
                1 => return Told::Status(status_of(&payload), false),
                3 | 7 => break,
                4 if head[4] & 1 == 0 => stream.write_all(&frame(4, 1, 0, &[])).await.unwrap(),
                _ => {}
            }
        }
        Told::Ended
    };
    tokio::time::timeout(PATIENCE, heard).await.expect("neither an answer nor an end")
}

/// The `:status` that a header block begins with: of the static table (RFC 7541 appendix A), or 403.
fn status_of(block: &[u8]) -> u16 {
    match block[0] {
        0x88 => 200,
        0x8c => 400,
        0x8d => 404,
        0x8e => 500,
        _ => 403,
    }
}
