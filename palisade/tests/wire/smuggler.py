"""Requests that hide others, from this machine and from a peer with a genuine certificate, before an app that writes down
what reaches it, byte for byte. HTTP/1.1 by sockets, TLS by the standard library, HTTP/2 by the package `h2`.

    smuggler.py     says the app's port; reads the client's port, the server's and a folder with client.crt, client.key and
                    client.ca.crt; says what the app saw, as JSON
"""

import json
import pathlib
import re
import socket
import ssl
import sys
import threading

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions

# Bounds a hang: what is neither answered nor hung up on within it counts as neither.
PATIENCE_SECONDS = 10

HIDDEN = b"GET /pages/smuggled HTTP/1.1\r\nhost: backend\r\n\r\n"
POST = b"POST /pages/own HTTP/1.1\r\nhost: backend\r\n"
GET = b"GET /pages/own HTTP/1.1\r\nhost: backend\r\n"
NEXT = b"GET /pages/own HTTP/1.1\r\nhost: backend\r\nconnection: close\r\n\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
LENGTH = b"content-length: %d\r\n" % len(HIDDEN)


# The app.

HEAD = re.compile(rb"([A-Z]+) (/[!-\"$-~]*) HTTP/1\.1\r\n((?:[!#$%&'*+.^`|~0-9a-zA-Z_-]+: [\t -~]*\r\n)*)\r\n")
CHUNK = re.compile(rb"([0-9a-f]+)\r\n")
FRAMING = {"content-length", "transfer-encoding", "host", "connection", "te", "trailer", "upgrade", "content-type"}
SEEN = []


class Irregular(Exception):
    """Something that two parsers could read in two ways."""


def take_request(raw):
    """The first request of `raw` and what is behind it; none if it is not whole."""
    end = raw.find(b"\r\n\r\n")
    if end < 0:
        if len(raw) > 100_000:
            raise Irregular("no end of a head")
        return None
    head = HEAD.fullmatch(raw[: end + 4])
    if head is None:
        raise Irregular(f"a head: {raw[: end + 4]!r}")
    fields = [line.split(": ", 1) for line in head[3].decode().split("\r\n") if line]
    names = [name.lower() for name, _ in fields]
    for name in names:
        folded = re.sub(r"[^a-z0-9]", "-", name)
        if folded in FRAMING and (folded != name or names.count(name) > 1):
            raise Irregular(f"{name}: {fields}")
    said = {name.lower(): value for name, value in fields}
    if "host" not in said or ("content-length" in said and "transfer-encoding" in said):
        raise Irregular(f"fields: {fields}")
    rest = raw[end + 4 :]
    target = head[2].decode()
    if "transfer-encoding" in said:
        if said["transfer-encoding"] != "chunked":
            raise Irregular(f"fields: {fields}")
        while True:
            size = CHUNK.match(rest)
            if size is None:
                if len(rest) > 20:
                    raise Irregular(f"a chunk: {rest[:50]!r}")
                return None
            length = int(size[1], 16)
            if length == 0:
                break
            chunk = rest[size.end() : size.end() + length + 2]
            if len(chunk) < length + 2:
                return None
            if not chunk.endswith(b"\r\n"):
                raise Irregular(f"a chunk's end: {chunk!r}")
            rest = rest[size.end() + length + 2 :]
        trailers = rest[size.end() :]
        if trailers.startswith(b"\r\n"):
            return target, trailers[2:]
        if b"\r\n\r\n" not in trailers:
            return None
        raise Irregular(f"trailers: {trailers!r}")
    length = int(said.get("content-length", "0"))
    return None if len(rest) < length else (target, rest[length:])


def record(connection):
    raw = b""
    with connection:
        try:
            while data := connection.recv(65536):
                raw += data
                while raw and (taken := take_request(raw)):
                    target, raw = taken
                    SEEN.append(target)
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        except Irregular as why:
            SEEN.append(f"irregular: {why}")
        except OSError:
            pass  # hung up on


