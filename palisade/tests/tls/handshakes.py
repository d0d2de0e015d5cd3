"""Handshakes with a server that are wrong in one thing each, by tlslite-ng and by hand.

    handshakes.py HOST:PORT CERTIFICATE KEY OTHER_KEY

Says a line a case: its name, then what became of it: `alert NAME`, `closed`, `hello` (the server went on to its
ServerHello), `served` (an answer came over the connection), or `hangs`.
"""

import hashlib
import socket
import struct
import sys

from tlslite.api import HandshakeSettings, TLSConnection, X509, X509CertChain, parsePEMKey
from tlslite.constants import AlertDescription, ContentType, ExtensionType
from tlslite.errors import TLSAbruptCloseError, TLSError, TLSRemoteAlert
from tlslite.extensions import TLSExtension
from tlslite.messages import ClientHello, KeyUpdate
from tlslite.utils.codec import Parser

WAIT = 5
# What a ServerHello has for a random number that asks for another share (RFC 8446 section 4.1.3).
RETRY = hashlib.sha256(b"HelloRetryRequest").digest()


def address():
    host, port = sys.argv[1].rsplit(":", 1)
    return host, int(port)


def connect():
    stream = socket.create_connection(address(), timeout=WAIT)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def settings(compressed=False):
    chosen = HandshakeSettings()
    chosen.minVersion = chosen.maxVersion = (3, 4)
    if not compressed:
        chosen.certificate_compression_send = chosen.certificate_compression_receive = []
    return chosen


class Captured:
    """A socket that keeps what is sent and answers with the end."""

    def __init__(self):
        self.sent = bytearray()

    def sendall(self, data):
        self.sent += data

    def send(self, data):
        self.sent += data
        return len(data)

    def recv(self, _):
        return b""

    def close(self):
        pass


def good_hello():
    """The message of a good client's first flight, without its record header."""
    captured = Captured()
    try:
        TLSConnection(captured).handshakeClientCert(settings=settings())
    except (TLSAbruptCloseError, TLSError):
        pass
    return bytes(captured.sent[5:])


HELLO = good_hello()


def parsed():
    return ClientHello().parse(Parser(bytearray(HELLO[1:])))


def hello(change):
    message = parsed()
    change(message)
    return bytes(message.write())


def without(kind):
    return hello(lambda message: message.extensions.__setitem__(
        slice(None), [e for e in message.extensions if e.extType != kind]))


def raw_extension(kind, payload):
    return TLSExtension(extType=kind).create(kind, bytearray(payload))


def with_extensions(*extra, first=False):
    def change(message):
        message.extensions[:] = [*extra, *message.extensions] if first else [*message.extensions, *extra]

    return hello(change)


def replaced(kind, payload):
    def change(message):
        message.extensions[:] = [
            raw_extension(kind, payload) if e.extType == kind else e for e in message.extensions
        ]

    return hello(change)


def record(kind, payload, version=b"\x03\x01"):
    return bytes([kind]) + version + struct.pack(">H", len(payload)) + payload


def handshake(payload):
    return record(ContentType.handshake, payload)


def outcome(*flights):
    """What the server says first to these bytes."""
    with connect() as stream:
        try:
            for flight in flights:
                stream.sendall(flight)
        except OSError:
            pass  # it may have had enough already; what it said is still to be read
        said = b""
        try:
            while len(said) < 43:
                more = stream.recv(4096)
                if not more:
                    break
                said += more
                if said[0] == ContentType.alert and len(said) >= 7:
                    break
        except socket.timeout:
            return "hangs"
        except ConnectionResetError:
            return "closed"
    if not said:
        return "closed"
    if said[0] == ContentType.alert:
        return "alert " + AlertDescription.toStr(said[6])
    if said[0] == ContentType.handshake and said[5] == 2:
        return "retry" if said[11:43] == RETRY else "hello"
    return f"other {said[:8].hex()}"


def psk(identities=b"nobody", binder=32):
    identity = struct.pack(">H", len(identities)) + identities + b"\0\0\0\0"
    binders = bytes([binder]) + b"b" * binder
    payload = struct.pack(">H", len(identity)) + identity + struct.pack(">H", len(binders)) + binders
    return raw_extension(ExtensionType.pre_shared_key, payload)


