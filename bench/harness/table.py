"""Interleaved rounds over started chains, and the table of their medians."""

import statistics
import subprocess

from . import load
from .procs import note

WARM_UP_SECONDS = 2


def status(url):
    command = ["curl", "--silent", "--max-time", "5", "--output", "/dev/null", "--write-out", "%{http_code}", url]
    return subprocess.run(command, capture_output=True, text=True).stdout


def warm_up(chain, path, connections):
    """Fails a chain that does not answer: a table of refusals would look fast."""
    found = status(chain.url + path)
    if found != "200":
        raise SystemExit(f"{chain.name} answers {path} with {found}; see .peers/logs")
    load.closed_loop(chain.url + path, WARM_UP_SECONDS, connections)


def measured(processes, run):
    """What `run` gives, with the processor seconds that each process spent meanwhile a 100,000 requests."""
    before = [process.cpu_seconds() for process in processes]
    found = run()
    spent = [process.cpu_seconds() - earlier for process, earlier in zip(processes, before)]
    found["cpu"] = [seconds / max(1, found["requests"]) * 100_000 for seconds in spent]
    found["rss"] = [process.rss_mb() for process in processes]
    return found


def rounds(started, count, run):
    """`run(chain)` for each chain, `count` times over, so that a busy moment hits all alike."""
    results = {chain.name: [] for chain, _ in started}
    for turn in range(count):
        for chain, processes in started:
            found = measured(processes, lambda: run(chain))
            results[chain.name].append(found)
            note(f"round {turn + 1} {chain.name}: {found['rps']:.0f}/s, p99 {found['p99'] / 1000:.2f} ms, "
                 f"cpu {sum(found['cpu']):.2f}")
    return results


def median(runs, key):
    return statistics.median(run[key] for run in runs)


def cpu(runs):
    """Medians of the processes in the order client, server; chains start the server first."""
    return [statistics.median(run["cpu"][n] for run in runs) for n in reversed(range(len(runs[0]["cpu"])))]


def cost(runs):
    parts = cpu(runs)
    return " + ".join(f"{part:.2f}" for part in parts) + f" = {sum(parts):.2f}" if parts else "–"


def memory(runs):
    return " + ".join(f"{part:.0f}" for part in reversed(runs[-1]["rss"])) or "–"


def closed_row(name, runs):
    low, high = min(run["rps"] for run in runs), max(run["rps"] for run in runs)
    return [
        name,
        f"{median(runs, 'rps'):,.0f} ({low:,.0f}–{high:,.0f})",
        f"{median(runs, 'p50') / 1000:.2f}",
        f"{median(runs, 'p99') / 1000:.2f}",
        cost(runs),
        memory(runs),
        str(sum(run["non2xx"] + run.get("socket_errors", 0) for run in runs)),
    ]


CLOSED = ["chain", "requests/s (least–most)", "p50 ms", "p99 ms", "proxy CPU s / 100k (client + server)", "RSS MB", "errors"]


def open_row(name, runs):
    times = [f"{median(runs, key) / 1000:.2f}" for key in ["p50", "p99", "p999"]]
    return [name, f"{median(runs, 'rps'):,.0f}", *times, cost(runs), str(sum(run["non2xx"] for run in runs))]


OPEN = ["chain", "at requests/s", "p50 ms", "p99 ms", "p99.9 ms", "proxy CPU s / 100k (client + server)", "errors"]


def show(head, rows):
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |")
    print(flush=True)
