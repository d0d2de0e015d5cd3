"""Unary calls of gRPC's shape over HTTP/2 through Envoy and through ours: a POST of one small message each, answered
with the same message and a `grpc-status` trailer by nghttpd."""

import argparse
import struct
import subprocess

from . import chains, place, table
from .load import h2load
from .peers import small_policies
from .procs import Running

PATH = "/demo.Echo/Unary"
APP_PORT = 18081
MESSAGE_BYTES = 64
SCHEMA = """\
namespace Echo {
  entity Method;
  action Call appliesTo { principal: [Mesh::Workload], resource: [Method], context: Mesh::Context };
}
"""
MAP = f"""\
[[route]]
match = "POST {PATH}"
action = "Call"
object = 'Method::"Echo/Unary"'
body_type = "opaque"
"""
RULE = """\
@id("client-calls-echo")
permit (
  principal == Mesh::Workload::"spiffe://mesh.test/ns/default/sa/client",
  action == Echo::Action::"Call",
  resource == Echo::Method::"Echo/Unary"
);
"""


def check_trailer(chain, message):
    """A call that lost its status on the way would be fast and worth nothing."""
    call = [place.program("nghttp"), "--verbose", f"--data={message}", "-H", "content-type: application/grpc", "-H", "te: trailers"]
    said = subprocess.run([*call, chain.url + PATH], capture_output=True, text=True, timeout=10).stdout
    if "grpc-status: 0" not in said:
        raise SystemExit(f"{chain.name} answers without a grpc-status:\n{said[-2000:]}")


def main(arguments):
    parser = argparse.ArgumentParser(prog="bench/run grpc", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--streams", type=int, default=4, help="calls at once on a connection")
    args = parser.parse_args(arguments)
    place.demand(["h2load", "nghttpd"], wants_envoy=True)
    place.enter_private_network()

    message = place.CONF / "grpc-message"
    message.write_bytes(struct.pack(">BI", 0, MESSAGE_BYTES) + bytes(MESSAGE_BYTES))
    call = [f"-c{args.connections}", f"-m{args.streams}", f"--data={message}",
            "-H", "content-type: application/grpc", "-H", "te: trailers"]
    app = [place.program("nghttpd"), "--no-tls", "--echo-upload", "--trailer=grpc-status: 0", "--htdocs",
           str(place.PEERS / "www"), str(APP_PORT)]
    with Running() as running:
        running.start("grpc-app", app, APP_PORT)
        pairs = [
            chains.Chain("direct", f"http://127.0.0.1:{APP_PORT}", []),
            chains.envoy("grpc-envoy", 16500, "h2", app=APP_PORT, app_h2=True),
            chains.palisade("grpc-ours", 16600, small_policies("echo", SCHEMA, MAP, RULE),
                            app=APP_PORT, app_protocol="h2c", service="echo"),
        ]
        started = [(chain, chain.start(running)) for chain in pairs]
        for chain, _ in started:
            check_trailer(chain, message)
            warm = h2load(chain.url + PATH, 2, call)
            if not warm["requests"] or warm["non2xx"]:
                raise SystemExit(f"{chain.name}: of {warm['requests']} calls {warm['non2xx']} failed; see .peers/logs")
        results = table.rounds(started, args.rounds, lambda chain: h2load(chain.url + PATH, args.seconds, call))
    print(f"{PATH}, {MESSAGE_BYTES} bytes each way, {args.connections} connections × {args.streams} calls, "
          f"{args.rounds} rounds of {args.seconds} s\n")
    table.show(table.CLOSED, [table.closed_row(chain.name, results[chain.name]) for chain in pairs])
