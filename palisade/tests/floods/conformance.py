"""The MUSTs of RFC 9113 (HTTP/2) and RFC 7541 (HPACK) for a server, each by one connection of raw frames.

Usage: conformance.py < STAGE

STAGE as for attack.py. Prints a row for each case and target, and ends with 1 if one is not kept. A stream error may be answered
by a connection error, any error by a generic code (RFC 9113 §5.4), and a malformed request by a status of 4xx before the
stream is reset (§8.1.1).
"""

import json
import struct
import sys

import wire
from hyperframe import frame as frames

PROTOCOL, INTERNAL, FLOW, CLOSED, SIZE, REFUSED, COMPRESSION, CALM = 1, 2, 3, 5, 6, 7, 9, 11
# What the library below does otherwise, and why that does no harm. Whoever keeps one of these is told to take it off here.
KNOWN = {
    "a :path with a fragment": "cut off before the decision, and what was decided on is forwarded",
    "a pseudo-header in trailers": "dropped: neither judged nor forwarded",
}
# A limit of ours: streams that a connection may have open.
MAX_STREAMS = 200
CASES = []
REQUESTS, ALL = "requests", "all"


def case(section, what, expected, where=ALL, codes=(), settings=None, greet=True):
    """`expected`: "connection", "stream" (an error of it), "malformed" (a request that is none), "ignored", "answered"."""

    def add(act):
        CASES.append((section, what, expected, where, codes, settings, greet, act))
        return act

    return add


def simple(section, what, expected, make, where=ALL, codes=()):
    """A case of which all is said by the bytes that are sent."""
    case(section, what, expected, where, codes)(lambda wired: wired.send(make(wired)))


def malformed(section, what, block, end=True, after=b""):
    """A header block on stream 1, and what follows it, that are no request."""
    case(section, what, "malformed", REQUESTS)(
        lambda wired: wired.send(wire.headers(1, block(wired), end=end) + after))


