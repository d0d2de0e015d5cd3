"""An independent HBONE client: mTLS by the standard library's ssl, HTTP/2 by the package h2.

Usage: hbone_client.py PORT FOLDER [--no-certificate] < STREAMS

FOLDER holds certificate.der, key.der and authority.der. STREAMS is a JSON list of
{"method", "authority", "send", "finish"} with `send` in Latin-1; all run at once on one connection. With `finish`
the client ends its side after what it sends. Prints, as JSON, for each {"status", "received", "end"}: `end` is
"end" or "reset".
"""

import base64
import json
import pathlib
import socket
import ssl
import sys

import h2.config
import h2.connection
import h2.events


def pem(label, der):
    body = base64.encodebytes(der).decode()
    return f"-----BEGIN {label}-----\n{body}-----END {label}-----\n"


def connect(port, folder, with_certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Identity is the SPIFFE ID; this client is content with the authority.
    context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=pem("CERTIFICATE", (folder / "authority.der").read_bytes()))
    if with_certificate:
        chain = folder / "chain.pem"
        chain.write_text(
            pem("CERTIFICATE", (folder / "certificate.der").read_bytes())
            + pem("PRIVATE KEY", (folder / "key.der").read_bytes())
        )
        context.load_cert_chain(chain)
    stream = context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=10))
    assert stream.selected_alpn_protocol() == "h2", "no h2"
    return stream


def main():
    port, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
    wire = connect(port, folder, "--no-certificate" not in sys.argv)
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, validate_outbound_headers=False))
    connection.initiate_connection()
    streams = {}
    for wanted in json.load(sys.stdin):
        number = connection.get_next_available_stream_id()
        headers = [(":method", wanted["method"]), (":authority", wanted["authority"])]
        if wanted["method"] != "CONNECT":
            headers += [(":scheme", "https"), (":path", "/")]
        connection.send_headers(number, headers)
        left = wanted["send"].encode("latin-1")
        streams[number] = {
            "status": None, "received": b"", "end": None, "left": left, "open": True, "finish": wanted["finish"]
        }
    while any(stream["end"] is None for stream in streams.values()):
        for number, stream in streams.items():
            send(connection, number, stream)
        wire.sendall(connection.data_to_send())
        data = wire.recv(65536)
        if not data:
            raise ConnectionError("the connection ended before its streams")
        for event in connection.receive_data(data):
            note(connection, streams, event)
    for stream in streams.values():
        stream["received"] = stream["received"].decode("latin-1")
    print(json.dumps([{name: stream[name] for name in ("status", "received", "end")} for stream in streams.values()]))


def send(connection, number, stream):
    """Sends what the window admits once the tunnel stands, then ends this side of it."""
    if stream["status"] != 200 or not stream["open"] or stream["end"] == "reset":
        return
    while stream["left"]:
        room = min(connection.local_flow_control_window(number), connection.max_outbound_frame_size)
        if room <= 0:
            return
        connection.send_data(number, stream["left"][:room])
        stream["left"] = stream["left"][room:]
    if stream["finish"]:
        connection.end_stream(number)
        stream["open"] = False


def note(connection, streams, event):
    if isinstance(event, h2.events.ResponseReceived):
        headers = {bytes(name): value for name, value in event.headers}
        streams[event.stream_id]["status"] = int(headers[b":status"])
    elif isinstance(event, h2.events.DataReceived):
        streams[event.stream_id]["received"] += event.data
        connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
    elif isinstance(event, h2.events.StreamEnded):
        streams[event.stream_id]["end"] = streams[event.stream_id]["end"] or "end"
    elif isinstance(event, h2.events.StreamReset):
        streams[event.stream_id]["end"] = "reset"
    elif isinstance(event, h2.events.ConnectionTerminated):
        raise ConnectionError(f"GOAWAY {event.error_code}")


main()
