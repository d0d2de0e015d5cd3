"""The configurations of the peers, written into .peers/conf. One worker each, TLS 1.3, client certificates demanded.

Rules say who may do what on which path. The benchmark's client is allowed by the last of them, so a proxy that asks
one rule after the other asks all.
"""

import json
import resource

from . import place

SPIFFE = "spiffe://mesh.test/ns/default/sa"
TYPE = "type.googleapis.com/envoy"
# (who, method, path, prefix?): what the five-rule sets of all peers say; the client's own rule comes last.
RULES = [
    ("orders", "GET", "/orders/", True),
    ("checkout", "POST", "/orders/", True),
    ("prometheus", "GET", "/metrics", False),
    ("admin", "DELETE", "/admin/", True),
]
CLIENT_PATHS = [("/", False), ("/1k", False), ("/api/", True), ("/demo.Echo/", True)]


def others(count):
    """`count` rules that do not match: other callers, and paths that nobody asks for."""
    made = list(RULES)
    for n in range(max(0, count - len(made))):
        made.append((f"worker-{n}", "GET", f"/area-{n}/", True))
    return made[:count]


def written(name, text):
    path = place.CONF / f"bench-{name}"
    path.write_text(text)
    return str(path)


# Envoy


def _typed(name, kind, **config):
    return {"name": name, "typed_config": {"@type": f"{TYPE}.extensions.{kind}", **config}}


def _address(port):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _tls(who, alpn):
    common = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {
                "certificate_chain": {"filename": str(place.CERTS / f"{who}.crt")},
                "private_key": {"filename": str(place.CERTS / f"{who}.key")},
            }
        ],
        "validation_context": {"trusted_ca": {"filename": str(place.CERTS / "ca.crt")}},
    }
    if alpn:
        common["alpn_protocols"] = alpn
    return common


def _down_tls(alpn):
    return _typed(
        "envoy.transport_sockets.tls",
        "transport_sockets.tls.v3.DownstreamTlsContext",
        require_client_certificate=True,
        common_tls_context=_tls("server", alpn),
    )


def _up_tls(alpn):
    common = _tls("client", alpn)
    common["validation_context"]["match_typed_subject_alt_names"] = [
        {"san_type": "URI", "matcher": {"exact": f"{SPIFFE}/server"}}
    ]
    return _typed("envoy.transport_sockets.tls", "transport_sockets.tls.v3.UpstreamTlsContext", common_tls_context=common)


def _http(filters):
    routes = [{"match": {"prefix": "/"}, "route": {"cluster": "next", "timeout": "15s"}}]
    return _typed(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="http",
        codec_type="AUTO",
        generate_request_id=False,
        route_config={"name": "all", "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        http_filters=[*filters, _typed("envoy.filters.http.router", "filters.http.router.v3.Router")],
    )


def _principal(who):
    return {"authenticated": {"principal_name": {"exact": f"{SPIFFE}/{who}"}}}


def _permission(method, paths):
    def one(path, prefix):
        return {"url_path": {"path": {"prefix" if prefix else "exact": path}}}

    where = [one(*path) for path in paths]
    rules = [{"header": {"name": ":method", "string_match": {"exact": method}}}] if method else []
    return {"and_rules": {"rules": [*rules, where[0] if len(where) == 1 else {"or_rules": {"rules": where}}]}}


def _rbac(rules):
    # Envoy asks policies in the order of their names.
    policies = {
        f"rule-{n:05}": {"principals": [_principal(who)], "permissions": [_permission(method, [(path, prefix)])]}
        for n, (who, method, path, prefix) in enumerate(others(rules - 1))
    }
    policies["rule-99999"] = {"principals": [_principal("client")], "permissions": [_permission(None, CLIENT_PATHS)]}
    return _typed("envoy.filters.http.rbac", "filters.http.rbac.v3.RBAC", rules={"action": "ALLOW", "policies": policies})


def _cluster(port, tls=None, h2=False):
    cluster = {
        "name": "next",
        "type": "STATIC",
        "connect_timeout": "2s",
        "load_assignment": {
            "cluster_name": "next",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(port)}}]}],
        },
    }
    if tls:
        cluster["transport_socket"] = tls
    if h2:
        kind = f"{TYPE}.extensions.upstreams.http.v3.HttpProtocolOptions"
        cluster["typed_extension_protocol_options"] = {
            kind.removeprefix("type.googleapis.com/"): {
                "@type": kind,
                "explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 1000}},
            }
        }
    return cluster