def plain(name, value):
    """A literal field that is not indexed, as the bytes are."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def fields(*pairs):
    return lambda _: b"".join(plain(name, value) for name, value in pairs)


METHOD, SCHEME, AUTHORITY, PATH = (b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"backend"), (b":path", b"/")
GOOD = (METHOD, SCHEME, AUTHORITY, PATH)


def post(*extra):
    return fields((b":method", b"PUT"), SCHEME, AUTHORITY, (b":path", b"/orders/1"), *extra)


# Connection, frames and header blocks.
case("3.4", "an invalid preface", "connection", greet=False)(lambda wired: wired.send(b"INVALID CONNECTION PREFACE\r\n\r\n" * 2))
case("3.4", "a preface without SETTINGS", "connection", codes=(PROTOCOL,), greet=False)(
    lambda wired: wired.send(wire.PREFACE + wire.ping()))
simple("4.1", "a frame of unknown type", "ignored", lambda _: wire.raw(0xFA, 0, 0, b"x" * 8))
simple("4.1", "undefined flags", "ignored", lambda _: wire.ping(b"flagged!", flags=0x16))
simple("4.1", "the reserved bit of a stream", "ignored", lambda _: wire.raw(6, 0, 1 << 31, b"reserved"))
simple("4.2", "DATA beyond SETTINGS_MAX_FRAME_SIZE", "stream",
       lambda w: w.ask(1, end=False) + wire.data(1, bytes(16_385)), codes=(SIZE,))
simple("4.2", "HEADERS beyond SETTINGS_MAX_FRAME_SIZE", "connection",
       lambda w: wire.headers(1, w.block() + plain(b"a", b"b" * 100) * 170), codes=(SIZE,))
simple("4.3", "a header block that does not decode", "connection",
       lambda w: wire.headers(1, w.block() + b"\x80"), codes=(COMPRESSION,))
simple("4.3", "PRIORITY inside a header block", "connection",
       lambda w: wire.headers(1, w.block(), whole=False) + wire.priority(1, 3) + wire.continuation(1, b"", whole=True),
       codes=(PROTOCOL,))
simple("4.3", "HEADERS of another stream inside a header block", "connection",
       lambda w: wire.headers(1, w.block(), whole=False) + wire.headers(3, w.block()), codes=(PROTOCOL,))
simple("5.5", "an unknown frame inside a header block", "connection",
       lambda w: wire.headers(1, w.block(), whole=False) + wire.raw(0xFA, 0, 0, b"") + wire.continuation(1, b"", whole=True),
       codes=(PROTOCOL,))

# The states of a stream.
for name, piece in [
    ("DATA", wire.data(1, b"x")), ("RST_STREAM", wire.reset(1)), ("WINDOW_UPDATE", wire.window(1, 1)),
    ("CONTINUATION", wire.continuation(1, b"", whole=True)),
]:
    simple("5.1", f"{name} on an idle stream", "connection", lambda _, piece=piece: piece, codes=(PROTOCOL,))
simple("5.1", "DATA after END_STREAM", "stream",
       lambda w: wire.headers(1, w.block()) + wire.data(1, b"x"), codes=(CLOSED, PROTOCOL))
simple("5.1", "HEADERS after END_STREAM", "stream",
       lambda w: wire.headers(1, w.block()) + wire.headers(1, w.block()), codes=(CLOSED, PROTOCOL))
simple("5.1", "CONTINUATION after END_STREAM", "connection",
       lambda w: wire.headers(1, w.block()) + wire.continuation(1, b"", whole=True), codes=(CLOSED, PROTOCOL))
simple("5.1", "DATA after RST_STREAM", "stream-or-ignored",
       lambda w: w.ask(1, end=False) + wire.reset(1) + wire.data(1, b"x"), codes=(CLOSED, PROTOCOL))
simple("5.1", "CONTINUATION after RST_STREAM", "connection",
       lambda w: w.ask(1, end=False) + wire.reset(1) + wire.continuation(1, b"", whole=True), codes=(CLOSED, PROTOCOL))
simple("5.1", "PRIORITY after RST_STREAM", "ignored",
       lambda w: w.ask(1, end=False) + wire.reset(1) + wire.priority(1, 0))
simple("5.1.1", "an even stream of a client", "connection", lambda w: wire.headers(2, w.block()), codes=(PROTOCOL,))
simple("5.1.1", "a stream below one that was opened", "connection",
       lambda w: wire.headers(5, w.block()) + wire.headers(3, w.block()), codes=(PROTOCOL, CLOSED))
simple("5.1.2", "a stream beyond SETTINGS_MAX_CONCURRENT_STREAMS", "stream",
       lambda w: b"".join(w.ask(2 * at + 1, end=False) for at in range(MAX_STREAMS + 1)), codes=(REFUSED, PROTOCOL, CALM))

# Each kind of frame.
simple("6.1", "DATA on stream 0", "connection", lambda _: wire.data(0, b"x"), codes=(PROTOCOL,))
simple("6.1", "more padding than DATA", "connection",
       lambda w: w.ask(1, end=False) + wire.raw(0, 8, 1, b"\x06xxxx"), codes=(PROTOCOL,))
simple("6.2", "HEADERS on stream 0", "connection", lambda w: wire.headers(0, w.block()), codes=(PROTOCOL,))
simple("6.2", "more padding than HEADERS", "connection",
       lambda w: wire.raw(1, 0xD, 1, b"\xff" + w.block()), codes=(PROTOCOL, SIZE))
simple("6.3", "PRIORITY on stream 0", "connection", lambda _: wire.priority(0, 1), codes=(PROTOCOL,))
simple("6.3", "PRIORITY of four bytes", "stream", lambda w: w.ask(1, end=False) + wire.raw(2, 0, 1, bytes(4)), codes=(SIZE,))
simple("6.4", "RST_STREAM on stream 0", "connection", lambda _: wire.reset(0), codes=(PROTOCOL,))
simple("6.4", "RST_STREAM of three bytes", "connection",
       lambda w: w.ask(1, end=False) + wire.raw(3, 0, 1, bytes(3)), codes=(SIZE,))
simple("6.5", "SETTINGS with ACK and a payload", "connection", lambda _: wire.settings([(1, 1)], flags=1), codes=(SIZE,))
simple("6.5", "SETTINGS on a stream", "connection", lambda _: wire.raw(4, 0, 1, bytes(6)), codes=(PROTOCOL,))
simple("6.5", "SETTINGS of three bytes", "connection", lambda _: wire.raw(4, 0, 0, bytes(3)), codes=(SIZE,))
for what, pair, code in [
    ("ENABLE_PUSH of 2", (2, 2), PROTOCOL), ("INITIAL_WINDOW_SIZE beyond 2^31-1", (4, 2**31), FLOW),
    ("MAX_FRAME_SIZE below 16,384", (5, 16_383), PROTOCOL), ("MAX_FRAME_SIZE beyond 2^24-1", (5, 2**24), PROTOCOL),
]:
    simple("6.5.2", what, "connection", lambda _, pair=pair: wire.settings([pair]), codes=(code,))
simple("6.5.2", "an unknown setting", "ignored", lambda _: wire.settings([(0xFFFF, 1)]))
simple("6.6", "PUSH_PROMISE of a client", "connection",
       lambda w: w.ask(1, end=False) + wire.raw(5, 4, 1, struct.pack(">I", 2) + w.block()), codes=(PROTOCOL,))
simple("6.7", "PING on a stream", "connection", lambda _: wire.raw(6, 0, 1, bytes(8)), codes=(PROTOCOL,))
simple("6.7", "PING of six bytes", "connection", lambda _: wire.raw(6, 0, 0, bytes(6)), codes=(SIZE,))
simple("6.8", "GOAWAY on a stream", "connection", lambda _: wire.raw(7, 0, 1, bytes(8)), codes=(PROTOCOL,))
simple("6.9", "WINDOW_UPDATE of 0 for the connection", "connection", lambda _: wire.window(0, 0), codes=(PROTOCOL,))
simple("6.9", "WINDOW_UPDATE of 0 for a stream", "stream", lambda w: w.ask(1, end=False) + wire.window(1, 0), codes=(PROTOCOL,))
simple("6.9", "WINDOW_UPDATE of three bytes", "connection", lambda _: wire.raw(8, 0, 0, bytes(3)), codes=(SIZE,))
simple("6.9.1", "a connection's window beyond 2^31-1", "connection", lambda _: wire.window(0, 2**31 - 1), codes=(FLOW,))
simple("6.9.1", "a stream's window beyond 2^31-1", "stream",
       lambda w: w.ask(1, end=False) + wire.window(1, 2**31 - 1), codes=(FLOW,))
simple("6.9.2", "a new INITIAL_WINDOW_SIZE that overflows a stream's window", "connection",
       lambda w: w.ask(1, end=False) + wire.window(1, 2**31 - 1 - 65_535) + wire.settings([(4, 65_536)]), codes=(FLOW,))
simple("6.10", "CONTINUATION on stream 0", "connection",
       lambda w: wire.headers(1, w.block(), whole=False) + wire.continuation(0, b"", whole=True), codes=(PROTOCOL,))
simple("6.10", "CONTINUATION after END_HEADERS", "connection",
       lambda w: w.ask(1, end=False) + wire.continuation(1, b"", whole=True), codes=(PROTOCOL,))
simple("6.10", "DATA inside a header block", "connection",
       lambda w: wire.headers(1, w.block(), whole=False) + wire.data(1, b"x"), codes=(PROTOCOL,))


@case("6.9.1", "DATA beyond the window that was given", "stream", REQUESTS, codes=(FLOW,))
def beyond_the_window(wired):
    # The connection's window is what it is told to be; DATA of 3 MB is beyond any that is given at once.
    wired.send(wire.headers(1, post()(wired), end=False) + wire.data(1, bytes(16_384)) * 192)


@case("6.9.1", "a window of one byte is kept to", "ignored", REQUESTS, settings={frames.SettingsFrame.INITIAL_WINDOW_SIZE: 1})
def window_of_one(wired):
    wired.send(wired.ask(1))
    sizes = [len(frame.data) for frame in wired.frames(lambda frame: isinstance(frame, frames.DataFrame) and frame.data)
             if isinstance(frame, frames.DataFrame)]
    assert sizes[-1:] == [1], f"DATA of {sizes} bytes"
    wired.send(wire.window(1, 100))


@case("6.9.2", "a window that becomes negative is kept to", "ignored", REQUESTS,
      settings={frames.SettingsFrame.INITIAL_WINDOW_SIZE: 3})
def negative_window(wired):
    wired.send(wired.ask(1, "/api/1m"))
    first = [frame for frame in wired.frames(lambda frame: isinstance(frame, frames.DataFrame) and frame.data)][-1]
    assert len(first.data) == 3, f"DATA of {len(first.data)} bytes"
    wired.send(wire.settings([(4, 0)]) + wire.window(1, 2))
    # What was given is a byte less than what was taken away: nothing may come before the answer to this ping.
    wired.send(wire.ping(b"negative"))
    for frame in wired.frames(lambda frame: isinstance(frame, frames.PingFrame)):
        assert not isinstance(frame, frames.DataFrame) or not frame.data, "DATA without a window"


@case("6.5.3", "SETTINGS are acknowledged", "ignored")
def settings_acknowledged(wired):
    got = [frame for frame in wired.frames(lambda frame: isinstance(frame, frames.SettingsFrame) and "ACK" in frame.flags)]
    assert got and "ACK" in got[-1].flags, "no ACK"


@case("6.7", "an acknowledged PING is not answered", "ignored")
def ping_acknowledged(wired):
    wired.send(wire.ping(b"unasked!", flags=1))


# Requests.
malformed("8.2.1", "a name in capitals", fields(*GOOD, (b"X-Test", b"1")))
malformed("8.2.1", "a name with a space", fields(*GOOD, (b"x test", b"1")))
malformed("8.2.1", "a name with a colon", fields(*GOOD, (b"x:test", b"1")))
malformed("8.2.1", "an empty name", fields(*GOOD, (b"", b"1")))
malformed("8.2.1", "a name beyond ASCII", fields(*GOOD, (b"x-\xe4", b"1")))
malformed("8.2.1", "a value with NUL", fields(*GOOD, (b"x-test", b"a\x00b")))
malformed("8.2.1", "a value with CR LF", fields(*GOOD, (b"x-test", b"a\r\nb: c")))
malformed("8.2.2", "connection", fields(*GOOD, (b"connection", b"keep-alive")))
malformed("8.2.2", "keep-alive", fields(*GOOD, (b"keep-alive", b"timeout=5")))
malformed("8.2.2", "proxy-connection", fields(*GOOD, (b"proxy-connection", b"keep-alive")))
malformed("8.2.2", "transfer-encoding", post((b"transfer-encoding", b"chunked")))
malformed("8.2.2", "upgrade", fields(*GOOD, (b"upgrade", b"websocket")))
malformed("8.2.2", "te other than trailers", fields(*GOOD, (b"te", b"trailers, deflate")))
malformed("8.3", "an unknown pseudo-header", fields(*GOOD, (b":test", b"1")))
malformed("8.3", "a pseudo-header of answers", fields(*GOOD, (b":status", b"200")))
malformed("8.3", "a pseudo-header after a field", fields(METHOD, SCHEME, AUTHORITY, (b"x-test", b"1"), PATH))
for first, name in [(METHOD, "method"), (SCHEME, "scheme"), (PATH, "path"), (AUTHORITY, "authority")]:
    malformed("8.3", f"two of :{name}", fields(*GOOD, first))
for gone, name in [(METHOD, "method"), (SCHEME, "scheme"), (PATH, "path")]:
    malformed("8.3.1", f"no :{name}", fields(*[pair for pair in GOOD if pair != gone]))
malformed("8.3.1", "an empty :path", fields(METHOD, SCHEME, AUTHORITY, (b":path", b"")))
malformed("8.3.1", "a :path without a slash", fields(METHOD, SCHEME, AUTHORITY, (b":path", b"api")))
malformed("8.3.1", "an absolute :path", fields(METHOD, SCHEME, AUTHORITY, (b":path", b"https://backend/")))
malformed("8.3.1", "a :path with a space", fields(METHOD, SCHEME, AUTHORITY, (b":path", b"/ HTTP/1.1")))
malformed("8.3.1", "a :path with a fragment", fields(METHOD, SCHEME, AUTHORITY, (b":path", b"/#a")))
malformed("8.3.1", "userinfo in :authority", fields(METHOD, SCHEME, (b":authority", b"a@backend"), PATH))
malformed("8.3.1", "another host than :authority", fields(*GOOD, (b"host", b"other")))
malformed("8.3.1", "two hosts", fields(METHOD, SCHEME, PATH, (b"host", b"backend"), (b"host", b"backend")))
malformed("8.1", "a second HEADERS that ends nothing", post(), end=False,
          after=wire.headers(1, plain(b"x-test", b"1"), end=False))
malformed("8.1", "a pseudo-header in trailers", post(), end=False,
          after=wire.data(1, b"x") + wire.headers(1, plain(b":method", b"GET")))
malformed("8.1.1", "less DATA than content-length", post((b"content-length", b"5")), end=False, after=wire.data(1, b"x", end=True))
malformed("8.1.1", "more DATA than content-length", post((b"content-length", b"1")), end=False, after=wire.data(1, b"xxxx", end=True))
malformed("8.1.1", "no DATA of a content-length", post((b"content-length", b"1")))
malformed("8.1.1", "two content-lengths", post((b"content-length", b"1"), (b"content-length", b"2")), end=False,
          after=wire.data(1, b"x", end=True))
malformed("8.1.1", "a content-length that is no number", post((b"content-length", b"+1")), end=False,
          after=wire.data(1, b"x", end=True))
malformed("8.5", "CONNECT with :path", fields((b":method", b"CONNECT"), SCHEME, AUTHORITY, PATH))
malformed("8.5", "CONNECT without :authority", fields((b":method", b"CONNECT")))
case("8.1", "a request", "answered", REQUESTS)(lambda wired: wired.send(wired.ask(1)))
case("8.2.3", "cookie in crumbs", "answered", REQUESTS)(
    lambda wired: wired.send(wire.headers(1, fields(*GOOD, (b"cookie", b"a=b"), (b"cookie", b"c=d"))(wired))))

# HPACK.
for what, block in [
    ("index 0", b"\x80"), ("an index beyond the table", b"\xff\x80\x01"), ("padding of more than 7 bits", b"\x00\x82\x1f\xff\x01a"),
    ("padding of zeroes", b"\x00\x81\x18\x01a"), ("EOS in a string", b"\x00\x84\xff\xff\xff\xff\x01a"),
    ("a table beyond what was allowed", b"\x3f\xe1\xff\x03"),
]:
    # The size of the table is told at the beginning of a block.
    first = block[:1] == b"\x3f"
    simple("HPACK", what, "connection",
           lambda w, block=block, first=first: wire.headers(1, block + w.block() if first else w.block() + block),
           codes=(COMPRESSION,))
simple("HPACK", "a table's size in the middle of a block", "connection",
       lambda w: wire.headers(1, w.block() + b"\x20"), codes=(COMPRESSION,))


def judge(wired, expected, codes):
    """What is wrong with how the connection goes on."""
    if expected == "ignored":
        return None if wired.alive() else "it does not go on"
    mark = expected == "stream-or-ignored"
    if mark:
        wired.send(wire.ping(b"stillok?"))
    while True:
        frame = wired.next(wire.PATIENCE_S)
        if frame is None:
            if not wired.ended:
                return "nothing happens"
            return None if expected in ("connection", "stream", "malformed", "stream-or-ignored") else "the connection ends"
        if isinstance(frame, (frames.GoAwayFrame, frames.RstStreamFrame)):
            if expected == "connection" and isinstance(frame, frames.RstStreamFrame):
                continue
            # A stream may be reset without a fault once its answer is complete.
            if isinstance(frame, frames.RstStreamFrame) and frame.error_code == 0 or expected == "answered":
                continue
            if codes and frame.error_code not in (*codes, PROTOCOL, INTERNAL):
                return f"error {frame.error_code} in place of {codes}"
            return None
        if mark and wire.answers_ping(frame, b"stillok?"):
            return None
        if isinstance(frame, frames.HeadersFrame):
            status = int(dict(wired.decoder.decode(frame.data))[":status"])
            if expected == "answered":
                return None if status == 200 else f"status {status}"
            if expected == "malformed":
                return None if 400 <= status < 500 and status != 403 else f"status {status}"


def run(target, folder, chosen):
    section, what, expected, where, codes, settings, greet, act = chosen
    wired = wire.Wire(target, folder, settings, greet)
    try:
        act(wired)
        return judge(wired, expected, codes)
    except AssertionError as wrong:
        return str(wrong)
    finally:
        wired.close()


def main():
    stage = json.load(sys.stdin)
    kept, broken = 0, 0
    for target in stage["targets"]:
        for chosen in CASES:
            if target["tunnel"] and chosen[3] == REQUESTS:
                continue
            wrong, known = run(target, stage["folder"], chosen), KNOWN.get(chosen[1])
            if known:
                wrong = None if wrong else "kept now: no longer to be excused"
            print(f"{target['name']:9} {chosen[0]:6} {chosen[1]:58} {chosen[2]:18} {wrong or (known and f'ok: {known}') or 'ok'}", flush=True)
            kept, broken = kept + (not wrong), broken + bool(wrong)
    print(f"{kept} kept, {broken} not")
    sys.exit(1 if broken else 0)


main()