def by_hand():
    """Cases before there are keys."""
    u16 = lambda *values: b"".join(struct.pack(">H", value) for value in values)
    groups = lambda *values: struct.pack(">H", 2 * len(values)) + u16(*values)
    grease = [raw_extension(0x0A0A, b""), raw_extension(0xBABA, b"\0")]
    long_id = bytearray(HELLO)
    # A session id of 33 bytes, where 32 is the longest.
    at = 4 + 2 + 32
    long_id[at:at + 1 + long_id[at]] = b"\x21" + b"s" * 33
    long_id[1:4] = struct.pack(">I", len(long_id) - 4)[1:]

    yield "a good hello", outcome(handshake(HELLO))
    yield "one byte a record", outcome(*(handshake(HELLO[i:i + 1]) for i in range(len(HELLO))))
    yield "values that nobody knows", outcome(handshake(with_extensions(*grease, first=True)))
    yield "an unknown session to resume", outcome(handshake(with_extensions(
        raw_extension(ExtensionType.psk_key_exchange_modes, b"\1\1"), psk())))
    yield "TLS 1.2 at most", outcome(handshake(without(ExtensionType.supported_versions)))
    yield "SSL 2", outcome(b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + b"\x01\x00\x80" * 7 + b"c" * 16)
    yield "no groups", outcome(handshake(without(ExtensionType.supported_groups)))
    yield "no key share", outcome(handshake(without(ExtensionType.key_share)))
    yield "no signature algorithms", outcome(handshake(without(ExtensionType.signature_algorithms)))
    yield "groups that nobody has", outcome(handshake(replaced(ExtensionType.supported_groups, groups(0x0101))))
    yield "a share that is no point", outcome(handshake(replaced(
        ExtensionType.key_share, u16(2 + 2 + 65, 0x0017, 65) + b"\x04" + b"\xff" * 64)))
    yield "a share of no bytes", outcome(handshake(replaced(ExtensionType.key_share, u16(4, 0x001D, 0))))
    yield "an all-zero share", outcome(handshake(hello(lambda message: message.extensions.__setitem__(
        slice(None),
        [raw_extension(ExtensionType.supported_groups, groups(0x001D))]
        + [raw_extension(ExtensionType.key_share, u16(36, 0x001D, 32) + bytes(32))]
        + [e for e in message.extensions
           if e.extType not in (ExtensionType.supported_groups, ExtensionType.key_share)]))))
    yield "no common cipher", outcome(handshake(hello(lambda m: m.cipher_suites.__setitem__(slice(None), [0x1304]))))
    yield "an extension twice", outcome(handshake(with_extensions(
        next(e for e in parsed().extensions if e.extType == ExtensionType.supported_groups))))
    yield "a session to resume, not last", outcome(handshake(with_extensions(
        psk(), raw_extension(ExtensionType.psk_key_exchange_modes, b"\1\1"), raw_extension(0x0A0A, b""))))
    yield "compression", outcome(handshake(hello(lambda m: m.compression_methods.__setitem__(slice(None), [1]))))
    yield "a session id of 33 bytes", outcome(handshake(bytes(long_id)))
    yield "a byte too many", outcome(handshake(HELLO[:1] + struct.pack(">I", len(HELLO) - 3)[1:] + HELLO[4:] + b"\0"))
    yield "a byte too few", outcome(handshake(HELLO[:1] + struct.pack(">I", len(HELLO) - 5)[1:] + HELLO[4:-1]))
    yield "a message of 16 MiB", outcome(*[handshake(b"\x01\xff\xff\xff" + b"x" * 16000)] * 20)
    yield "a record of 64 KiB", outcome(b"\x16\x03\x01\xff\xff" + b"x" * 0xFFFF)
    yield "an empty record", outcome(handshake(b""), handshake(HELLO))
    yield "an unknown message", outcome(handshake(b"\x63\0\0\1x"))
    yield "data first", outcome(record(ContentType.application_data, b"GET / HTTP/1.1\r\n\r\n"))
    yield "a change of ciphers first", outcome(record(ContentType.change_cipher_spec, b"\1"), handshake(HELLO))
    yield "a heartbeat first", outcome(record(24, b"\1\x40\0"))
    yield "a server's hello", outcome(handshake(b"\x02" + HELLO[1:]))
    yield "HTTP", outcome(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")


class Client:
    """A client with a certificate, as far as it gets."""

    def __init__(self, certificate=None, key=None, compressed=False):
        self.tls = TLSConnection(connect())
        chain = None
        if certificate:
            chain = X509CertChain([X509().parse(open(certificate).read())])
            key = parsePEMKey(open(key).read(), private=True)
        self.tls.handshakeClientCert(
            chain, key if chain else None, settings=settings(compressed), alpn=[bytearray(b"http/1.1")])

    def sends(self, kind, payload):
        """One record of its own making, encrypted as all are."""
        message = type("Raw", (), {"contentType": kind, "write": lambda self: bytearray(payload)})()
        for _ in self.tls._recordLayer.sendRecord(message):
            pass

    def updates_key(self):
        self.sends(ContentType.handshake, KeyUpdate().create(0).write())
        session = self.tls.session
        session.cl_app_secret, session.sr_app_secret = self.tls._recordLayer.calcTLS1_3KeyUpdate_reciever(
            session.cipherSuite, session.cl_app_secret, session.sr_app_secret)

    def hears(self):
        return self.tls.read(max=9, min=9)

    def asks(self):
        try:
            self.tls.write(b"GET /page HTTP/1.1\r\nhost: backend\r\n\r\n")
        except OSError:
            pass  # what it said before it closed is still to be read
        return self.hears()


def told(attempt):
    try:
        said = bytes(attempt())
        if not said:
            return "closed"
        return "served" if said.startswith(b"HTTP/1.1 ") else f"other {said[:16]!r}"
    except TLSRemoteAlert as alert:
        return "alert " + AlertDescription.toStr(alert.description)
    except socket.timeout:
        return "hangs"
    except (TLSError, OSError):
        return "closed"


def with_keys(certificate, key, other_key):
    """Cases of clients that finish, or nearly."""

    def after(act):
        """A good client's answer after it has done that."""

        def attempt():
            client = Client(certificate, key)
            try:
                act(client)
            except OSError:
                pass
            return client.asks()

        return told(attempt)

    def sending(kind, payload, times=1):
        return after(lambda client: [client.sends(kind, payload) for _ in range(times)])

    yield "a good client", told(lambda: Client(certificate, key).asks())
    yield "no certificate", told(lambda: Client().asks())
    yield "a certificate without its key", told(lambda: Client(certificate, other_key).asks())
    yield "a compressed certificate", told(lambda: Client(certificate, key, compressed=True).asks())
    yield "a second hello", sending(ContentType.handshake, HELLO)
    yield "a heartbeat later", sending(24, b"\1\x40\0")
    yield "a change of ciphers later", sending(ContentType.change_cipher_spec, b"\1")
    yield "an unknown message later", sending(ContentType.handshake, b"\x63\0\0\1x")
    yield "a key update of two bytes", sending(ContentType.handshake, b"\x18\0\0\2\0\0")
    yield "a key update that asks for 2", sending(ContentType.handshake, b"\x18\0\0\1\2")
    yield "a key update that nobody makes", sending(ContentType.handshake, b"\x18\0\0\1\0")
    yield "an empty handshake record", sending(ContentType.handshake, b"")
    yield "a record of 16 KiB and one byte", sending(ContentType.application_data, b"x" * (2**14 + 1))
    yield "thirty empty records of data", sending(ContentType.application_data, b"", 30)
    yield "ten thousand empty records of data", sending(ContentType.application_data, b"", 10_000)
    yield "a key update", after(Client.updates_key)
    yield "ten thousand key updates", after(lambda client: [client.updates_key() for _ in range(10_000)])
    yield "a good client, after all", told(lambda: Client(certificate, key).asks())


def main():
    for name, became in by_hand():
        print(f"{name}: {became}", flush=True)
    for name, became in with_keys(*sys.argv[2:5]):
        print(f"{name}: {became}", flush=True)


main()
