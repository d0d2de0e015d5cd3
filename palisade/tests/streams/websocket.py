"""Both ends of a WebSocket (RFC 6455), by the `websockets` package.

    websocket.py app             an app that echoes; says its port
    websocket.py talk PORT       everything that a client expects to work, and what must be refused
    websocket.py stay PORT       one connection, until the other side ends it
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.sync.server import serve

LARGE_BYTES = 1 << 20


def say(*words):
    print(*words, flush=True)


def echo(socket):
    socket.send(json.dumps(dict(socket.request.headers.raw_items())))
    try:
        for message in socket:
            if message == "leave":
                socket.close(4001, "as you wish")
                return
            socket.send(message)
    except ConnectionClosed:
        pass  # cut off


def app():
    def fits(socket, offered):
        return "chat.v2" if "chat.v2" in offered else None

    def full(socket, request):
        return socket.respond(503, "the room is full\n") if request.path == "/rooms/full" else None

    with serve(
        echo, "127.0.0.1", 0, select_subprotocol=fits, process_request=full, max_size=2 * LARGE_BYTES
    ) as server:
        say(server.socket.getsockname()[1])
        server.serve_forever()


def refused(url, **options):
    try:
        with connect(url, **options):
            return None
    except InvalidStatus as error:
        return error.response.status_code


def talk(base):
    room = f"{base}/rooms/lobby"
    claims = {"X-Forwarded-User": "root", "X-Forwarded-Client-Cert": "By=x;URI=spiffe://mesh.test/root"}
    with connect(room, subprotocols=["chat.v1", "chat.v2"], additional_headers=claims, max_size=None) as socket:
        assert socket.subprotocol == "chat.v2", socket.subprotocol
        seen = {name.lower(): value for name, value in json.loads(socket.recv()).items()}
        assert "x-forwarded-user" not in seen, seen
        assert seen["x-forwarded-client-cert"].endswith("URI=spiffe://mesh.test/ns/default/sa/client"), seen
        for message in ["", "text", "ü" * 1000, b"", b"\x00\xff", os.urandom(LARGE_BYTES)]:
            socket.send(message)
            assert socket.recv() == message
        socket.send(["in ", "three ", "frames"])
        assert socket.recv() == "in three frames"
        assert socket.ping().wait(30)
        socket.send("leave")
        try:
            socket.recv()
        except ConnectionClosed as closed:
            assert (closed.rcvd.code, closed.rcvd.reason) == (4001, "as you wish"), closed
        else:
            raise AssertionError("the app's farewell never came")
    # The client's side ends it first.
    with connect(room) as socket:
        socket.recv()

    def chat(number):
        with connect(room) as socket:
            socket.recv()
            for turn in range(50):
                socket.send(f"{number}-{turn}")
                assert socket.recv() == f"{number}-{turn}"

    with ThreadPoolExecutor(20) as together:
        list(together.map(chat, range(20)))

    assert refused(f"{base}/rooms/full") == 503
    assert refused(f"{base}/rooms/closed") == 403
    assert refused(f"{base}/feeds/other") == 403
    assert refused(f"{base}/lobby/lobby") == 400
    say("talked")


def stay(base):
    with connect(f"{base}/rooms/lobby") as socket:
        socket.recv()
        say("joined")
        try:
            socket.recv()
        except ConnectionClosed:
            say("ended")


if __name__ == "__main__":
    mode = sys.argv[1]
    if mode == "app":
        app()
    else:
        {"talk": talk, "stay": stay}[mode](f"ws://127.0.0.1:{sys.argv[2]}")
