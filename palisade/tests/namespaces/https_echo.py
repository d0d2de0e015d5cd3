"""An HTTPS server that says what it was asked: https_echo.py CERTIFICATE PORT...

Prints `ready`, and then a line for each connection whose handshake succeeded."""

import socket
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        self.request.do_handshake()
        print("connection", flush=True)
        super().setup()

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        host, user = self.headers["Host"], self.headers["X-Palisade-User"]
        said = f"{self.command} {self.path} host={host} user={user} {body}".strip().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6

    def handle_error(self, *_):
        """A client that refuses the certificate is none of ours to report."""


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
for port in sys.argv[2:]:
    server = Server(("::", int(port)), Echo)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
