//! Handing a process's listening sockets to its successor, so that an upgrade refuses and drops nothing.
//!
//! The process that serves waits at a Unix socket of mode 0600. Its successor, with the same configuration,
//! finds it there at its start, and they talk in messages (`SOCK_SEQPACKET`):
//!
//! | who | says | means |
//! |---|---|---|
//! | successor | `palisade handover 1` | give me your listeners |
//! | predecessor | `listener NAME`, with the descriptor (`SCM_RIGHTS`) | one each |
//! | predecessor | `end` | that was all of them |
//! | successor | `ready` | I have my identity and accept connections |
//! | predecessor | `yours` | I accept none any more: I drain and end |
//!
//! Both hold the listeners meanwhile, so that at no moment is a connection refused. Only the predecessor
//! accepts until the successor is ready; if the successor goes away before that, nothing has happened. Each
//! end makes sure, by `SO_PEERCRED`, that the other runs as the same user.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use identity::Scope;
use identity::clock::SharedClock;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_acceptconn, socket_peercred};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, recvmsg,
    sendmsg, socket_with,
};
use rustix::process::geteuid;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

use crate::failure::Failure;

const HELLO: &str = "palisade handover 1";
const LISTENER: &str = "listener ";
const END: &str = "end";
const READY: &str = "ready";
const YOURS: &str = "yours";

/// Longest message: a name is one of a service, and those are DNS labels.
const MAX_MESSAGE_BYTES: usize = 512;
/// Most listeners of one process: more than a service calls others.
const MAX_LISTENERS: usize = 4096;
/// For one answer of the other end while neither waits for anything else.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a successor may take to get ready: an agent that restarts too is back by then. Until then a
/// further successor has to wait.
pub(crate) const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// A successor that is stopped rather than slow must not keep others from coming.
const PATIENCE: Duration = Duration::from_secs(90);
/// Pause after a failure to accept, such as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
const BACKLOG: i32 = 8;

/// A listening socket and what it is for: `inbound`, `admin`, `outbound.NAME`.
pub(crate) type Named = (String, TcpListener);

/// The process that serves now and ends once it hears that we are ready.
#[derive(Debug)]
pub(crate) struct Predecessor(OwnedFd);

/// Asks the process at `path`, if there is one, for its listeners.
pub(crate) fn ask(path: &Path) -> Result<Option<(Predecessor, Vec<Named>)>, Failure> {
    let failed = |error: io::Error| {
        Failure::new(format!("the sidecar that serves now does not hand over at {}", path.display()))
            .because(&error)
            .hint("it may be handing over to another successor; it serves on")
    };
    let Some(socket) = reach(path).map_err(failed)? else { return Ok(None) };
    let listeners = receive_listeners(&socket).map_err(failed)?;
    Ok(Some((Predecessor(socket), listeners)))
}

/// Connects; nobody there is no error, and a socket that was left behind is nobody.
fn reach(path: &Path) -> io::Result<Option<OwnedFd>> {
    let socket = seqpacket(SocketFlags::CLOEXEC)?;
    for side in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, side, Some(ANSWER_TIMEOUT))?;
    }
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => {}
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    same_user(socket.as_fd())?;
    Ok(Some(socket))
}

fn receive_listeners(socket: &OwnedFd) -> io::Result<Vec<Named>> {
    send(socket.as_fd(), HELLO, None)?;
    let mut listeners = Vec::new();
    while listeners.len() < MAX_LISTENERS {
        match receive(socket.as_fd())? {
            (text, Some(descriptor)) => {
                let name = text.strip_prefix(LISTENER).ok_or_else(unexpected)?;
                if !socket_acceptconn(&descriptor)? {
                    return Err(io::Error::other("a socket that does not listen was handed over"));
                }
                listeners.push((name.to_owned(), TcpListener::from(descriptor)));
            }
            (text, None) if text == END => return Ok(listeners),
            (_, None) => return Err(unexpected()),
        }
    }
    Err(io::Error::other("too many listeners"))
}

impl Predecessor {
    /// Tells it that we are ready, and waits until it accepts no connections any more. One that is gone
    /// meanwhile has nothing to be told.
    pub(crate) async fn relieve(self, clock: &SharedClock) {
        let said = async {
            let socket = asynchronous(self.0)?;
            socket.async_io(Interest::WRITABLE, || send(socket.as_fd(), READY, None)).await?;
            let (text, _) = socket.async_io(Interest::READABLE, || receive(socket.as_fd())).await?;
            if text == YOURS { Ok(()) } else { Err(unexpected()) }
        };
        tokio::select! {
            said = said => match said {
                Ok(()) => tracing::info!("the predecessor drains"),
                Err(error) => tracing::warn!(%error, "the predecessor is gone already"),
            },
            () = clock.sleep(ANSWER_TIMEOUT) => tracing::warn!("the predecessor does not answer"),
        }
    }
}

