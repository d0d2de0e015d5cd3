#!/usr/bin/env python3
"""A client that does nothing but mutual TLS: `mtls.py CERTS idle PORT COUNT [ALPN]`, `mtls.py CERTS shake PORT RATE SECONDS`.

`idle` opens COUNT connections as HTTP/2, answers settings and pings, prints how many are open, and how many still are
once it reads a line; with another ALPN it says nothing on them. `shake` makes RATE full handshakes a second, each closed at once, and prints how many it made.
"""

import asyncio
import json
import resource
import socket
import ssl
import sys
import time

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, ACK = 4, 6, 1
AT_ONCE = 64
LOOPBACK = "127.0.0.1"


def frame(kind, flags=0, payload=b""):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + bytes(4) + payload


def context(certs, protocol):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.load_verify_locations(f"{certs}/ca.crt")
    made.load_cert_chain(f"{certs}/client.crt", f"{certs}/client.key")
    made.set_alpn_protocols([protocol])
    return made


async def keep(protocol, reader, writer):
    """Answers what a peer may want of an idle HTTP/2 connection until it ends."""
    try:
        if protocol != "h2":
            await reader.read()
            return
        writer.write(PREFACE + frame(SETTINGS))
        while True:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] in (SETTINGS, PING) and not head[4] & ACK:
                writer.write(frame(head[3], ACK, payload if head[3] == PING else b""))
    except (OSError, asyncio.IncompleteReadError):
        pass


async def idle(tls, port, count, protocol):
    slots = asyncio.Semaphore(AT_ONCE)
    keepers, failed = [], 0

    async def one():
        nonlocal failed
        async with slots:
            try:
                # Small buffers: the client's memory is not what is measured, and there are thousands.
                stream = await asyncio.open_connection(LOOPBACK, port, ssl=tls, limit=4096, ssl_handshake_timeout=60)
            except OSError:
                failed += 1
                return
        keepers.append(asyncio.create_task(keep(protocol, *stream)))

    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(count)))
    took = round(time.monotonic() - began, 1)
    print(json.dumps({"open": len(keepers), "failed": failed, "seconds": took}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    print(json.dumps({"alive": sum(not keeper.done() for keeper in keepers)}), flush=True)


def shake(tls, port, rate, seconds):
    """Paced: a handshake that was late is made up for, so that the rate is what was asked or the most that goes."""
    began = time.monotonic()
    done = failed = 0
    while (now := time.monotonic()) < began + seconds:
        due = began + (done + failed) / rate
        if due > now:
            time.sleep(due - now)
        try:
            with socket.create_connection((LOOPBACK, port), timeout=5) as plain, tls.wrap_socket(plain) as secure:
                secure.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # The peer's verdict on our certificate comes with its first record.
                secure.sendall(PREFACE + frame(SETTINGS))
                failed_now = not secure.recv(9)
        except OSError:
            failed_now = True
        failed, done = failed + failed_now, done + (not failed_now)
    took = time.monotonic() - began
    print(json.dumps({"done": done, "failed": failed, "rate": done / took}), flush=True)


def main():
    certs, what, port, *rest = sys.argv[1:]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    protocol = rest[1] if what == "idle" and len(rest) > 1 else "h2"
    tls = context(certs, protocol)
    if what == "idle":
        asyncio.run(idle(tls, int(port), int(rest[0]), protocol))
    else:
        shake(tls, int(port), int(rest[0]), int(rest[1]))


main()
