"""What clients of Kafka hear behind a sidecar: kafka-python and librdkafka, unchanged.

usage: client.py BOOTSTRAP. Prints a line of JSON a step.
"""

import json
import sys
import time

from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import NewTopic
from kafka.errors import KafkaError

BOOTSTRAP = sys.argv[1]
DEADLINE = 60
RECORDS = 20


def say(step, result):
    print(json.dumps({"step": step, "result": result}), flush=True)


def failing(action):
    """The name of the error that an action ends with."""
    try:
        action()
    except (KafkaError, KafkaException) as error:
        return error.args[0].name() if isinstance(error, KafkaException) else type(error).__name__
    return "nothing failed"


def created(admin, name):
    answer = admin.create_topics([NewTopic(name, 1, 1)], raise_errors=False)
    return [topic["error_code"] for topic in answer["topics"]]


admin = KafkaAdminClient(bootstrap_servers=BOOTSTRAP)
say("create orders", created(admin, "orders"))
say("create secrets", created(admin, "secrets"))
say("topics", sorted(admin.list_topics()))

producer = KafkaProducer(bootstrap_servers=BOOTSTRAP, enable_idempotence=False)
sent = [producer.send("orders", b"python %d" % n).get(DEADLINE).offset for n in range(RECORDS)]
say("offsets", sent)
say("produce payments", failing(lambda: producer.send("payments", b"x").get(DEADLINE)))

delivered = []
native = Producer({"bootstrap.servers": BOOTSTRAP, "compression.type": "gzip"})
for n in range(RECORDS):
    native.produce("orders", b"native %d" % n, on_delivery=lambda error, _: delivered.append(error))
native.flush(DEADLINE)
say("delivered", [str(error) for error in delivered if error] or len(delivered))
native.produce("payments", b"x", on_delivery=lambda error, _: say("produce payments natively", error and error.name()))
native.flush(DEADLINE)


def consumed(group):
    consumer = KafkaConsumer(
        "orders", bootstrap_servers=BOOTSTRAP, group_id=group, auto_offset_reset="earliest", enable_auto_commit=False
    )
    values, end = [], time.monotonic() + DEADLINE
    try:
        while len(values) < 2 * RECORDS and time.monotonic() < end:
            for records in consumer.poll(timeout_ms=500).values():
                values += [record.value.decode() for record in records]
        consumer.commit()
    finally:
        consumer.close(autocommit=False)
    return values


say("consumed", consumed("readers"))
say("in another's group", failing(lambda: consumed("others")))


def natively(group):
    consumer = Consumer({"bootstrap.servers": BOOTSTRAP, "group.id": group, "auto.offset.reset": "earliest"})
    consumer.subscribe(["orders"])
    end = time.monotonic() + DEADLINE
    values = []
    try:
        while len(values) < 2 * RECORDS and time.monotonic() < end:
            message = consumer.poll(0.5)
            if message is None:
                continue
            if message.error():
                raise KafkaException(message.error())
            values.append(message.value().decode())
    finally:
        consumer.close()
    return values


say("consumed natively", len(natively("readers-too")))
say("natively in another's group", failing(lambda: natively("others")))
say("groups", sorted(group.group_id for group in AdminClient({"bootstrap.servers": BOOTSTRAP}).list_consumer_groups().result(DEADLINE).valid))