/// Waits at `path` for a successor, as a task of `scope`, and gives it `listeners`. Once it is ready the
/// scope drains.
///
/// Takes the place of whoever waited at `path` before; to be called when that one has handed over or is gone.
pub(crate) fn offer(
    path: &Path,
    listeners: Vec<Named>,
    clock: SharedClock,
    scope: &Scope,
) -> Result<(), Failure> {
    let failed = |error: io::Error| {
        Failure::new(format!("a successor cannot be waited for at {}", path.display()))
            .because(&error)
            .hint("--handover names a socket in a directory that only this user writes to, such as $RUNTIME_DIRECTORY")
    };
    let place = Place::take(path).map_err(failed)?;
    let waiting = Waiting { listeners, clock, scope: scope.clone() };
    scope.spawn_critical("hand-over", waiting.wait(place));
    Ok(())
}

/// Where a successor comes to.
struct Place {
    path: PathBuf,
    /// Device and inode, by which a successor's socket at the same path is told from ours.
    file: (u64, u64),
    socket: UnixListener,
}

impl Place {
    fn take(path: &Path) -> io::Result<Self> {
        // Made elsewhere and moved: the path is never without a socket, nor with one of other permissions.
        let mut made = path.to_owned().into_os_string();
        made.push(format!(".{}", std::process::id()));
        let made = PathBuf::from(made);
        let socket = seqpacket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        match std::fs::remove_file(&made) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        bind(&socket, &SocketAddrUnix::new(&made)?)?;
        std::fs::set_permissions(&made, std::fs::Permissions::from_mode(0o600))?;
        listen(&socket, BACKLOG)?;
        std::fs::rename(&made, path)?;
        Ok(Self {
            path: path.to_owned(),
            file: identify(path)?,
            socket: UnixListener::from_std(socket.into())?,
        })
    }

    async fn next(&self) -> io::Result<UnixStream> {
        self.socket.accept().await.map(|(successor, _)| successor)
    }

    fn leave(self) {
        if identify(&self.path).is_ok_and(|file| file == self.file)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "the hand-over socket is left behind");
        }
    }
}

fn identify(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

struct Waiting {
    listeners: Vec<Named>,
    clock: SharedClock,
    scope: Scope,
}

impl Waiting {
    async fn wait(self, place: Place) {
        loop {
            let outcome = tokio::select! {
                outcome = self.serve_one(&place) => outcome,
                // Our copies of the listeners go too: nothing may queue where nobody accepts.
                () = self.scope.draining() => return place.leave(),
            };
            match outcome {
                Ok(()) => {
                    tracing::info!("handed over to a successor; draining");
                    self.scope.drain();
                    return;
                }
                Err(error) => tracing::warn!(%error, "a successor did not take over; serving on"),
            }
        }
    }

    async fn serve_one(&self, place: &Place) -> io::Result<()> {
        let successor = match place.next().await {
            Ok(successor) => successor,
            Err(error) => {
                self.clock.sleep(ACCEPT_PAUSE).await;
                return Err(error);
            }
        };
        tokio::select! {
            outcome = self.hand_over(&successor) => outcome,
            () = self.clock.sleep(PATIENCE) => Err(io::Error::other("it did not get ready in time")),
        }
    }

    async fn hand_over(&self, successor: &UnixStream) -> io::Result<()> {
        same_user(successor.as_fd())?;
        let say = async |text: &str, descriptor: Option<&TcpListener>| {
            let descriptor = descriptor.map(TcpListener::as_fd);
            successor.async_io(Interest::WRITABLE, || send(successor.as_fd(), text, descriptor)).await
        };
        let hear = async || {
            let (text, _) = successor.async_io(Interest::READABLE, || receive(successor.as_fd())).await?;
            Ok::<_, io::Error>(text)
        };
        if hear().await? != HELLO {
            return Err(unexpected());
        }
        for (name, listener) in &self.listeners {
            say(&format!("{LISTENER}{name}"), Some(listener)).await?;
        }
        say(END, None).await?;
        tracing::info!("a successor has the listeners; serving until it is ready");
        if hear().await? != READY {
            return Err(unexpected());
        }
        // It accepts by now, whether it hears this or not.
        if let Err(error) = say(YOURS, None).await {
            tracing::warn!(%error, "the successor could not be told");
        }
        Ok(())
    }
}

/// tokio's streams do no more than wait until a descriptor is ready: one of messages serves as well.
fn asynchronous(socket: OwnedFd) -> io::Result<UnixStream> {
    let socket = std::os::unix::net::UnixStream::from(socket);
    socket.set_nonblocking(true)?;
    UnixStream::from_std(socket)
}

fn seqpacket(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

fn same_user(socket: BorrowedFd<'_>) -> io::Result<()> {
    if socket_peercred(socket)?.uid == geteuid() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "the other end runs as another user"))
}

fn unexpected() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the other end speaks another protocol")
}

