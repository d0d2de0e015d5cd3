"""Starting processes, and what they cost: processor time and resident memory of each with its children."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time

from . import place

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
START_SECONDS = 60
STOP_SECONDS = 5
DESCRIPTORS = 65_536


class Process:
    def __init__(self, name, command, ready, env=None):
        self.name, self.ready = name, ready
        log = open(place.LOGS / f"{name}.log", "wb")
        self.child = subprocess.Popen(
            command, cwd=place.ROOT, env={**os.environ, **(env or {})}, stdout=log, stderr=log, start_new_session=True
        )

    def wait_ready(self):
        """Until something listens; ends the run with the process's own words if it does not."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.child.poll() is None:
            with socket.socket() as probe:
                probe.settimeout(0.5)
                if probe.connect_ex(("127.0.0.1", self.ready)) == 0:
                    return
            time.sleep(0.05)
        words = (place.LOGS / f"{self.name}.log").read_text(errors="replace")[-2000:]
        raise SystemExit(f"{self.name} does not listen on {self.ready}:\n{words}")

    def pids(self):
        found, todo = [], [self.child.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            try:
                for task in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{task}/children") as children:
                        todo += [int(child) for child in children.read().split()]
            except OSError:
                pass
        return found

    def cpu_seconds(self):
        ticks = 0
        for pid in self.pids():
            with open(f"/proc/{pid}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / TICKS_A_SECOND

    def rss_mb(self):
        kilobytes = 0
        for pid in self.pids():
            with open(f"/proc/{pid}/status") as status:
                kilobytes += sum(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
        return kilobytes / 1024

    def stop(self):
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGTERM)
        try:
            self.child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()


class Running:
    """Processes that end with the block they were started in, the last one first."""

    def __init__(self):
        self.processes = []

    def __enter__(self):
        # Ten thousand connections are twice as many descriptors in a proxy, and HAProxy asks for them all at once.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for wanted in (max(hard, DESCRIPTORS), hard):
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
                break
            except (OSError, ValueError):
                continue
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            process.stop()

    def start(self, name, command, ready, env=None):
        process = Process(name, command, ready, env)
        self.processes.append(process)
        process.wait_ready()
        return process


def note(text):
    print(f"# {text}", file=sys.stderr, flush=True)
