"""An independent OTLP/HTTP collector: the standard library's HTTP server, messages by the package opentelemetry-proto.

Usage: otlp_collector.py

Prints the port that it listens on, then for each span one line of JSON: the resource's attributes, the scope, how it
was posted, and the span with its ids in hexadecimal and its attributes as an object. Ends when standard input does.
"""

import http.server
import json
import sys
import threading

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.trace.v1 import trace_pb2 as trace


def attributes(pairs):
    read = {}
    for pair in pairs:
        kind = pair.value.WhichOneof("value")
        assert kind in ("string_value", "int_value"), kind
        assert pair.key not in read, f"{pair.key} twice"
        read[pair.key] = getattr(pair.value, kind)
    return read


def shown(span):
    return {
        "trace_id": span.trace_id.hex(),
        "span_id": span.span_id.hex(),
        "parent_span_id": span.parent_span_id.hex(),
        "name": span.name,
        "kind": trace.Span.SpanKind.Name(span.kind),
        "start": span.start_time_unix_nano,
        "end": span.end_time_unix_nano,
        "flags": span.flags,
        "status": trace.Status.StatusCode.Name(span.status.code),
        "message": span.status.message,
        "attributes": attributes(span.attributes),
    }


class Collector(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        posted = {"path": self.path, "type": self.headers["content-type"], "traceparent": self.headers["traceparent"]}
        request = service.ExportTraceServiceRequest.FromString(body)
        for of_resource in request.resource_spans:
            for of_scope in of_resource.scope_spans:
                for span in of_scope.spans:
                    line = {
                        "posted": posted,
                        "resource": attributes(of_resource.resource.attributes),
                        "scope": of_scope.scope.name,
                        **shown(span),
                    }
                    # In one piece: two sidecars may post at once.
                    print(json.dumps(line) + "\n", end="", flush=True)
        answer = service.ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
server.daemon_threads = True
print(server.server_address[1], flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.read()