fn send(socket: BorrowedFd<'_>, text: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.map(|descriptor| [descriptor]);
    if let Some(descriptors) = &descriptors
        && !control.push(SendAncillaryMessage::ScmRights(descriptors))
    {
        return Err(io::Error::other("no room for a descriptor"));
    }
    sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// One message and the descriptor that came with it. The end of the stream is an error.
fn receive(socket: BorrowedFd<'_>) -> io::Result<(String, Option<OwnedFd>)> {
    let mut bytes = [0; MAX_MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    // Taken out in any case, so that what is refused below is closed.
    let descriptors: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) || descriptors.len() > 1 {
        return Err(unexpected());
    }
    let text = bytes.get(..received.bytes).and_then(|bytes| std::str::from_utf8(bytes).ok());
    Ok((text.ok_or_else(unexpected)?.to_owned(), descriptors.into_iter().next()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    use identity::SystemClock;

    use super::*;

    const PATIENT: Duration = Duration::from_secs(20);

    fn listener(name: &str) -> Named {
        (name.to_owned(), TcpListener::bind("127.0.0.1:0").unwrap())
    }

    fn copies(listeners: &[Named]) -> Vec<Named> {
        listeners.iter().map(|(name, listener)| (name.clone(), listener.try_clone().unwrap())).collect()
    }

    async fn asked(path: &Path) -> Option<(Predecessor, Vec<Named>)> {
        let path = path.to_owned();
        tokio::task::spawn_blocking(move || ask(&path).unwrap()).await.unwrap()
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn listeners_change_hands_and_only_a_ready_successor_ends_the_predecessor() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("handover.sock");
        assert!(asked(&path).await.is_none(), "nobody is there");

        let given = [listener("inbound"), listener("outbound.echo")];
        let first = Scope::new();
        offer(&path, copies(&given), SystemClock::shared(), &first).unwrap();
        assert_eq!(mode(&path), 0o600);

        // A successor that goes away before it is ready changes nothing.
        let (gone, _) = asked(&path).await.unwrap();
        drop(gone);
        let (predecessor, received) = asked(&path).await.unwrap();
        assert!(!first.is_draining());
        let names: Vec<&str> = received.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["inbound", "outbound.echo"]);

        // The very same sockets: what connects to the first's is accepted by the second's.
        let mut client = TcpStream::connect(given[0].1.local_addr().unwrap()).unwrap();
        client.write_all(b"x").unwrap();
        let (mut accepted, _) = received[0].1.accept().unwrap();
        let mut byte = [0];
        accepted.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");

        predecessor.relieve(&SystemClock::shared()).await;
        tokio::time::timeout(PATIENT, first.draining()).await.unwrap();
        assert_eq!(first.finished(PATIENT).await, Ok(()));

        // The second waits in its turn and leaves nothing behind.
        let second = Scope::new();
        offer(&path, received, SystemClock::shared(), &second).unwrap();
        let before = identify(&path).unwrap();
        let third = Scope::new();
        offer(&path, copies(&given), SystemClock::shared(), &third).unwrap();
        assert_ne!(identify(&path).unwrap(), before);
        second.drain();
        assert_eq!(second.finished(PATIENT).await, Ok(()));
        assert!(path.exists(), "it is the third's by now");
        third.drain();
        assert_eq!(third.finished(PATIENT).await, Ok(()));
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_socket_that_was_left_behind_is_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("handover.sock");
        let socket = seqpacket(SocketFlags::CLOEXEC).unwrap();
        bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        drop(socket);
        assert!(path.exists() && asked(&path).await.is_none());
        let scope = Scope::new();
        offer(&path, Vec::new(), SystemClock::shared(), &scope).unwrap();
        assert!(asked(&path).await.is_some());
        scope.drain();
        assert_eq!(scope.finished(PATIENT).await, Ok(()));
    }

    #[tokio::test]
    async fn who_speaks_otherwise_gets_nothing_and_harms_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("handover.sock");
        let scope = Scope::new();
        offer(&path, vec![listener("inbound")], SystemClock::shared(), &scope).unwrap();
        for word in ["palisade handover 2", READY, &"x".repeat(2 * MAX_MESSAGE_BYTES)] {
            let stranger = reach(&path).unwrap().unwrap();
            send(stranger.as_fd(), word, None).unwrap();
            let heard = tokio::task::spawn_blocking(move || receive(stranger.as_fd())).await.unwrap();
            assert_eq!(heard.unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{word}");
        }
        assert!(!scope.is_draining());
        assert!(asked(&path).await.is_some());
        scope.drain();
        assert_eq!(scope.finished(PATIENT).await, Ok(()));
    }

    #[test]
    fn a_socket_that_does_not_listen_is_not_taken_over() {
        let (near, far) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(server.local_addr().unwrap()).unwrap();
        send(far.as_fd(), &format!("{LISTENER}inbound"), Some(stream.as_fd())).unwrap();
        let error = receive_listeners(&near).unwrap_err();
        assert_eq!(error.to_string(), "a socket that does not listen was handed over");
    }
}
