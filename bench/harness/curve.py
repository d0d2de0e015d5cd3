"""What a request costs the server's side while rules and routes grow, peers and ours in the same run."""

import argparse
import pathlib
import statistics
import sys

from . import chains, place, table
from .load import closed_loop
from .procs import Running

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import policies  # noqa: E402  (bench/policies.py, a program of its own)

PEER_RULES = [5, 1005]
OUR_RULES = [10, 100, 1_000, 10_000]
OUR_ROUTES = [1, 10, 100, 1_000]
# What stays the same while the other one grows.
RULES, ROUTES = 100, 20


def ours(label, port, rules, routes):
    directory = place.CONF / f"policies-{rules}-{routes}"
    policies.write(directory, rules, routes)
    return label, rules, routes, chains.palisade(label.replace(" ", "-"), port, directory)


def lines():
    """(line, rules, routes, chain), each on ports of its own."""
    port = iter(range(17000, 19000, 20))
    for rules in PEER_RULES:
        yield "envoy RBAC", rules, 1, chains.envoy(f"envoy-{rules}", next(port), "h2", rules=rules)
    for rules in PEER_RULES:
        yield "haproxy ACL", rules, 1, chains.haproxy(f"haproxy-{rules}", next(port), rules=rules)
    for rules in OUR_RULES:
        yield ours(f"ours {rules} rules", next(port), rules, ROUTES)
    for routes in OUR_ROUTES:
        yield ours(f"ours {routes} routes", next(port), RULES, routes)


def main(arguments):
    parser = argparse.ArgumentParser(prog="bench/run curve", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--connections", type=int, default=32)
    args = parser.parse_args(arguments)
    place.demand(["wrk", "nginx", "haproxy"], wants_envoy=True)
    place.enter_private_network()
    with Running() as running:
        chains.app(running)
        laid_out = list(lines())
        started = [(chain, chain.start(running)) for _, _, _, chain in laid_out]
        for chain, _ in started:
            table.warm_up(chain, "/", args.connections)
        results = table.rounds(
            started, args.rounds, lambda chain: closed_loop(chain.url + "/", args.seconds, args.connections)
        )

    def server_cpu(chain):
        return statistics.median(run["cpu"][0] for run in results[chain.name])

    first, rows = {}, []
    for label, rules, routes, chain in laid_out:
        kind = label if not label.startswith("ours") else label.split()[0] + label.split()[2]
        spent = server_cpu(chain)
        least = first.setdefault(kind, spent)
        runs = results[chain.name]
        rows.append([
            label.split()[0] if label.startswith("ours") else label, f"{rules:,}", f"{routes:,}", f"{spent:.2f}",
            f"{spent / least:.2f}", f"{table.median(runs, 'rps'):,.0f}", f"{table.median(runs, 'p99') / 1000:.2f}",
            f"{runs[-1]['rss'][0]:.0f}", str(sum(run["non2xx"] for run in runs)),
        ])
    table.show(
        ["server side", "rules", "routes", "CPU s / 100k", "× its first", "requests/s", "p99 ms", "RSS MB", "errors"], rows
    )
