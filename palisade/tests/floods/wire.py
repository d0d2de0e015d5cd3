"""Raw HTTP/2 for the scripts beside it: sockets, frames, header blocks. No check that a decent client makes.

A target is {"name", "port", "tls", "tunnel", "pid"}: a port of a sidecar on this machine, whether it speaks mTLS, whether
what it takes are CONNECT tunnels to the authority `tunnel`, and the sidecar's process.
"""

import select
import socket
import ssl
import struct
import time

import hpack
from hyperframe import frame as frames

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# A busy machine and a debug build: this only bounds a hang.
PATIENCE_S = 20


class Wire:
    """One HTTP/2 connection, on which anything may be sent."""

    def __init__(self, target, folder, settings=None, greet=True):
        self.target = target
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        self.unread = b""
        self.ended = False
        stream = socket.create_connection(("127.0.0.1", target["port"]), timeout=PATIENCE_S)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = tls(stream, folder) if target["tls"] else stream
        if greet:
            self.send(PREFACE + frames.SettingsFrame(0, settings=settings or {}).serialize())

    def close(self):
        self.socket.close()

    def send(self, data, within_s=PATIENCE_S):
        """Whether all of it was taken: not if the other end has closed, or takes nothing more for so long."""
        until, view = time.monotonic() + within_s, memoryview(data)
        self.socket.settimeout(0.05)
        while view and not self.ended:
            try:
                view = view[self.socket.send(view[: 64 * 1024]):]
            except (TimeoutError, ssl.SSLWantWriteError):
                if time.monotonic() > until:
                    return False
            except OSError:
                self.ended = True
        return not self.ended

    def frames(self, until, within_s=PATIENCE_S):
        """What arrives, up to and with the first frame for which `until` holds, the end, or that time."""
        deadline = time.monotonic() + within_s
        while True:
            frame = self.next(deadline - time.monotonic())
            if frame is None:
                return
            yield frame
            if until(frame):
                return

    def next(self, within_s):
        """The next frame; nothing at the end, or after that time."""
        deadline = time.monotonic() + within_s
        while True:
            if len(self.unread) >= 9:
                frame, length = frames.Frame.parse_frame_header(memoryview(self.unread[:9]))
                if len(self.unread) >= 9 + length:
                    frame.parse_body(memoryview(self.unread[9: 9 + length]))
                    self.unread = self.unread[9 + length:]
                    return frame
            left = deadline - time.monotonic()
            if left <= 0 or not self.fill(left):
                return None

    def fill(self, within_s):
        """Whether something arrived; at the end of the connection `ended` is set."""
        if self.ended and not self.readable(0):
            return False
        if not self.readable(within_s):
            return False
        try:
            self.socket.settimeout(PATIENCE_S)
            data = self.socket.recv(65536)
        except OSError:
            data = b""
        self.ended = self.ended or not data
        self.unread += data
        return bool(data)

    def readable(self, within_s):
        if self.target["tls"] and self.socket.pending():
            return True
        return bool(select.select([self.socket], [], [], max(0, within_s))[0])

    def drain(self, within_s=PATIENCE_S):
        """The reasons of GOAWAY and of resets that arrive until the connection ends; whether it did."""
        reasons = []
        for frame in self.frames(lambda _: False, within_s):
            if isinstance(frame, frames.GoAwayFrame):
                reasons.append(("GOAWAY", frame.error_code))
            if isinstance(frame, frames.RstStreamFrame):
                reasons.append(("RST_STREAM", frame.error_code))
        return reasons, self.ended

    def block(self, path="/", method="GET", extra=()):
        """The header block of a request that is in order."""
        if self.target["tunnel"]:
            head = [(":method", "CONNECT"), (":authority", self.target["tunnel"])]
        else:
            head = [(":method", method), (":scheme", "https"), (":authority", "backend"), (":path", path)]
        return self.encoder.encode(head + list(extra), huffman=False)

    def ask(self, stream, path="/", end=True):
        """A whole request, if it is a tunnel with what is asked in it."""
        if not self.target["tunnel"]:
            return headers(stream, self.block(path), end=end)
        inside = f"GET {path} HTTP/1.1\r\nhost: backend\r\n\r\n".encode()
        return headers(stream, self.block(), end=False) + data(stream, inside)

    def alive(self):
        """Whether the connection still answers a ping."""
        self.send(ping(b"areyouok"))
        last = None
        for last in self.frames(lambda frame: answers_ping(frame, b"areyouok") or isinstance(frame, frames.GoAwayFrame)):
            pass
        return last is not None and answers_ping(last, b"areyouok")


def answers_ping(frame, payload):
    return isinstance(frame, frames.PingFrame) and "ACK" in frame.flags and frame.opaque_data == payload


def tls(stream, folder):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Identity is the SPIFFE ID; this client is content with the authority.
    context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(f"{folder}/client.ca.crt")
    context.load_cert_chain(f"{folder}/client.crt", f"{folder}/client.key")
    secured = context.wrap_socket(stream)
    assert secured.selected_alpn_protocol() == "h2", "no h2"
    return secured


def raw(kind, flags, stream, payload, length=None):
    """A frame of any kind, which may lie about its length."""
    length = len(payload) if length is None else length
    return struct.pack(">I", length)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(stream, block, end=True, whole=True):
    return raw(1, (1 if end else 0) | (4 if whole else 0), stream, block)


def continuation(stream, block, whole=False):
    return raw(9, 4 if whole else 0, stream, block)


def data(stream, payload, end=False):
    return raw(0, 1 if end else 0, stream, payload)


def reset(stream, code=8):
    return raw(3, 0, stream, struct.pack(">I", code))


def ping(payload=b"12345678", flags=0):
    return raw(6, flags, 0, payload)


def settings(pairs=(), flags=0):
    return raw(4, flags, 0, b"".join(struct.pack(">HI", name, value) for name, value in pairs))


def window(stream, increment):
    return raw(8, 0, stream, struct.pack(">I", increment))


def priority(stream, depends_on, weight=15):
    return raw(2, 0, stream, struct.pack(">IB", depends_on, weight))
