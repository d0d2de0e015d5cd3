"""Both ends of gRPC, by the package `grpcio`. Messages are bytes: what is in them is nobody's business here.

    ledger.py app             a service that says its port, and what becomes of calls that are cancelled
    ledger.py call PORT       everything that a client expects to work, and what must be refused
"""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc

CLIENT = "spiffe://mesh.test/ns/default/sa/client"
LARGE_BYTES = 3 << 20
OPTIONS = [("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", 8 << 20)]
SAYING = threading.Lock()
# Bounds a hang.
DEADLINE_SECONDS = 60


def say(*words):
    with SAYING:
        print(*words, flush=True)


# The app.


def echo(message, context):
    seen = context.invocation_metadata()
    context.send_initial_metadata([("x-first", "early"), ("x-first-bin", b"\x00\xff")])
    claims = [value for name, value in seen if name == "x-forwarded-user"]
    proved = [value for name, value in seen if name == "x-forwarded-client-cert"]
    context.set_trailing_metadata(
        [(name, value) for name, value in seen if name.startswith("x-echo")]
        + [("x-claims", str(len(claims))), ("x-proved", ",".join(proved))]
    )
    return message


def total(messages, context):
    count = size = 0
    for message in messages:
        count += 1
        size += len(message)
    return f"{count} {size}".encode()


def repeat(message, context):
    count, size = (int(word) for word in message.split())
    for number in range(count):
        yield number.to_bytes(4, "big") + bytes(size)


def converse(messages, context):
    for message in messages:
        if message == b"fail":
            context.abort(grpc.StatusCode.DATA_LOSS, "in the middle")
        yield b"heard " + message


def fail(message, context):
    context.set_trailing_metadata([("x-why", "because"), ("x-why-bin", bytes(range(256)))])
    context.abort(grpc.StatusCode.NOT_FOUND, "no such Konto: größer, 100 %\n")


def wait(message, context):
    """Goes on until its caller does not want it any more."""
    gone = threading.Event()
    context.add_callback(gone.set)
    yield b"waiting"
    say("cancelled" if gone.wait(DEADLINE_SECONDS) and not context.is_active() else "forgotten")


def wait_once(message, context):
    gone = threading.Event()
    context.add_callback(gone.set)
    say("asked")
    say("cancelled" if gone.wait(DEADLINE_SECONDS) else "forgotten")
    return b""


def remaining(message, context):
    # Without a deadline some versions say nothing, and others a time beyond all.
    left = context.time_remaining()
    return b"none" if left is None or left > 10**6 else str(left).encode()


def secret(message):
    if b"66" in message:
        say("saw what nobody may see")
    return message


def read(message, context):
    return secret(message)


def add(messages, context):
    return b"".join(secret(message) for message in messages)


def follow(messages, context):
    for message in messages:
        yield secret(message)


def drop(message, context):
    say("dropped")
    return b""