def app():
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def accept():
        while True:
            threading.Thread(target=record, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


# HTTP/1.1.

# Each gets one refusal, and the end.
REFUSED = {
    "CL.TE": POST + LENGTH + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
    "TE.CL": POST + CHUNKED + b"content-length: 4\r\n\r\n%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n",
    "CL.CL": POST + b"content-length: 0\r\n" + LENGTH + b"\r\n" + HIDDEN,
    "CL twice, equal": POST + LENGTH + LENGTH + b"\r\n" + HIDDEN,
    "TE twice": POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
    "TE twice, one false": POST + CHUNKED + b"transfer-encoding: identity\r\n\r\n0\r\n\r\n" + HIDDEN,
    "TE of HTTP/1.0": b"POST /pages/own HTTP/1.0\r\nhost: backend\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
    **{
        f"TE {value!r}": POST + b"transfer-encoding:" + value + b"\r\n\r\n0\r\n\r\n" + HIDDEN
        for value in [
            b" xchunked", b" identity", b" gzip", b" gzip, chunked", b" chunked, gzip", b" chunked, identity",
            b" chunked,", b",chunked", b" chunked;q=1", b' "chunked"', b" 'chunked'", b" chunked\x00", b" \x0bchunked",
            b" chunked\x0c", b" chunk", b" chunked chunked", b"", b" \xa0chunked", b" chun\rked", b" chunked\r",
        ]
    },
    **{
        f"TE field {field!r}": POST + LENGTH + field + b"\r\n0\r\n\r\n" + HIDDEN
        for field in [
            b"transfer-encoding : chunked\r\n", b"transfer-encoding\t: chunked\r\n", b" transfer-encoding: chunked\r\n",
            b"\ttransfer-encoding: chunked\r\n", b"x: x\r\n transfer-encoding: chunked\r\n",
            b"x: x\ntransfer-encoding: chunked\r\n", b"x: x\rtransfer-encoding: chunked\r\n",
            b"transfer-encoding\r\n: chunked\r\n", b"transfer-encoding:\r\n chunked\r\n", b"\x00transfer-encoding: chunked\r\n",
            b"transfer-encoding\x00: chunked\r\n", b"transfer\xadencoding: chunked\r\n", b": chunked\r\n", b"chunked\r\n",
            b"transfer-encoding: chunked\r\n\r", b"\rtransfer-encoding: chunked\r\n",
        ]
    },
    **{
        f"CL {value!r}": POST + b"content-length:" + value + b"\r\n\r\n" + HIDDEN
        for value in [
            b" +5", b" -5", b" 0x5", b" 5,5", b" 5, 6", b" 5 6", b"", b" 05", b" 5;", b" 5.0", b" 1e1", b" \xd9\xa5",
            b" 18446744073709551621", b" 99999999999999999999999999", b" 5\x00", b" \x0b5", b"\r\n 5", b" five",
        ]
    },
    "CL field with a space": POST + b"content-length : 5\r\n\r\n" + HIDDEN,
    **{
        f"chunk {chunk!r}": POST + CHUNKED + b"\r\n" + chunk + HIDDEN
        for chunk in [
            b"0x0\r\n\r\n", b"+0\r\n\r\n", b"-1\r\n\r\n", b" 0\r\n\r\n", b"0 \r\n\r\n", b"0\t\r\n\r\n", b"\r\n\r\n", b";\r\n\r\n",
            b"0\n\n", b"0\n\r\n", b"0\r\n\n", b"0\r\r\n", b"0\r\n\r\r\n", b"0;\nx\r\n\r\n", b"0;x\ry\r\n\r\n", b"_0\r\n\r\n",
            b"00000000000000000000000\r\n\r\n", b"10000000000000000\r\n", b"fffffffffffffffff\r\n", b"1\r\nab\r\n0\r\n\r\n",
            b"1\r\na0\r\n\r\n", b"1\na\r\n0\r\n\r\n", b"1\r\na\n0\r\n\r\n", b"0\r\ncontent-length: 5\r\n\r\n",
            b"0\r\ntransfer-encoding: chunked\r\n\r\n", b"0\r\nhost: evil\r\n\r\n", b"0\r\n x: folded\r\n\r\n",
            b"0\r\nx : y\r\n\r\n", b"0\r\nx\r\n\r\n", b"0\r\nx: y\n\r\n", b"0\r\nx: \x00\r\n\r\n",
        ]
    },
    **{
        f"line {line!r}": line + b"host: backend\r\n\r\n" + HIDDEN
        for line in [
            b"GET /pages/own\r\n", b"GET /pages/own HTTP/0.9\r\n", b"GET /pages/own HTTP/1.2\r\n", b"GET /pages/own HTTP/2.0\r\n",
            b"GET /pages/own HTTP/1.1 HTTP/1.1\r\n", b"GET  /pages/own HTTP/1.1\r\n", b"GET /pages/own  HTTP/1.1\r\n",
            b"GET\t/pages/own\tHTTP/1.1\r\n", b"GET /pages/own HTTP/1.1\n", b"GET /pages/own HTTP/1.1\r", b"GET /pages/own http/1.1\r\n",
            b"GET /pages/own HTTP/1.1\x00\r\n", b"GET /pages/own HTTP/1.10\r\n", b"GET /pages/own HTTP/01.1\r\n",
            b"\r\nGET /pages/own HTTP/1.1\r\n", b"\nGET /pages/own HTTP/1.1\r\n", b" GET /pages/own HTTP/1.1\r\n",
            b"G\x00ET /pages/own HTTP/1.1\r\n", b"GET /pages/own\x00 HTTP/1.1\r\n", b"GET /pages/own\x0b HTTP/1.1\r\n",
            b"GET /pages/own#x HTTP/1.1\r\n", b"GET /pages/\xc3\xb6wn HTTP/1.1\r\n", b"GET /pages/own HTTP/1.1\r\n folded: x\r\n",
            b"HTTP/1.1 200 OK\r\n", b"PRI * HTTP/2.0\r\n",
        ]
    },
    "bare LF": (GET + b"\r\n").replace(b"\r\n", b"\n") + HIDDEN,
    "bare LF at the end": GET + b"\n" + HIDDEN,
    "CR CR LF at the end": GET + b"\r\r\n" + HIDDEN,
    "a response splitting value": GET + b"x: a\r\n\rb\r\n\r\n" + HIDDEN,
    "NUL in a value": GET + b"x: a\x00b\r\n\r\n" + HIDDEN,
    "an expectation of something else": POST + b"expect: 200-ok\r\n" + LENGTH + b"\r\n" + HIDDEN,
}

# Each gets one refusal; the connection may go on, but what was hidden is no request.
DENIED = {
    "no host": b"GET /pages/own HTTP/1.1\r\n\r\n",
    "an empty host": b"GET /pages/own HTTP/1.1\r\nhost:\r\n\r\n",
    "two hosts": GET + b"host: evil\r\n\r\n",
    "another spelling of two hosts": GET + b"Host: backend\r\n\r\n",
    "an absolute target": b"GET http://backend/pages/own HTTP/1.1\r\nhost: evil\r\n\r\n",
    "an absolute target of the same host": b"GET http://backend/pages/own HTTP/1.1\r\nhost: backend\r\n\r\n",
    "the target of a proxy": b"CONNECT backend:80 HTTP/1.1\r\nhost: backend:80\r\n\r\n",
    "a target of all": b"OPTIONS * HTTP/1.1\r\nhost: backend\r\n\r\n",
    "user information in the host": b"GET /pages/own HTTP/1.1\r\nhost: root@backend\r\n\r\n",
    "a path in the host": b"GET /pages/own HTTP/1.1\r\nhost: backend/pages/smuggled?\r\n\r\n",
    "a list of hosts": b"GET /pages/own HTTP/1.1\r\nhost: backend, evil\r\n\r\n",
    "a space in the host": b"GET /pages/own HTTP/1.1\r\nhost: backend evil\r\n\r\n",
    "no target": b"GET backend HTTP/1.1\r\nhost: backend\r\n\r\n",
    "CL taken off by Connection": POST + b"connection: content-length\r\n" + LENGTH + b"\r\n" + HIDDEN,
    "Host taken off by Connection": GET + b"connection: host\r\n\r\n",
    "a body where none belongs": GET + LENGTH + b"\r\n" + HIDDEN,
    "a chunked body where none belongs": GET + CHUNKED + b"\r\n%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n",
    "a denied request's body": POST.replace(b"own", b"denied") + LENGTH + b"\r\n" + HIDDEN,
    "a denied request's chunks": POST.replace(b"own", b"denied") + CHUNKED + b"\r\n%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n",
    "h2c": GET + b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAA\r\n\r\n",
    "h2c with early data": GET + b"connection: upgrade\r\nupgrade: h2c\r\n\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a websocket where the map knows none": GET + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n" + HIDDEN,
    "an upgrade with a body": POST + b"connection: upgrade\r\nupgrade: websocket\r\n" + LENGTH + b"\r\n" + HIDDEN,
    "a method in small letters": b"get /pages/own HTTP/1.1\r\nhost: backend\r\n\r\n",
    "another method": b"GETX /pages/own HTTP/1.1\r\nhost: backend\r\n\r\n",
    "a method by a header": b"TRACE /pages/own HTTP/1.1\r\nhost: backend\r\nx-http-method-override: GET\r\n\r\n",
    "bytes beyond ASCII": GET + b"x: \xff\r\n\r\n",
}

# Odd, but with one meaning only: each is served, and so is the next.
SERVED = {
    "a body that reads like a request": POST + LENGTH + b"\r\n" + HIDDEN,
    "chunks that read like a request": POST + CHUNKED + b"\r\n%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n",
    "chunks in capitals": POST + b"Transfer-Encoding: CHUNKED\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n",
    "a tab before the coding": POST + b"transfer-encoding:\tchunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    "trailers": POST + CHUNKED + b"\r\n1\r\nx\r\n0\r\nx-forwarded-user: root\r\n\r\n",
    "a coding by another name": POST + b"transfer_encoding: chunked\r\n" + LENGTH + b"\r\n" + HIDDEN,
    "a length by another name": POST + b"Content_Length: 0\r\ncontent.length: 0\r\n" + LENGTH + b"\r\n" + HIDDEN,
    "a type by another name": POST + b"Content_Type: application/json\r\nContent+Encoding: gzip\r\n" + LENGTH + b"\r\n" + HIDDEN,
    "a length of nothing": POST + b"content-length: 0\r\n\r\n",
    "a coding taken off by Connection": POST + b"connection: transfer-encoding\r\n" + CHUNKED + b"\r\n1\r\nx\r\n0\r\n\r\n",
}

# With one meaning or none.
EITHER = {
    "chunk extensions": POST + CHUNKED + b'\r\n1;a=b;c="d"\r\nx\r\n0;e\r\n\r\n',
    "a last chunk of several noughts": POST + CHUNKED + b"\r\n1\r\nx\r\n000\r\n\r\n",
    "a chunk size with noughts before": POST + CHUNKED + b"\r\n0001\r\nx\r\n0\r\n\r\n",
}


def answers(stream, payload, whole=False):
    """The statuses of the answers, and whether the connection ended; with `whole`, one answer is waited for."""
    stream.sendall(payload)
    heard = b""
    try:
        while data := stream.recv(65536):
            heard += data
            if whole and b"\r\n\r\n" in heard:
                break
        ended = True
    except TimeoutError:
        ended = False
    except OSError:
        ended = True  # a reset
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([2-5]\d\d) ", heard)], ended


def http1(connect):
    for name, payload in REFUSED.items():
        with connect("http/1.1") as stream:
            statuses, ended = answers(stream, payload)
        # A bad body may have been found when the request was judged already.
        if not (len(statuses) == 1 and statuses[0] >= 400 and ended):
            yield f"{name}: {statuses}, {'ended' if ended else 'open'}"
    for name, payload in DENIED.items():
        with connect("http/1.1") as stream:
            statuses, _ = answers(stream, payload, whole=True)
        # What is no request behind it may be refused in the same breath.
        if not (statuses and 400 <= statuses[0] < 500 and statuses[1:] in ([], [400], [505])):
            yield f"{name}: {statuses}"
        # And with a good one behind it.
        with connect("http/1.1") as stream:
            statuses, ended = answers(stream, payload + NEXT)
        if not (statuses and 400 <= statuses[0] < 500 and statuses[1:] in ([], [200], [400], [505]) and ended):
            yield f"{name}, and one more: {statuses}, {'ended' if ended else 'open'}"
    for name, payload in SERVED.items():
        with connect("http/1.1") as stream:
            statuses, ended = answers(stream, payload + NEXT)
        if not (statuses == [200, 200] and ended):
            yield f"{name}: {statuses}, {'ended' if ended else 'open'}"
    for name, payload in EITHER.items():
        with connect("http/1.1") as stream:
            statuses, ended = answers(stream, payload + NEXT)
        if not ((statuses == [200, 200] or (len(statuses) == 1 and statuses[0] >= 400)) and ended):
            yield f"{name}: {statuses}, {'ended' if ended else 'open'}"
    # Many at once, good ones and others, each judged by itself.
    several = (GET + b"\r\n" + GET.replace(b"own", b"denied") + b"\r\n") * 20 + NEXT
    with connect("http/1.1") as stream:
        statuses, ended = answers(stream, several)
    if statuses != [200, 403] * 20 + [200] or not ended:
        yield f"pipelined: {statuses}"


# HTTP/2.

REQUEST = [(":method", "GET"), (":scheme", "http"), (":authority", "backend"), (":path", "/pages/own")]


def changed(name, value):
    return [(known, value if known == name else other) for known, other in REQUEST]


def posted(*fields):
    return changed(":method", "POST") + list(fields)


# Headers, body and trailers.
STREAMS = {
    "CL below the body": (posted(("content-length", "3")), HIDDEN, None),
    "CL above the body": (posted(("content-length", "3000")), HIDDEN, None),
    "CL twice": (posted(("content-length", "0"), ("content-length", str(len(HIDDEN)))), HIDDEN, None),
    "CL of something else": (posted(("content-length", "+5")), b"12345", None),
    "TE": (posted(("transfer-encoding", "chunked")), b"0\r\n\r\n" + HIDDEN, None),
    "TE and CL": (posted(("transfer-encoding", "chunked"), ("content-length", str(len(HIDDEN) + 5))), b"0\r\n\r\n" + HIDDEN, None),
    "Connection": (REQUEST + [("connection", "keep-alive")], b"", None),
    "Keep-Alive": (REQUEST + [("keep-alive", "timeout=5")], b"", None),
    "Proxy-Connection": (REQUEST + [("proxy-connection", "keep-alive")], b"", None),
    "Upgrade": (REQUEST + [("upgrade", "websocket")], b"", None),
    "TE field of something else": (REQUEST + [("te", "gzip")], b"", None),
    "line break in a value": (REQUEST + [("x", "a\r\ntransfer-encoding: chunked")], b"", None),
    "LF in a value": (REQUEST + [("x", "a\ntransfer-encoding: chunked")], b"", None),
    "CR in a value": (REQUEST + [("x", "a\rtransfer-encoding: chunked")], b"", None),
    "NUL in a value": (REQUEST + [("x", "a\0b")], b"", None),
    "a request in a value": (REQUEST + [("x", "a\r\n\r\n" + HIDDEN.decode())], b"", None),
    "line break in a name": (REQUEST + [("x: a\r\ntransfer-encoding", "chunked")], b"", None),
    "colon in a name": (REQUEST + [("transfer-encoding:", "chunked")], b"", None),
    "space in a name": (REQUEST + [("transfer-encoding ", "chunked")], b"", None),
    "capitals in a name": (REQUEST + [("Transfer-Encoding", "chunked")], b"", None),
    "no name": (REQUEST + [("", "chunked")], b"", None),
    "line break in the path": (changed(":path", "/pages/own HTTP/1.1\r\nhost: backend\r\n\r\n" + HIDDEN.decode()), b"", None),
    "space in the path": (changed(":path", "/pages/own HTTP/1.1"), b"", None),
    "LF in the path": (changed(":path", "/pages/own\nx"), b"", None),
    "bytes beyond ASCII in the path": (changed(":path", "/pages/öwn"), b"", None),
    "a fragment in the path": (changed(":path", "/pages/own#/pages/smuggled"), b"", None),
    "an absolute path": (changed(":path", "http://evil/pages/own"), b"", None),
    "no slash": (changed(":path", "pages/own"), b"", None),
    "an empty path": (changed(":path", ""), b"", None),
    "an asterisk": (changed(":path", "*"), b"", None),
    "line break in the method": (changed(":method", "GET /pages/smuggled HTTP/1.1\r\nx: "), b"", None),
    "space in the method": (changed(":method", "GET /pages/smuggled"), b"", None),
    "an empty method": (changed(":method", ""), b"", None),
    "line break in the authority": (changed(":authority", "backend\r\nx: y"), b"", None),
    "user information in the authority": (changed(":authority", "root@backend"), b"", None),
    "a path in the authority": (changed(":authority", "backend/pages/smuggled?"), b"", None),
    "an empty authority": (changed(":authority", ""), b"", None),
    "line break in the scheme": (changed(":scheme", "http://evil/\r\n\r\n"), b"", None),
    "a path in the scheme": (changed(":scheme", "http://evil/pages/smuggled?"), b"", None),
    "another host": (REQUEST + [("host", "evil")], b"", None),
    "two hosts": (REQUEST + [("host", "backend"), ("host", "evil")], b"", None),
    "two paths": (REQUEST + [(":path", "/pages/smuggled")], b"", None),
    "two methods": (REQUEST + [(":method", "POST")], b"", None),
    "no path": (REQUEST[:3], b"", None),
    "no method": (REQUEST[1:], b"", None),
    "no scheme": (REQUEST[:1] + REQUEST[2:], b"", None),
    "a pseudo-field that is none": (REQUEST + [(":target", "/pages/smuggled")], b"", None),
    "an answer's pseudo-field": (REQUEST + [(":status", "200")], b"", None),
    "a pseudo-field behind a field": (REQUEST[:3] + [("x", "y")] + REQUEST[3:], b"", None),
    "an extended CONNECT": (changed(":method", "CONNECT") + [(":protocol", "websocket")], b"", None),
    "a CONNECT": ([(":method", "CONNECT"), (":authority", "backend")], HIDDEN, None),
    "a body where none belongs": (REQUEST, HIDDEN, None),
    "a length in the trailers": (posted(), b"x", [("content-length", "5")]),
    "a coding in the trailers": (posted(), b"x", [("transfer-encoding", "chunked")]),
    "a pseudo-field in the trailers": (posted(), b"x", [(":path", "/pages/smuggled")]),
    "line break in the trailers": (posted(), b"x", [("x", "a\r\n\r\n" + HIDDEN.decode())]),
}
# These may pass, for the parser takes the odd part away before anybody judges; the others may not.
HARMLESS = {"a length in the trailers", "a fragment in the path", "a pseudo-field in the trailers"}

GOOD_STREAMS = {
    "a plain one": (REQUEST, b"", None),
    "a body that reads like a request": (posted(), HIDDEN, None),
    "the same with a length": (posted(("content-length", str(len(HIDDEN)))), HIDDEN, None),
    "trailers that claim something": (posted(), HIDDEN, [("x-forwarded-user", "root")]),
    "fields by other names": (
        posted(("transfer_encoding", "chunked"), ("content_length", "0"), ("ho_st", "evil"), ("te", "trailers")), HIDDEN, None
    ),
}


def stream(connect, headers, body, trailers):
    """The status of a request on a connection of its own; none if it was reset or hung up on."""
    config = h2.config.H2Configuration(
        client_side=True,
        header_encoding="utf-8",
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        split_outbound_cookies=False,
    )
    connection = h2.connection.H2Connection(config)
    connection.initiate_connection()
    last = not body and trailers is None
    connection.send_headers(1, headers, end_stream=last)
    # The package counts no lengths for what it sends.
    if body:
        connection.send_data(1, body, end_stream=trailers is None)
    if trailers is not None:
        block = connection.encoder.encode(trailers)
        tail = connection.data_to_send()
        tail += len(block).to_bytes(3, "big") + b"\x01\x05" + (1).to_bytes(4, "big") + block
    else:
        tail = connection.data_to_send()
    status = None
    with connect("h2") as wire:
        try:
            wire.sendall(tail)
            while data := wire.recv(65536):
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.ResponseReceived):
                        status = int(dict(event.headers)[":status"])
                    elif isinstance(event, (h2.events.StreamReset, h2.events.ConnectionTerminated)):
                        # A reset without an error asks for nothing but the end of the request (RFC 9113 §8.1).
                        return status
                    elif isinstance(event, h2.events.StreamEnded):
                        return status
                wire.sendall(connection.data_to_send())
        except TimeoutError:
            return "open"
        except (OSError, h2.exceptions.ProtocolError):
            pass  # hung up on
    return status


