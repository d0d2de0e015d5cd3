"""Server-sent events through two sidecars: an app and its readers, by the standard library.

    events.py       says the app's port, reads the client's, then says each part that works

App and readers are one process, so that the app can wait until its last event has arrived: whatever is held back on the
way holds everything up for ever.
"""

import http.client
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Bounds a hang.
DEADLINE_SECONDS = 60
LONG_EVENTS = 20_000
LONG_EVENT_BYTES = 2_000


class Feed:
    """What the app sends next, and what became of its reader."""

    def __init__(self):
        self.events = queue.Queue()
        self.gone = threading.Event()
        self.asked = None


FEEDS = {}


class App(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        feed = FEEDS[self.path.removeprefix("/feeds/")]
        feed.asked = self.headers
        chunked = "until-close" not in self.path
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Transfer-Encoding" if chunked else "Connection", "chunked" if chunked else "close")
        self.end_headers()
        self.close_connection = True
        threading.Thread(target=self.watch, args=(feed,), daemon=True).start()
        while (event := feed.events.get()) is not None:
            data = event.encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
            self.wfile.flush()
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def watch(self, feed):
        """Nothing more is asked on this connection: what there is to read is its end."""
        try:
            self.connection.recv(1)
        except OSError:
            pass
        feed.gone.set()
        feed.events.put(None)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Reader:
    """One reader of one feed."""

    def __init__(self, port, name, **headers):
        self.feed = FEEDS[name] = Feed()
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_SECONDS)
        self.connection.request("GET", f"/feeds/{name}", headers={"Accept": "text/event-stream", **headers})
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200, self.answer.status
        assert self.answer.getheader("Content-Type") == "text/event-stream"
        assert self.answer.getheader("Cache-Control") == "no-store"

    def send(self, data):
        self.feed.events.put(f"data: {data}\n\n")

    def hear(self):
        lines = []
        while line := self.answer.readline().decode().rstrip("\n"):
            lines.append(line.removeprefix("data: "))
        return "\n".join(lines)

    def leave(self):
        self.answer.close()
        self.connection.close()


def one_by_one(port):
    for name in ["news", "news-until-close"]:
        reader = Reader(port, name, **{"Last-Event-ID": "41"})
        assert reader.feed.asked["Last-Event-ID"] == "41", reader.feed.asked.items()
        for number in range(500):
            reader.send(number)
            assert reader.hear() == str(number)
        large = "x" * 1_000_000
        reader.send(large)
        assert reader.hear() == large
        reader.feed.events.put(None)
        assert reader.answer.read() == b""


def many(port):
    def follow(number):
        reader = Reader(port, f"crowd-{number}")
        for turn in range(50):
            reader.send(turn)
            assert reader.hear() == str(turn)
        reader.leave()
        assert reader.feed.gone.wait(DEADLINE_SECONDS), "the app was not told"

    with ThreadPoolExecutor(50) as together:
        list(together.map(follow, range(50)))


def long(port):
    reader = Reader(port, "long")
    filling = "x" * LONG_EVENT_BYTES
    for number in range(LONG_EVENTS):
        reader.send(f"{number} {filling}")
    for number in range(LONG_EVENTS):
        heard, _, rest = reader.hear().partition(" ")
        assert (heard, rest) == (str(number), filling), (heard, number)
    reader.leave()


def leaving(port):
    # After some events, before the first, and with more on the way than anybody has room for.
    reader = Reader(port, "left")
    reader.send(1)
    assert reader.hear() == "1"
    reader.leave()
    assert reader.feed.gone.wait(DEADLINE_SECONDS), "the app was not told"
    silent = Reader(port, "silent")
    silent.leave()
    assert silent.feed.gone.wait(DEADLINE_SECONDS), "the app was not told"
    full = Reader(port, "full")
    for _ in range(2_000):
        full.send("x" * 10_000)
    assert full.hear() == "x" * 10_000
    full.leave()
    assert full.feed.gone.wait(DEADLINE_SECONDS), "the app was not told"


def refusal(port):
    feed = FEEDS["secret"] = Feed()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_SECONDS)
    connection.request("GET", "/feeds/secret")
    assert connection.getresponse().status == 403
    assert feed.asked is None, "the app was asked"


def main():
    with Server(("127.0.0.1", 0), App) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_address[1], flush=True)
        port = int(sys.stdin.readline())
        for part in [one_by_one, many, long, leaving, refusal]:
            part(port)
            print(part.__name__, flush=True)
        server.shutdown()


if __name__ == "__main__":
    main()