def _envoy(name, port, chain, cluster):
    listener = {"name": name, "address": _address(port), "filter_chains": [chain]}
    node = {"id": name, "cluster": name}
    config = {"node": node, "static_resources": {"listeners": [listener], "clusters": [cluster]}}
    return written(f"{name}.json", json.dumps(config, indent=1))


def _tcp():
    return _typed("envoy.filters.network.tcp_proxy", "filters.network.tcp_proxy.v3.TcpProxy", stat_prefix="tcp", cluster="next")


def envoy_pair(name, port, mode, rules=5, app=18080, app_h2=False):
    """Configs of the server and the client side; `mode` is what travels between them: h2, h1 or l4."""
    if mode == "l4":
        network = {"any": True}
        policies = {
            who: {"principals": [_principal(who)], "permissions": [network]} for who in ["orders", "client"]
        }
        rbac = _typed(
            "envoy.filters.network.rbac",
            "filters.network.rbac.v3.RBAC",
            stat_prefix="rbac",
            rules={"action": "ALLOW", "policies": policies},
        )
        door, out, alpn = [rbac, _tcp()], [_tcp()], []
    else:
        door, out = [_http([_rbac(rules)])], [_http([])]
        alpn = ["h2"] if mode == "h2" else ["http/1.1"]
    server = _envoy(
        f"{name}-server", port + 5, {"transport_socket": _down_tls(alpn), "filters": door}, _cluster(app, h2=app_h2)
    )
    client = _envoy(f"{name}-client", port, {"filters": out}, _cluster(port + 5, _up_tls(alpn), mode == "h2"))
    return server, client


# HAProxy. It has no sample for a certificate's URI SAN, so callers are told apart by their subject's name.

# It asks for two descriptors a connection when it starts, and does not start without.
_MAXCONN = min(12_000, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 200) // 2)
_HAPROXY = f"""\
global
  nbthread 1
  maxconn {_MAXCONN}
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  http-reuse always
"""


def haproxy_pair(name, port, rules=5, app=18080):
    lines = []
    for n, (who, method, path, prefix) in enumerate(others(rules - 1)):
        lines.append(f"  acl who{n} ssl_c_s_dn(cn) -m str {who}")
        lines.append(f"  acl where{n} {'path_beg' if prefix else 'path'} {path}")
        lines.append(f"  acl how{n} method {method}")
        lines.append(f"  http-request allow if how{n} where{n} who{n}")
    lines.append("  acl who ssl_c_s_dn(cn) -m str client")
    lines += [f"  acl where {'path_beg' if prefix else 'path'} {path}" for path, prefix in CLIENT_PATHS]
    lines += ["  http-request allow if where who", "  http-request deny"]
    certificates = f"ca-file {place.CERTS}/ca.crt verify required ssl-min-ver TLSv1.3"
    server = written(
        f"{name}-server.cfg",
        f"{_HAPROXY}frontend door\n"
        f"  bind 127.0.0.1:{port + 5} ssl crt {place.CERTS}/server.pem alpn h2,http/1.1 {certificates}\n"
        + "\n".join(lines)
        + f"\n  default_backend app\nbackend app\n  server app 127.0.0.1:{app}\n",
    )
    client = written(
        f"{name}-client.cfg",
        f"{_HAPROXY}frontend calls\n  bind 127.0.0.1:{port}\n  default_backend next\nbackend next\n"
        f"  server next 127.0.0.1:{port + 5} ssl crt {place.CERTS}/client.pem alpn h2 proto h2 {certificates}\n",
    )
    return server, client


# nginx. It speaks HTTP/1.1 to its upstream, and knows a caller's subject only.


def _nginx(name, body):
    spare = "\n".join(
        f"  {kind}_temp_path {place.LOGS}/{name}.{kind};"
        for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
    )
    return written(
        f"{name}.conf",
        f"""\
worker_processes 1;
daemon off;
pid {place.LOGS}/{name}.pid;
error_log {place.LOGS}/{name}.error.log warn;
worker_rlimit_nofile 65535;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  tcp_nodelay on;
  keepalive_timeout 1h;
  keepalive_requests 1000000000;
{spare}
{body}
}}
""",
    )


