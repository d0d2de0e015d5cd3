"""Asks the agent for identities with the PyPI package `spiffe`, a client that is not ours.

SPIFFE_ENDPOINT_SOCKET names the socket. Prints one line a finding; any exception is a failure.
"""

import os
import threading

import grpc
from spiffe import WorkloadApiClient
from spiffe._proto import workload_pb2, workload_pb2_grpc

PATIENCE_SECONDS = 60

client = WorkloadApiClient()

svid = client.fetch_x509_svid(timeout=PATIENCE_SECONDS)
print("svid", svid.spiffe_id)

bundles = client.fetch_x509_bundles(timeout=PATIENCE_SECONDS)
bundle = bundles.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
(root,) = bundle.x509_authorities
svid.leaf.verify_directly_issued_by(root)
print("verified under", bundle.trust_domain.name)

serials, rotated, failures = set(), threading.Event(), []


def on_update(context):
    serials.add(context.default_svid.leaf.serial_number)
    if len(serials) >= 3:
        rotated.set()


def on_failure(error):
    failures.append(error)
    rotated.set()


stream = client.stream_x509_contexts(on_update, on_failure)
assert rotated.wait(PATIENCE_SECONDS), f"only {len(serials)} serials were pushed"
assert not failures, failures
stream.cancel()
print("rotated", len(serials), "serials on one stream")

# Without the metadata that the standard demands.
with grpc.insecure_channel(os.environ["SPIFFE_ENDPOINT_SOCKET"]) as channel:
    stub = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)
    try:
        next(stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), timeout=PATIENCE_SECONDS))
        raise AssertionError("served without the security header")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        print("refused", error.code().name)
