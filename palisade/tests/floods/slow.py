"""Peers that are too slow, each on a connection of its own, all at once.

Usage: slow.py < STAGE

STAGE as for attack.py. Each peer keeps to the protocol, and goes on until it is dropped or has waited for much longer than the
sidecar says that it does. Prints a row for each, and ends with 1 if one was never dropped.
"""

import json
import sys
import threading
import time

import wire
from hyperframe import frame as frames

# A sidecar drops what is too slow within 30 s; this is for a busy machine.
DROPPED_BY_S = 60
BIG = "/api/1m"
NARROW_WINDOW = {frames.SettingsFrame.INITIAL_WINDOW_SIZE: 1024}


class Dropped(Exception):
    """How."""


def heed(connection, within_s):
    """Reads what comes in that time and answers pings, as a client does that is alive."""
    for frame in connection.frames(lambda _: False, within_s):
        if isinstance(frame, frames.PingFrame) and "ACK" not in frame.flags:
            connection.send(wire.ping(frame.opaque_data, flags=1))
        if isinstance(frame, frames.RstStreamFrame):
            raise Dropped(f"RST_STREAM {frame.error_code}")
        if isinstance(frame, frames.GoAwayFrame):
            raise Dropped(f"GOAWAY {frame.error_code}")
        if isinstance(frame, frames.HeadersFrame):
            status = int(dict(connection.decoder.decode(frame.data))[":status"])
            if status == 408:
                raise Dropped("status 408")
    if connection.ended:
        raise Dropped("closed")


def reads_nothing(connection):
    """Takes what comes into its window, and opens it no further."""
    connection.send(connection.ask(1, BIG))
    while True:
        yield heed(connection, 1)


def reads_a_little(connection):
    connection.send(connection.ask(1, BIG))
    while True:
        yield heed(connection, 1)
        connection.send(wire.window(1, 100) + wire.window(0, 100))


def leaves_its_socket_full(connection):
    """All the room there can be, and nothing is taken out of the socket."""
    connection.send(wire.window(0, 2**30) + b"".join(connection.ask(2 * at + 1, BIG) for at in range(20)))
    while connection.send(wire.raw(0xBE, 0, 0, b"")):
        yield time.sleep(1)
    raise Dropped("closed")


def writes_a_little(connection):
    connection.send(wire.headers(1, connection.block("/orders/1", "PUT"), end=False))
    while True:
        connection.send(wire.data(1, b"x"))
        yield heed(connection, 1)


def writes_less_than_it_announced(connection):
    connection.send(wire.headers(1, connection.block("/orders/1", "PUT", [("content-length", "100000")]), end=False))
    while True:
        yield heed(connection, 1)


def leaves_a_header_block_open(connection):
    connection.send(wire.headers(1, connection.block(), whole=False))
    while True:
        for frame in connection.frames(lambda _: False, 1):
            if isinstance(frame, frames.GoAwayFrame):
                raise Dropped(f"GOAWAY {frame.error_code}")
        if connection.ended:
            raise Dropped("closed")
        yield


def says_nothing(connection):
    while True:
        yield heed(connection, 1)


def says_half_a_preface(connection):
    connection.send(wire.PREFACE[:20])
    while True:
        yield heed(connection, 1)


def sends_no_settings(connection):
    connection.send(wire.PREFACE)
    while True:
        yield heed(connection, 1)


# Peer, settings it begins with, whether it greets, whether it has a place where all is tunnels.
PEERS = [
    (reads_nothing, NARROW_WINDOW, True, True),
    (reads_a_little, NARROW_WINDOW, True, True),
    (leaves_its_socket_full, {frames.SettingsFrame.INITIAL_WINDOW_SIZE: 2**30}, True, True),
    (writes_a_little, None, True, False),
    (writes_less_than_it_announced, None, True, False),
    (leaves_a_header_block_open, None, True, True),
    (says_nothing, None, False, True),
    (says_half_a_preface, None, False, True),
    (sends_no_settings, None, False, True),
]


def one(peer, settings, greets, target, folder, rows):
    began, how = time.monotonic(), None

    connection = wire.Wire(target, folder, settings, greets)
    try:
        for _ in peer(connection):
            if time.monotonic() - began > DROPPED_BY_S:
                break
    except Dropped as dropped:
        how = str(dropped)
    finally:
        connection.close()
    rows.append((target["name"], peer.__name__, how, time.monotonic() - began))


def main():
    stage = json.load(sys.stdin)
    rows, threads = [], []
    for target in stage["targets"]:
        for peer, settings, greets, tunnels in PEERS:
            if tunnels or not target["tunnel"]:
                arguments = (peer, settings, greets, target, stage["folder"], rows)
                threads.append(threading.Thread(target=one, args=arguments))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, peer, how, took_s in sorted(rows):
        print(f"{name:9} {peer:30} {took_s:5.1f} s  {how or 'never dropped'}")
    sys.exit(0 if len(rows) == len(threads) and all(how for _, _, how, _ in rows) else 1)


main()
