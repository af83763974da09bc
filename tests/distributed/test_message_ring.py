"""The message ring: order, lengths, waiting and endings, between threads and between processes."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time

import pytest

from shoal.distributed.message_ring import MAX_READERS, RingReader, RingWriter
from shoal.distributed.signals import supported

pytestmark = pytest.mark.skipif(not supported(), reason="shared-memory rings are for x86-64 Linux")

# A process that echoes the digest of what it reads, until a message says "end".
READER = """
import hashlib, sys
from shoal.distributed.message_ring import RingReader
address, index, num_readers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ring = RingReader.open(address, index, num_readers)
print("open", flush=True)
digest = hashlib.sha256()
while (message := ring.receive()) != b"end":
    digest.update(len(message).to_bytes(8, "little") + message)
print(digest.hexdigest(), flush=True)
"""


def ring(num_readers: int = 1, capacity: int = 64) -> tuple[RingWriter, list[RingReader]]:
    writer = RingWriter.create(num_readers, capacity)
    return writer, [RingReader.open(writer.address, index, num_readers) for index in range(num_readers)]


@pytest.mark.parametrize("capacity", [64, 72, 4096])
def test_messages_of_all_lengths_come_whole_and_in_order(capacity):
    writer, readers = ring(2, capacity)
    messages = [bytes([index % 251]) * index for index in range(200)]
    taken: list[list[bytes | None]] = [[], []]

    def read(index: int) -> None:
        taken[index] += [readers[index].receive() for _ in messages]

    threads = [threading.Thread(target=read, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for message in messages:
        writer.send(message)
    for thread in threads:
        thread.join(60)
    assert taken == [messages, messages]


def test_processes_read_the_same_and_more_than_the_ring_holds():
    import hashlib

    writer = RingWriter.create(3, 8192)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READER, writer.address, str(index), "3"], stdout=subprocess.PIPE, text=True
        )
        for index in range(3)
    ]
    assert all(process.stdout is not None and process.stdout.readline() == "open\n" for process in processes)
    writer.release()
    randomness, digest = random.Random(1), hashlib.sha256()
    for _ in range(1500):
        message = randomness.randbytes(randomness.choice([0, 1, 8, 100, 3000, 50_000]))
        digest.update(len(message).to_bytes(8, "little") + message)
        writer.send(message)
    writer.send(b"end")
    for process in processes:
        assert process.communicate(timeout=60)[0].strip() == digest.hexdigest()


def test_the_writer_waits_for_the_slowest_reader():
    writer, (fast, slow) = ring(2, 64)
    writer.send(b"x" * 40)
    assert fast.receive() == b"x" * 40
    sent = threading.Event()

    def send() -> None:
        writer.send(b"y" * 40)
        sent.set()

    thread = threading.Thread(target=send)
    thread.start()
    assert not sent.wait(0.2), "the slow reader has taken nothing"
    assert slow.receive() == b"x" * 40
    assert sent.wait(30)
    thread.join()
    assert slow.receive() == fast.receive() == b"y" * 40


def test_a_reader_that_waits_can_be_ended():
    _, (reader,) = ring()
    received: list[bytes | None] = []
    thread = threading.Thread(target=lambda: received.append(reader.receive()))
    thread.start()
    time.sleep(0.05)
    reader.close()
    thread.join(30)
    assert received == [None]


def test_a_writer_that_waits_for_a_dead_reader_can_be_ended():
    writer, _ = ring()
    errors: list[BaseException] = []

    def send() -> None:
        try:
            writer.send(bytes(1000))
        except BrokenPipeError as error:
            errors.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    time.sleep(0.05)
    writer.close()
    thread.join(30)
    assert len(errors) == 1
    with pytest.raises(BrokenPipeError):
        writer.send(b"")


def test_a_reader_may_make_the_ring():
    reader = RingReader.create(4096)
    writer = RingWriter.open(reader.address, 1)
    reader.release()
    writer.send(b"result")
    assert reader.receive() == b"result"
    with pytest.raises(OSError):
        RingWriter.open(reader.address, 1)


def test_what_cannot_be_a_ring():
    with pytest.raises(ValueError, match="1 to"):
        RingWriter.create(MAX_READERS + 1)
    with pytest.raises(ValueError, match="multiple of eight"):
        RingWriter.create(1, 100)
