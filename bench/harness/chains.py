"""Chains by name: which processes, in which order, and where the client connects."""

import json

from . import peers, place

APP_PORT = 18080
FILE = place.ROOT / "bench" / "ours.json"
TCP_SCHEMA = """\
namespace Plain {
  entity Port;
  action Connect appliesTo { principal: [Mesh::Workload], resource: [Port], context: Mesh::Context };
}
"""
TCP_RULE = """\
@id("client-connects")
permit (
  principal == Mesh::Workload::"spiffe://mesh.test/ns/default/sa/client",
  action == Plain::Action::"Connect",
  resource == Plain::Port::"main"
);
"""


class Chain:
    """A client's URL, and the processes behind it, the far end first: (name, command, port)."""

    def __init__(self, name, url, processes, wants=()):
        self.name, self.url, self.processes, self.wants = name, url, processes, wants

    def start(self, running):
        return [running.start(*process) for process in self.processes]


def pair(name, port, commands, wants=()):
    server, client = commands
    url = f"http://127.0.0.1:{port}"
    return Chain(name, url, [(f"{name}-server", server, port + 5), (f"{name}-client", client, port)], wants)


_envoys = 0


def envoy(name, port, mode, **options):
    def command(config):
        # Two Envoys on one machine share memory by this number unless it differs.
        global _envoys
        _envoys += 1
        quiet = ["--log-level", "warning", "--concurrency", "1", "--base-id", str(100 + _envoys)]
        return [place.envoy(), "-c", config, *quiet]

    return pair(name, port, [command(config) for config in peers.envoy_pair(name, port, mode, **options)], ["envoy"])


def haproxy(name, port, **options):
    commands = [[place.program("haproxy"), "-db", "-f", config] for config in peers.haproxy_pair(name, port, **options)]
    return pair(name, port, commands, ["haproxy"])


def nginx(name, port):
    return pair(name, port, [[place.program("nginx"), "-c", config] for config in peers.nginx_pair(name, port)], ["nginx"])


def palisade(name, port, policies, **options):
    configs = peers.palisade_pair(name, port, policies, **options)
    return pair(name, port, [[str(place.PALISADE), "sidecar", "--config", config] for config in configs])


def from_file(name, file):
    """A chain file: {"chains": {NAME: {"url": …, "procs": [{"name", "cmd", "ready": [host, port]}]}}}."""
    described = json.loads(file.read_text())["chains"][name]
    processes = []
    for process in described["procs"]:
        command = [str(place.PALISADE) if part == "target/release/palisade" else part for part in process["cmd"]]
        processes.append((process["name"], command, process["ready"][1]))
    return Chain(name, described["url"], processes)


def by_name(name):
    match name:
        case "direct":
            return Chain("direct", f"http://127.0.0.1:{APP_PORT}", [])
        case "envoy":
            return envoy("envoy", 16000, "h2")
        case "envoy-h1":
            return envoy("envoy-h1", 16100, "h1")
        case "envoy-l4":
            return envoy("envoy-l4", 16200, "l4")
        case "haproxy":
            return haproxy("haproxy", 16300)
        case "nginx":
            return nginx("nginx", 16400)
        case "ours-tcp":
            policies = peers.small_policies("plain", TCP_SCHEMA, 'mapping = "tcp"\n', TCP_RULE)
            return palisade("ours-tcp", 16700, policies, service="plain", app_protocol="tcp", protocol="tcp")
        case "ours":
            return from_file(name, FILE)
    raise SystemExit(f"no chain `{name}`; there are {', '.join(ALL)}, ours-tcp")


# Plain TCP through ours, `ours-tcp`, is asked for by name.
ALL = ["direct", "envoy", "envoy-h1", "envoy-l4", "haproxy", "nginx", "ours"]


def app(running):
    return running.start("app", [place.program("nginx"), "-c", peers.nginx_app(APP_PORT)], APP_PORT)
