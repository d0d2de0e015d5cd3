#!/usr/bin/env python3
"""Writes a policies directory of any size for the benchmark's service `backend`.

    bench/policies.py OUT [--rules 100] [--routes 20]

`bench/ours/policies` is the result for the defaults. Whatever the size, the benchmark's client may read `/`, `/1k`
and `/api/1m` and nothing else. The other rules are of the kinds that a real set is full of: other callers with the
same objects, and the same caller with other objects. None of them matches the benchmark's requests, and none can be
told apart from those that do by its principal or by its action alone.
"""

import argparse
import pathlib
import shutil

TRUST_DOMAIN = "mesh.test"
CLIENT = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/client"

MESH = """\
// Who can ask, and what comes with every request.
namespace Mesh {
  entity Workload = { service: String, trust_domain: String };
  entity Client;

  type User = {
    id: String,
    issuer: String,
    client: String,
    scopes: Set<String>,
    groups: Set<String>,
    auth_time: Long,
  };

  type Context = {
    user?: User,
    chain: Set<String>,
    now: Long,
  };
}
"""

SCHEMA = """\
namespace Backend {
  entity Page;
  entity Document = { name: String };
  entity Record = { number: String };

  action ReadPage appliesTo { principal: [Mesh::Workload], resource: [Page], context: Mesh::Context };
  action ReadDocument appliesTo { principal: [Mesh::Workload], resource: [Document], context: Mesh::Context };
  action ReadRecord, WriteRecord appliesTo {
    principal: [Mesh::Workload],
    resource: [Record],
    context: Mesh::Context,
  };
}
"""

FIXED_ROUTES = [
    ("GET /", "ReadPage", 'Page::"index"', None),
    ("GET /1k", "ReadPage", 'Page::"1k"', None),
    ("GET /api/{name}", "ReadDocument", 'Document::"{name}"', '{ name = "path:name" }'),
]

FIXED_RULES = [
    ("client-reads-index", CLIENT, "ReadPage", '== Backend::Page::"index"', None),
    ("client-reads-1k", CLIENT, "ReadPage", '== Backend::Page::"1k"', None),
    ("client-reads-1m", CLIENT, "ReadDocument", "is Backend::Document", 'resource.name == "1m"'),
]

AREAS = ["orders", "invoices", "carts", "shipments", "refunds", "customers", "stock", "prices", "reviews", "vouchers"]


def routes(count):
    """Reading and writing the records of one area after the other, behind the fixed ones."""
    made = list(FIXED_ROUTES)
    number = 0
    while len(made) < count:
        area = AREAS[number % len(AREAS)] + ("" if number < len(AREAS) else f"-{number // len(AREAS)}")
        made.append((f"GET /{area}/{{number:int}}", "ReadRecord", f'Record::"{area}/{{number}}"', '{ number = "path:number" }'))
        made.append((f"PUT /{area}/{{number:int}}", "WriteRecord", f'Record::"{area}/{{number}}"', '{ number = "path:number" }'))
        number += 1
    return made[:count]


def rules(count):
    made = list(FIXED_RULES)
    for n in range(max(0, count - len(made))):
        caller = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/worker-{n}"
        area = AREAS[n % len(AREAS)]
        kind = [
            (f"worker-{n}-reads-index", caller, "ReadPage", '== Backend::Page::"index"', None),
            (f"client-reads-page-{n}", CLIENT, "ReadPage", f'== Backend::Page::"page-{n}"', None),
            (f"worker-{n}-writes-{area}", caller, "WriteRecord", f'== Backend::Record::"{area}/{n}"', None),
            (f"client-reads-{area}-{n}", CLIENT, "ReadRecord", f'== Backend::Record::"{area}/{n}"', None),
            (f"worker-{n}-reads-own", caller, "ReadDocument", "is Backend::Document", f'resource.name == "report-{n}"'),
        ]
        made.append(kind[n % len(kind)])
    return made[: max(count, len(FIXED_RULES))]


def route_text(match, action, obj, attributes):
    lines = ["[[route]]", f'match = "{match}"', f'action = "{action}"', f"object = '{obj}'"]
    if attributes:
        lines.append(f"attributes = {attributes}")
    if match.startswith("PUT"):
        lines.append('body_type = "opaque"')
    return "\n".join(lines) + "\n"


def rule_text(name, principal, action, resource, when):
    scope = f'  principal == Mesh::Workload::"{principal}",\n  action == Backend::Action::"{action}",\n  resource {resource}\n'
    return f'@id("{name}")\npermit (\n{scope})' + (f"\nwhen {{ {when} }}" if when else "") + ";\n"


def write(out, rule_count=100, route_count=20):
    out = pathlib.Path(out)
    shutil.rmtree(out, ignore_errors=True)
    service = out / "services" / "backend"
    service.mkdir(parents=True)
    (out / "mesh.cedarschema").write_text(MESH)
    (service / "backend.cedarschema").write_text(SCHEMA)
    (service / "map.toml").write_text("\n".join(route_text(*route) for route in routes(route_count)))
    (service / "backend.cedar").write_text("\n".join(rule_text(*rule) for rule in rules(rule_count)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--rules", type=int, default=100)
    parser.add_argument("--routes", type=int, default=20)
    args = parser.parse_args()
    write(args.out, args.rules, args.routes)


if __name__ == "__main__":
    main()