def _upstream(port):
    keep = "keepalive 256; keepalive_requests 1000000000; keepalive_timeout 1h;"
    return f"  upstream next {{ server 127.0.0.1:{port}; {keep} }}"


_PROXY = 'proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;'


def nginx_app(port=18080):
    """The app behind every chain: two bytes, a kilobyte, a megabyte."""
    kilobyte = "0123456789abcdef" * 64
    return _nginx(
        "app",
        f"""\
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    default_type text/plain;
    location / {{ return 200 "ok"; }}
    location = /1k {{ return 200 "{kilobyte}"; }}
    location = /api/1m {{ root {place.PEERS}/www; sendfile on; }}
  }}""",
    )


def nginx_pair(name, port, app=18080):
    rules = "\n".join(
        f"    ~^CN={who}\\|{method}\\|{path}{'' if prefix else '$'} 1;" for who, method, path, prefix in RULES
    )
    client_rules = "\n".join(f"    ~^CN=client\\|GET\\|{path}{'' if prefix else '$'} 1;" for path, prefix in CLIENT_PATHS)
    server = _nginx(
        f"{name}-server",
        f"""\
  map "$ssl_client_s_dn|$request_method|$uri" $allowed {{
    default 0;
{rules}
{client_rules}
  }}
{_upstream(app)}
  server {{
    listen 127.0.0.1:{port + 5} ssl backlog=4096;
    ssl_certificate {place.CERTS}/server.crt;
    ssl_certificate_key {place.CERTS}/server.key;
    ssl_client_certificate {place.CERTS}/ca.crt;
    ssl_verify_client on;
    ssl_protocols TLSv1.3;
    location / {{ if ($allowed = 0) {{ return 403; }} proxy_pass http://next; {_PROXY} }}
  }}""",
    )
    client = _nginx(
        f"{name}-client",
        f"""\
{_upstream(port + 5)}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass https://next; {_PROXY}
      proxy_ssl_certificate {place.CERTS}/client.crt;
      proxy_ssl_certificate_key {place.CERTS}/client.key;
      proxy_ssl_trusted_certificate {place.CERTS}/ca.crt;
      proxy_ssl_verify on;
      proxy_ssl_name server.mesh.test;
      proxy_ssl_protocols TLSv1.3;
    }}
  }}""",
    )
    return server, client


# Palisade, where the committed files of bench/ours are not the ones wanted.


def small_policies(service, schema, routes, rules):
    """A policies directory of one service, beside the generated configurations."""
    directory = place.CONF / f"policies-{service}"
    folder = directory / "services" / service
    folder.mkdir(parents=True, exist_ok=True)
    mesh = place.ROOT / "bench" / "ours" / "policies" / "mesh.cedarschema"
    (directory / "mesh.cedarschema").write_text(mesh.read_text())
    for name, text in [(f"{service}.cedarschema", schema), ("map.toml", routes), (f"{service}.cedar", rules)]:
        (folder / name).write_text(text)
    return directory


def palisade_pair(name, port, policies, app=18080, app_protocol="http1", service="backend", protocol=None):
    def identity(who):
        lines = [f'certificate = "{place.CERTS}/{who}.crt"', f'key = "{place.CERTS}/{who}.key"', f'bundle = "{place.CERTS}/ca.crt"']
        return "[identity]\n" + "\n".join(lines) + "\n"

    def rest(side, admin):
        log = place.LOGS / f"{name}-{side}.access.log"
        return (
            f'[admin]\nlisten = "127.0.0.1:{admin}"\n[telemetry]\naccess_log = "{log}"\nlog = "warn"\n[limits]\nworkers = 1\n'
        )

    server = written(
        f"{name}-server.toml",
        f'{identity("server")}[inbound]\nlisten = "127.0.0.1:{port + 5}"\napp = "127.0.0.1:{app}"\n'
        f'app_protocol = "{app_protocol}"\nservice = "{service}"\npolicies = "{policies}"\nrequest_timeout = "15s"\n'
        + rest("server", port + 7),
    )
    client = written(
        f"{name}-client.toml",
        f'{identity("client")}[outbound.{service}]\nlisten = "127.0.0.1:{port}"\nid = "{SPIFFE}/server"\n'
        f'endpoints = ["127.0.0.1:{port + 5}"]\nrequest_timeout = "15s"\n'
        + (f'protocol = "{protocol}"\n' if protocol else "")
        + rest("client", port + 6),
    )
    return server, client
