"""The contract as another implementation of gRPC speaks it: client.py LEADER-ADDRESS, with the stubs on the path."""

import sys

import grpc
import store_pb2 as pb
import store_pb2_grpc as rpc

DEADLINE_SECONDS = 30


def account(owner, number):
    return pb.Row(table="accounts", key=f"{owner}/{number}")


def refused(call, code, reason):
    try:
        call()
    except grpc.RpcError as error:
        trailers = dict(error.trailing_metadata())
        assert error.code() == code, (error.code(), error.details())
        assert trailers["store-reason"] == reason, trailers
        return error.details()
    raise AssertionError(f"{reason} was expected")


def main(address):
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(timeout=DEADLINE_SECONDS)
        store = rpc.StoreStub(channel)
        key = [pb.KeyPart(name="owner", kind=pb.KeyPart.TEXT), pb.KeyPart(name="number", kind=pb.KeyPart.INT)]
        store.CreateTable(pb.CreateTableRequest(table="accounts", key=key), timeout=DEADLINE_SECONDS)

        # Put.
        transaction = store.Begin(pb.BeginRequest()).transaction
        mutations = [pb.Mutation(row=account("alice", number), value=b"%d" % number) for number in (-1, 2, 10)]
        mutations.append(pb.Mutation(row=account("bob", 1), value=b"\x00\xff"))
        commit = pb.CommitRequest(transaction=transaction, mutations=mutations)
        first = store.Commit(commit).commit_timestamp
        assert first > 0
        assert store.Commit(commit).commit_timestamp == first, "sent again it has the same answer"

        # Get, scan and commit in one transaction.
        transaction = store.Begin(pb.BeginRequest()).transaction
        read = store.Read(pb.ReadRequest(transaction=transaction, rows=[account("alice", 2), account("carol", 1)]))
        assert [found.HasField("value") for found in read.rows] == [True, False]
        assert read.rows[0].value == b"2" and read.rows[0].version == first
        assert not read.rows[1].HasField("row") and read.rows[1].version == 0
        assert len(read.transaction.held) == 1
        seen, next_row = [], ""
        transaction = read.transaction
        while True:
            asked = pb.Range(table="accounts", prefix="alice")
            setattr(asked, "from", next_row)
            page = store.Scan(pb.ScanRequest(transaction=transaction, range=asked, limit=2))
            transaction = page.transaction
            seen += [found.row.key for found in page.rows]
            if not page.HasField("next"):
                break
            next_row = page.next
        assert seen == ["alice/-1", "alice/2", "alice/10"], seen
        mutations = [pb.Mutation(row=account("alice", 2), value=b"3"), pb.Mutation(row=account("bob", 1))]
        second = store.Commit(pb.CommitRequest(transaction=transaction, mutations=mutations)).commit_timestamp
        assert second > first

        # Snapshots.
        both = [account("alice", 2), account("bob", 1)]
        now = store.SnapshotRead(pb.SnapshotReadRequest(rows=both))
        assert now.rows[0].value == b"3" and not now.rows[1].HasField("value")
        assert now.read_timestamp >= second
        then = store.SnapshotRead(pb.SnapshotReadRequest(rows=both, moment=pb.Moment(timestamp=first)))
        assert [found.value for found in then.rows] == [b"2", b"\x00\xff"]
        assert then.read_timestamp == first
        scan = store.SnapshotScan(pb.SnapshotScanRequest(range=pb.Range(table="accounts"), limit=1000))
        assert [found.row.key for found in scan.rows] == ["alice/-1", "alice/2", "alice/10"]

        # Rolled back.
        transaction = store.Begin(pb.BeginRequest()).transaction
        transaction = store.Read(pb.ReadRequest(transaction=transaction, rows=both)).transaction
        store.Rollback(pb.RollbackRequest(transaction=transaction))
        ended = pb.CommitRequest(transaction=transaction, mutations=[pb.Mutation(row=both[0], value=b"never")])
        refused(lambda: store.Commit(ended), grpc.StatusCode.FAILED_PRECONDITION, "ENDED")
        again = store.Begin(pb.BeginRequest(retry_of=transaction)).transaction
        assert (again.first, again.client, again.attempt) == (transaction.first, transaction.client, 1)

        # Refused, by a status and a reason.
        unknown = pb.SnapshotReadRequest(rows=[pb.Row(table="nothing", key="1")])
        refused(lambda: store.SnapshotRead(unknown), grpc.StatusCode.NOT_FOUND, "UNKNOWN_TABLE")
        odd = pb.SnapshotReadRequest(rows=[pb.Row(table="accounts", key="alice/007")])
        said = refused(lambda: store.SnapshotRead(odd), grpc.StatusCode.INVALID_ARGUMENT, "BAD_KEY")
        assert "is written 7" in said, said

        splits = store.ListSplits(pb.ListSplitsRequest())
        assert [node.id for node in splits.nodes] == [1, 2, 3]
        assert splits.splits[0].leader_address == address
        assert store.Status(pb.StatusRequest()).epsilon == 1_000_000
    print("everything as the contract has it")


main(sys.argv[1])