def http2(connect):
    for name, (headers, body, trailers) in STREAMS.items():
        status = stream(connect, headers, body, trailers)
        if status == "open" or (status is not None and status < 400 and name not in HARMLESS):
            yield f"HTTP/2, {name}: {status}"
    for name, (headers, body, trailers) in GOOD_STREAMS.items():
        status = stream(connect, headers, body, trailers)
        if status != 200:
            yield f"HTTP/2, {name}: {status}"


def main():
    print(app(), flush=True)
    client, server, folder = sys.stdin.readline().rstrip().split(" ", 2)
    folder = pathlib.Path(folder)

    def from_here(_protocol):
        return socket.create_connection(("127.0.0.1", int(client)), timeout=PATIENCE_SECONDS)

    def as_peer(protocol):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Identity is the SPIFFE ID; this client is content with the authority.
        context.check_hostname = False
        context.load_verify_locations(folder / "client.ca.crt")
        context.load_cert_chain(folder / "client.crt", folder / "client.key")
        context.set_alpn_protocols([protocol])
        stream = context.wrap_socket(socket.create_connection(("127.0.0.1", int(server)), timeout=PATIENCE_SECONDS))
        assert stream.selected_alpn_protocol() == protocol
        return stream

    wrong = []
    for way, connect in [("from here", from_here), ("as a peer", as_peer)]:
        wrong += [f"{way}: {what}" for part in (http1, http2) for what in part(connect)]
    tried = len(REFUSED) + len(DENIED) + len(SERVED) + len(EITHER) + len(STREAMS) + len(GOOD_STREAMS)
    print(json.dumps({"tried": tried, "wrong": wrong, "seen": SEEN}), flush=True)


if __name__ == "__main__":
    main()