def app():
    server = grpc.server(ThreadPoolExecutor(64), options=OPTIONS)
    procedures = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Total": grpc.stream_unary_rpc_method_handler(total),
        "Repeat": grpc.unary_stream_rpc_method_handler(repeat),
        "Converse": grpc.stream_stream_rpc_method_handler(converse),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
        "Wait": grpc.unary_stream_rpc_method_handler(wait),
        "WaitOnce": grpc.unary_unary_rpc_method_handler(wait_once),
        "Remaining": grpc.unary_unary_rpc_method_handler(remaining),
        "Drop": grpc.unary_unary_rpc_method_handler(drop),
    }
    for service in ["bank.Ledger", "bank.Vault"]:
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, procedures)])
    accounts = {
        "Read": grpc.unary_unary_rpc_method_handler(read),
        "Sum": grpc.stream_unary_rpc_method_handler(add),
        "Follow": grpc.stream_stream_rpc_method_handler(follow),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bank.Accounts", accounts)])
    say(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()


# The client.


def failure(call):
    try:
        call()
    except grpc.RpcError as error:
        return error
    raise AssertionError("it did not fail")


def unary(channel):
    echo = channel.unary_unary("/bank.Ledger/Echo")
    sent = [
        ("x-echo", "a"),
        ("x-echo", "b"),
        ("x-echo-bin", bytes(range(256))),
        ("x-forwarded-user", "root"),
        ("x-forwarded-client-cert", "By=x;URI=spiffe://mesh.test/root"),
    ]
    for message in [b"", b"x", bytes(range(256)), bytes(LARGE_BYTES)]:
        answer, call = echo.with_call(message, metadata=sent)
        assert answer == message
        assert call.code() == grpc.StatusCode.OK
    first = dict(call.initial_metadata())
    assert (first["x-first"], first["x-first-bin"]) == ("early", b"\x00\xff"), first
    last = call.trailing_metadata()
    assert [value for name, value in last if name == "x-echo"] == ["a", "b"], last
    assert dict(last)["x-echo-bin"] == bytes(range(256))
    assert dict(last)["x-claims"] == "0", last
    assert dict(last)["x-proved"].endswith(f";URI={CLIENT}"), last
    packed = echo(bytes(100_000), compression=grpc.Compression.Gzip)
    assert packed == bytes(100_000)


def streams(channel):
    total = channel.stream_unary("/bank.Ledger/Total")
    assert total(bytes(100) for _ in range(5_000)) == b"5000 500000"
    assert total(iter([])) == b"0 0"
    assert total(bytes(LARGE_BYTES) for _ in range(10)) == f"10 {10 * LARGE_BYTES}".encode()
    repeat = channel.unary_stream("/bank.Ledger/Repeat")
    for count, size in [(0, 0), (5_000, 100), (10, LARGE_BYTES)]:
        heard = list(repeat(f"{count} {size}".encode()))
        assert [int.from_bytes(message[:4], "big") for message in heard] == list(range(count))
        assert all(len(message) == 4 + size for message in heard)


def conversation(channel):
    """Each side waits for the other: whatever is held back on the way holds it up for ever."""
    converse = channel.stream_stream("/bank.Ledger/Converse")
    turn = threading.Semaphore(0)

    def questions():
        for number in range(200):
            yield str(number).encode()
            assert turn.acquire(timeout=DEADLINE_SECONDS), "no answer"
        yield b"fail"

    answers = converse(questions(), timeout=DEADLINE_SECONDS)
    for number in range(200):
        assert next(answers) == f"heard {number}".encode()
        turn.release()
    error = failure(lambda: next(answers))
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "in the middle"), error


def failures(channel):
    error = failure(lambda: channel.unary_unary("/bank.Ledger/Fail")(b""))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert error.details() == "no such Konto: größer, 100 %\n", error.details()
    trailers = dict(error.trailing_metadata())
    assert (trailers["x-why"], trailers["x-why-bin"]) == ("because", bytes(range(256))), trailers
    error = failure(lambda: channel.unary_unary("/bank.Ledger/Nothing")(b""))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED, error


def cancellations(channel):
    waiting = channel.unary_stream("/bank.Ledger/Wait")(b"")
    assert next(waiting) == b"waiting"
    waiting.cancel()
    assert failure(lambda: next(waiting)).code() == grpc.StatusCode.CANCELLED
    say("cancelled a stream")
    # One that the app has not answered at all.
    once = channel.unary_unary("/bank.Ledger/WaitOnce").future(b"")
    say("asks")
    assert sys.stdin.readline() == "asked\n"
    once.cancel()
    say("cancelled a call")
    # The channel is as good as before.
    assert channel.unary_unary("/bank.Ledger/Echo")(b"after") == b"after"


def crowd(channel):
    def one(number):
        message = str(number).encode()
        for _ in range(20):
            assert channel.unary_unary("/bank.Ledger/Echo")(message) == message
            assert channel.stream_unary("/bank.Ledger/Total")(iter([message] * 3)).startswith(b"3 ")
            assert len(list(channel.unary_stream("/bank.Ledger/Repeat")(b"5 5"))) == 5

    with ThreadPoolExecutor(32) as together:
        list(together.map(one, range(32)))


def refusals(channel):
    for method, code in [
        ("/bank.Ledger/Drop", grpc.StatusCode.PERMISSION_DENIED),
        ("/bank.Vault/Echo", grpc.StatusCode.PERMISSION_DENIED),
        ("/bank.Ledger/.", grpc.StatusCode.INVALID_ARGUMENT),
        ("/bank.Ledger/Echo/", grpc.StatusCode.INVALID_ARGUMENT),
        ("//bank.Ledger/Echo", grpc.StatusCode.INVALID_ARGUMENT),
    ]:
        for call in [
            lambda: channel.unary_unary(method)(b"x"),
            lambda: list(channel.stream_stream(method)(iter([b"x"] * 3))),
        ]:
            error = failure(call)
            assert error.code() == code, (method, error)
            assert error.details().startswith("denied, receipt "), (method, error)
    assert channel.unary_unary("/bank.Ledger/Echo")(b"after") == b"after"


def deadlines(channel):
    # What is left goes along; the rest of the way took some of it.
    remaining = channel.unary_unary("/bank.Ledger/Remaining")
    assert remaining(b"") == b"none"
    given = float(remaining(b"", timeout=20))
    assert 0 < given < 21, given
    error = failure(lambda: channel.unary_unary("/bank.Ledger/WaitOnce")(b"", timeout=0.5))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
    say("asks with a deadline")
    assert sys.stdin.readline() == "asked\n"


def large_messages(channel):
    """A stream may go on for ever, a message may not."""
    error = failure(lambda: channel.unary_unary("/bank.Ledger/Echo")(bytes(5 << 20)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
    assert channel.unary_unary("/bank.Ledger/Echo")(b"after") == b"after"


def field(number, value):
    return bytes([number << 3 | 2, len(value)]) + value


def about(account):
    return field(1, field(1, account))


def objects(channel):
    """Who may is decided by what stands in the messages."""
    read = channel.unary_unary("/bank.Accounts/Read")
    follow = channel.stream_stream("/bank.Accounts/Follow")
    add = channel.stream_unary("/bank.Accounts/Sum")
    denied, malformed = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT
    assert read(about(b"17") + field(2, b"a note")) == about(b"17") + field(2, b"a note")
    for message, code in [
        (about(b"66"), denied),
        (about(b"17") + about(b"66"), malformed),
        (field(1, field(1, b"17") + field(1, b"66")), malformed),
        (about(b"17") + field(9, b"66"), malformed),
        (about(b"../66"), malformed),
        (b"", malformed),
        (about(b"17")[:-1], malformed),
    ]:
        for ask in [lambda: read(message), lambda: add(iter([message])), lambda: list(follow(iter([message])))]:
            error = failure(ask)
            assert error.code() == code, (message, error)
            assert error.details().startswith("denied, receipt "), error
    packed = about(b"17") + field(2, bytes(100))
    assert failure(lambda: read(packed, compression=grpc.Compression.Gzip)).code() == malformed
    assert failure(lambda: add(iter([]))).code() == malformed
    # Of a stream each message, whether or not an answer has begun.
    assert add(about(account) for account in [b"17", b"42", b"17"]) == about(b"17") + about(b"42") + about(b"17")
    error = failure(lambda: add(about(account) for account in [b"17", b"42", b"66", b"17"]))
    assert error.code() == denied and error.details().startswith("denied, receipt "), error
    turn = threading.Semaphore(1)

    def questions(accounts):
        for account in accounts:
            assert turn.acquire(timeout=DEADLINE_SECONDS), "no answer"
            yield about(account)

    answers = follow(questions([b"17", b"42", b"66", b"17"]), timeout=DEADLINE_SECONDS)
    for account in [b"17", b"42"]:
        assert next(answers) == about(account)
        turn.release()
    error = failure(lambda: next(answers))
    assert error.code() == denied and error.details().startswith("denied, receipt "), error
    assert read(about(b"42")) == about(b"42")


def policies_that_change(channel):
    """A stream goes on under another policy, and is judged by it."""
    follow = channel.stream_stream("/bank.Accounts/Follow")
    turn = threading.Semaphore(1)

    def questions(accounts):
        for account in accounts:
            assert turn.acquire(timeout=DEADLINE_SECONDS), "no answer"
            yield about(account)

    answers = follow(questions([b"17", b"42", b"17", b"42"]), timeout=DEADLINE_SECONDS)
    for account in [b"17", b"42"]:
        assert next(answers) == about(account)
        if account == b"42":
            say("change")
            assert sys.stdin.readline() == "changed\n"
        turn.release()
    assert next(answers) == about(b"17")
    turn.release()
    error = failure(lambda: next(answers))
    assert error.code() == grpc.StatusCode.PERMISSION_DENIED, error


def call(port):
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        for part in [unary, streams, conversation, failures, cancellations, crowd, refusals, deadlines, large_messages, objects, policies_that_change]:
            part(channel)
            say(part.__name__)


if __name__ == "__main__":
    app() if sys.argv[1] == "app" else call(sys.argv[2])
