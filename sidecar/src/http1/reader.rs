//! The reading half of a connection: what has arrived and is not understood yet.

use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::Frame;
use tokio::io::{AsyncRead, AsyncReadExt as _, ReadBuf};

use super::decode::{BodyError, Decoder, Part};
use super::head::Length;
use super::pace::{Pace, Timer};

/// What a read of a body that fills every buffer grows to. Each stream that its peer does not take holds as much.
const MAX_READ_BYTES: usize = 32 * 1024;
/// Read without a buffer of the connection's own while it has been idle for long.
const PROBE_BYTES: usize = 512;

/// A half that is read from, and its bytes.
///
/// A read makes room for more than a message usually has, so that it is short, and by that says to the
/// runtime that nothing more is there: the next one waits for its event instead of asking the kernel.
#[derive(Debug)]
pub(super) struct Reader<R> {
    pub(super) io: R,
    pub(super) bytes: BytesMut,
    pub(super) timer: Timer,
    first_room: usize,
    room: usize,
    lean: bool,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub(super) fn new(io: R, first_room: usize) -> Self {
        Self {
            io,
            bytes: BytesMut::new(),
            timer: Timer::default(),
            first_room,
            room: first_room,
            lean: false,
        }
    }

    /// Reads what is there; zero is the peer's end.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.lean {
            return self.poll_probe(cx);
        }
        if self.spare() < self.room / 4 {
            self.bytes.reserve(self.room);
        }
        let spare = self.spare();
        let read = ready!(pin!(self.io.read_buf(&mut self.bytes)).poll(cx))?;
        if read == spare {
            self.room = (self.room * 2).min(MAX_READ_BYTES);
        }
        Poll::Ready(Ok(read))
    }

    fn poll_probe(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut probe = [0; PROBE_BYTES];
        let mut probe = ReadBuf::new(&mut probe);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut probe))?;
        self.bytes.reserve(self.room);
        self.bytes.extend_from_slice(probe.filled());
        self.lean = false;
        Poll::Ready(Ok(probe.filled().len()))
    }

    /// Reads until `wanted` bytes are here, or the peer ends.
    pub(super) async fn fill(&mut self, wanted: usize, pacing: Pacing) -> Result<(), BodyError> {
        let mut pace = Pace::default();
        while self.bytes.len() < wanted {
            let read = poll_fn(|cx| match self.poll_fill(cx) {
                Poll::Ready(read) => Poll::Ready(read.map_err(BodyError::Io)),
                Poll::Pending if pacing == Pacing::Never => Poll::Pending,
                Poll::Pending => pace.poll_too_slow(&mut self.timer, cx).map(|()| Err(BodyError::Slow)),
            });
            match read.await? {
                0 => return Err(BodyError::Cut),
                read => pace.moved(read),
            }
        }
        Ok(())
    }

    /// Makes ready for a new message: reclaims the memory that earlier ones have let go, and allocates only
    /// while they still hold it.
    pub(super) fn rewind(&mut self) {
        self.room = self.first_room;
        if !self.lean {
            self.bytes.reserve(self.room);
        }
    }

    /// Gives the buffer back, until something arrives again. Nothing may be in it.
    pub(super) fn release(&mut self) {
        self.bytes = BytesMut::new();
        self.lean = true;
    }

    fn spare(&self) -> usize {
        self.bytes.capacity() - self.bytes.len()
    }
}

/// A body that has arrived whole, or what is needed to read the rest of it.
pub(super) enum Arrived {
    Whole(Bytes),
    Partly(Incoming),
}

/// A body on its way in: what was taken out of the connection's bytes, and how the rest is.
#[derive(Debug)]
pub(super) struct Incoming {
    decoder: Decoder,
    first: Bytes,
    trailers: Option<HeaderMap>,
    pace: Pace,
}

impl Incoming {
    /// What follows a switch of protocols: none of it is taken yet.
    pub(super) fn raw() -> Self {
        Self {
            decoder: Decoder::new(Length::UntilClose),
            first: Bytes::new(),
            trailers: None,
            pace: Pace::default(),
        }
    }

    /// Takes what is here of a body out of `bytes`.
    pub(super) fn begin(length: Length, bytes: &mut BytesMut) -> Result<Arrived, BodyError> {
        let mut decoder = Decoder::new(length);
        let mut first = Bytes::new();
        let mut trailers = None;
        loop {
            match decoder.next(bytes)? {
                Part::Data(data) if first.is_empty() => first = data,
                Part::Data(data) => {
                    let mut joined = first.try_into_mut().unwrap_or_else(|first| BytesMut::from(&*first));
                    joined.extend_from_slice(&data);
                    first = joined.freeze();
                }
                Part::Trailers(fields) => {
                    trailers = Some(fields);
                    break;
                }
                Part::End => return Ok(Arrived::Whole(first)),
                Part::Wanting => break,
            }
        }
        Ok(Arrived::Partly(Self { decoder, first, trailers, pace: Pace::default() }))
    }

    /// The next frame.
    pub(super) fn poll_frame<R: AsyncRead + Unpin>(
        &mut self,
        reader: &mut Reader<R>,
        pacing: Pacing,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.first.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.first)))));
        }
        if let Some(trailers) = self.trailers.take() {
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        loop {
            match self.decoder.next(&mut reader.bytes) {
                Err(error) => return Poll::Ready(Some(Err(error))),
                Ok(Part::Data(data)) => {
                    self.decoder.settle(&mut reader.bytes);
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Ok(Part::Trailers(trailers)) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Ok(Part::End) => return Poll::Ready(None),
                Ok(Part::Wanting) => {}
            }
            match reader.poll_fill(cx) {
                Poll::Ready(Ok(0)) => {
                    if let Err(error) = self.decoder.closed() {
                        return Poll::Ready(Some(Err(error)));
                    }
                }
                Poll::Ready(Ok(read)) => self.pace.moved(read),
                Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(BodyError::Io(error)))),
                Poll::Pending => {
                    let held = match pacing {
                        Pacing::Always => true,
                        Pacing::Owed => self.decoder.is_owed(),
                        Pacing::Never => false,
                    };
                    if !held {
                        self.pace.pause();
                        return Poll::Pending;
                    }
                    ready!(self.pace.poll_too_slow(&mut reader.timer, cx));
                    return Poll::Ready(Some(Err(BodyError::Slow)));
                }
            }
        }
    }

    /// Whether all of it has been handed out.
    pub(super) fn is_done(&self) -> bool {
        self.first.is_empty() && self.trailers.is_none() && self.decoder.is_done()
    }

    /// Bytes still to come, where that is known and nothing comes after them.
    pub(super) fn left(&self) -> Option<u64> {
        if self.trailers.is_some() {
            // A body of a known length is sent with `Content-Length`, which has no place for them.
            return None;
        }
        self.decoder.left().map(|left| left.saturating_add(self.first.len() as u64))
    }
}

/// When a peer that is waited for is held to a minimum rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pacing {
    /// Whenever it is waited for.
    Always,
    /// Where it has announced bytes that it has not sent.
    Owed,
    /// Somebody else bounds the time.
    Never,
}
