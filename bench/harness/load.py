"""Load from one thread: wrk as fast as answers come, h2load at a fixed rate. Times are microseconds."""

import json
import pathlib
import subprocess

from . import place

REPORT = pathlib.Path(__file__).with_name("report.lua")


def percentile(ordered, per_mille):
    return ordered[min(len(ordered) - 1, len(ordered) * per_mille // 1000)]


def closed_loop(url, seconds, connections, close=False):
    """As many requests as `connections` carry one after the other; each its own connection with `close`."""
    command = [place.program("wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(REPORT)]
    if close:
        command += ["-H", "Connection: close"]
    out = subprocess.run([*command, url], capture_output=True, text=True, check=True).stdout
    found = json.loads(out.strip().splitlines()[-1])
    found["rps"] = found["requests"] / found["seconds"]
    return found


def open_loop(url, seconds, rate, connections=16, extra=()):
    """`rate` requests a second over HTTP/1.1; a request waits for its connection, and that counts."""
    each = max(1, round(rate / connections))
    return h2load(url, seconds, ["--h1", f"-c{connections}", f"--rps={each}", *extra])


def h2load(url, seconds, options):
    log = place.LOGS / "h2load.log"
    log.unlink(missing_ok=True)
    command = [place.program("h2load"), "-t1", f"--duration={seconds}", "--warm-up-time=1", f"--log-file={log}"]
    subprocess.run([*command, *options, url], capture_output=True, check=True)
    times, failed = [], 0
    for line in log.read_text().splitlines():
        _, status, took = line.split("\t")[:3]
        times.append(int(took))
        # -1 is a stream that failed; 0 an answer over HTTP/1.1 without a reason phrase, such as HAProxy's.
        failed += status != "0" and not status.startswith("2")
    times.sort()
    if not times:
        return {"requests": 0, "rps": 0.0, "non2xx": 0, "p50": 0, "p99": 0, "p999": 0}
    found = {name: percentile(times, per_mille) for name, per_mille in [("p50", 500), ("p99", 990), ("p999", 999)]}
    return {"requests": len(times), "rps": len(times) / seconds, "non2xx": failed, **found}
