"""The server side's door itself: connections that idle, and connections that come new each second."""

import argparse
import json
import resource
import subprocess
import sys
import threading
import time

from . import chains, place, table
from .load import open_loop
from .procs import Running, note


def _client(*arguments):
    return [sys.executable, str(place.ROOT / "bench" / "harness" / "mtls.py"), str(place.CERTS), *map(str, arguments)]


def _doors(names):
    return [chains.by_name(name) for name in names.split(",")]


def idle(arguments):
    """`--connections` that have shaken hands over mTLS, speak HTTP/2, answer pings, and ask nothing; `ours-mux` is our own
    door with what our sidecars speak between them. No more than half of the descriptors that a process may have, of
    which our door keeps the other half for its app."""
    parser = argparse.ArgumentParser(prog="bench/run idle", description=idle.__doc__)
    parser.add_argument("--chains", default="envoy,haproxy,ours,ours-mux")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--seconds", type=int, default=45, help="that they idle: longer than any ping or head timeout")
    args = parser.parse_args(arguments)
    place.demand(["nginx", "haproxy"], wants_envoy="envoy" in args.chains)
    place.enter_private_network()
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    connections = min(args.connections, int(descriptors * 0.46))
    if connections < args.connections:
        note(f"{connections} connections: a process may have {descriptors} descriptors")
    rows = []
    with Running() as running:
        chains.app(running)
        for name in args.chains.split(","):
            protocol = "palisade-mux/1" if name.endswith("-mux") else "h2"
            chain = chains.by_name(name.removesuffix("-mux"))
            processes = chain.start(running)
            server = processes[0]
            before = server.rss_mb()
            client = subprocess.Popen(_client("idle", server.ready, connections, protocol), stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True)
            opened = json.loads(client.stdout.readline())
            note(f"{name}: {opened}")
            at_once, spent = server.rss_mb(), server.cpu_seconds()
            time.sleep(args.seconds)
            after, spent = server.rss_mb(), server.cpu_seconds() - spent
            alive = json.loads(client.communicate("end\n")[0].strip().splitlines()[-1])["alive"]
            rows.append([name, f"{opened['open']:,}", f"{alive:,}", f"{before:.0f}", f"{at_once:.0f}", f"{after:.0f}",
                         f"{(after - before) * 1024 / max(1, opened['open']):.1f}", f"{spent / args.seconds * 100:.1f}"])
            for process in processes:
                process.stop()
    table.show(["door", "opened", "alive at the end", "RSS MB before", "when open", f"after {args.seconds} s",
                "KiB a connection", "CPU % meanwhile"], rows)


def handshakes(arguments):
    """Established traffic at a fixed rate, first alone and then while `--rate` new connections a second shake hands."""
    parser = argparse.ArgumentParser(prog="bench/run handshakes", description=handshakes.__doc__)
    parser.add_argument("--chains", default="envoy,haproxy,ours")
    parser.add_argument("--rate", type=int, default=1_000)
    parser.add_argument("--clients", type=int, default=4, help="processes that shake hands")
    parser.add_argument("--rps", type=int, default=500, help="of the established traffic")
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(arguments)
    place.demand(["nginx", "haproxy", "h2load"], wants_envoy="envoy" in args.chains)
    place.enter_private_network()
    results = {}
    with Running() as running:
        chains.app(running)
        started = [(chain, chain.start(running)) for chain in _doors(args.chains)]
        for chain, _ in started:
            table.warm_up(chain, "/", 4)
        for turn in range(args.rounds):
            for chain, processes in started:
                quiet = open_loop(chain.url + "/", args.seconds, args.rps)
                busy, done = _while_shaking(chain, processes[0], args)
                results.setdefault(chain.name, []).append((quiet, busy, done))
                note(f"round {turn + 1} {chain.name}: p99 {quiet['p99']} → {busy['p99']} µs, {done}")
    rows = []
    for name, runs in results.items():
        quiet = table.median([run[0] for run in runs], "p99") / 1000
        busy = table.median([run[1] for run in runs], "p99") / 1000
        rows.append([name, f"{table.median([run[2] for run in runs], 'rate'):,.0f}", str(sum(run[2]["failed"] for run in runs)),
                     f"{table.median([run[2] for run in runs], 'cpu'):.2f}", f"{quiet:.2f}", f"{busy:.2f}", f"{busy / quiet:.1f}",
                     str(sum(run[0]["non2xx"] + run[1]["non2xx"] for run in runs))])
    table.show(["door", "handshakes/s", "failed", "server CPU s / 1,000", "p99 ms before", "p99 ms meanwhile", "×", "errors"], rows)


def _while_shaking(chain, server, args):
    each = args.rate // args.clients
    # Longer than the measured traffic on either side.
    shakers = [subprocess.Popen(_client("shake", server.ready, each, args.seconds + 3), stdout=subprocess.PIPE, text=True)
               for _ in range(args.clients)]
    spent, began = server.cpu_seconds(), time.monotonic()
    outs = [None] * len(shakers)

    def read(n):
        outs[n] = json.loads(shakers[n].communicate()[0])

    readers = [threading.Thread(target=read, args=(n,)) for n in range(len(shakers))]
    for reader in readers:
        reader.start()
    time.sleep(1)
    busy = open_loop(chain.url + "/", args.seconds, args.rps)
    for reader in readers:
        reader.join()
    spent, took = server.cpu_seconds() - spent, time.monotonic() - began
    count, failed = sum(out["done"] for out in outs), sum(out["failed"] for out in outs)
    # The established traffic's own share is a few per cent; it is in the figure.
    return busy, {"rate": sum(out["rate"] for out in outs), "failed": failed, "cpu": spent / max(1, count) * 1000, "took": took}
