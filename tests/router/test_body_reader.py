"""BodyReader over real connections: what it hands on, when it does not, and that connections are used again."""

from __future__ import annotations

import asyncio
import contextlib
import functools

import aiohttp
import pytest

from shoal.router.asgi import Answer
from shoal.router.body_reader import BodyReader

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: x/y\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Upstream:
    """A server that answers every request with a head; the test writes the rest."""

    def __init__(self) -> None:
        self.writers: list[asyncio.StreamWriter] = []
        self.num_connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                self.writers.append(writer)
                writer.write(HEAD)
        writer.close()


@pytest.fixture
async def upstream():
    upstream = Upstream()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with aiohttp.ClientSession() as session:
        upstream.get = functools.partial(session.get, upstream.url)
        yield upstream
    server.close()


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_pieces_are_handed_on_without_the_task(upstream):
    taken: list[tuple[bytes, asyncio.Task[None] | None]] = []
    async with upstream.get() as response:
        with BodyReader(response) as reader:
            reading = asyncio.create_task(reader.read(lambda piece: taken.append((piece, asyncio.current_task()))))
            for number in range(1, 4):
                upstream.writers[0].write(chunk(b"%d" % number))
                await until(lambda number=number: len(taken) == number)
            upstream.writers[0].write(chunk(b"4") + END)
            assert await reading is False
    assert [piece for piece, _ in taken] == [b"1", b"2", b"3", b"4"]
    assert [task for _, task in taken[1:]] == [None] * 3, "the first one may have been there before the reading"


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_connections_are_used_again(upstream, size):
    data = chunk(b"some") + chunk(b"thing") + END
    for number in range(3):
        taken = b""

        def take(piece: bytes) -> None:
            nonlocal taken
            taken += piece

        async with upstream.get() as response:
            with BodyReader(response) as reader:
                reading = asyncio.create_task(reader.read(take))
                for start in range(0, len(data), size):
                    upstream.writers[number].write(data[start : start + size])
                    await asyncio.sleep(0.002)
                assert await reading is False
        assert taken == b"something"
    assert upstream.num_connections == 1


async def test_nothing_is_handed_on_while_a_rest_is_done(upstream):
    gate, taken = asyncio.Event(), []

    async def rest(piece: bytes) -> bool:
        await gate.wait()
        return piece.endswith(b"3")

    def take(piece: bytes):
        taken.append(piece)
        return rest(piece) if piece != b"1" else None

    async with upstream.get() as response:
        with BodyReader(response) as reader:
            reading = asyncio.create_task(reader.read(take))
            for piece in (b"1", b"2"):
                upstream.writers[0].write(chunk(piece))
                await until(lambda piece=piece: taken[-1:] == [piece])
            upstream.writers[0].write(chunk(b"x") + chunk(b"3"))
            await asyncio.sleep(0.05)
            assert taken == [b"1", b"2"]
            gate.set()
            assert await reading is True
    assert b"".join(taken) == b"12x3"


async def test_what_take_raises_is_raised_to_the_reader(upstream):
    def take(piece: bytes) -> None:
        raise ValueError(piece)

    async with upstream.get() as response:
        with BodyReader(response) as reader:
            reading = asyncio.create_task(reader.read(take))
            await asyncio.sleep(0.01)
            upstream.writers[0].write(chunk(b"bad"))
            with pytest.raises(ValueError, match="bad"):
                await reading


@pytest.mark.parametrize("how", ["closed", "reset", "no chunk"])
async def test_a_connection_that_breaks(upstream, how):
    taken = []
    async with upstream.get() as response:
        with BodyReader(response) as reader:
            reading = asyncio.create_task(reader.read(taken.append))
            upstream.writers[0].write(chunk(b"1"))
            await until(lambda: taken)
            match how:
                case "closed":
                    upstream.writers[0].close()
                case "reset":
                    upstream.writers[0].transport.abort()
                case _:
                    upstream.writers[0].write(b"what is this\r\n")
            with pytest.raises(aiohttp.ClientError):
                await asyncio.wait_for(reading, 10)
    assert taken == [b"1"]


async def test_who_reads_can_be_cancelled(upstream):
    async with upstream.get() as response:
        with BodyReader(response) as reader:
            reading = asyncio.create_task(reader.read(lambda piece: None))
            await asyncio.sleep(0.01)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            upstream.writers[0].write(chunk(b"late") + END)
            await until(lambda: response.content.is_eof())
            assert await response.content.readany() == b"late"


async def test_a_server_that_is_ahead_of_a_slow_client_is_held_up(upstream):
    gate, taken = asyncio.Event(), []

    async def rest() -> bool:
        await gate.wait()
        return False

    def take(piece: bytes):
        taken.append(len(piece))
        return None if gate.is_set() else rest()

    async with upstream.get() as response:
        with BodyReader(response) as reader:
            reading = asyncio.create_task(reader.read(take))
            writer = upstream.writers[0]
            data, num_sent = chunk(b"x" * 65536), 0
            with contextlib.suppress(TimeoutError):
                while num_sent < 1000:
                    writer.write(data)
                    num_sent += 1
                    await asyncio.wait_for(writer.drain(), 0.5)
            assert num_sent < 1000, "64 MiB have gone somewhere"
            gate.set()
            writer.write(END)
            assert await asyncio.wait_for(reading, 20) is False
    assert sum(taken) == num_sent * 65536


# --- what is sent from there -----------------------------------------------------------------------------------------


class Client:
    """ASGI's send of a client that is slow while `ready` is not set."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.sent: list[bytes] = []

    async def send(self, message) -> None:
        await asyncio.sleep(0) if message["type"] == "http.response.start" else None
        if not self.ready.is_set():
            await self.ready.wait()
        self.sent.append(message.get("body", b"head"))


async def test_a_send_that_need_not_wait_is_done_at_once():
    client = Client()
    client.ready.set()
    answer = Answer(client.send, "id")
    go_on = answer.begin_data(b"1")
    assert go_on is not None and client.sent == [], "the head is a task's business"
    await go_on()
    assert answer.begin_data(b"2") is None
    assert client.sent == [b"head", b"1", b"2"]


async def test_a_send_that_waits_goes_on_in_a_task():
    client = Client()
    client.ready.set()
    answer = Answer(client.send, "id")
    await answer.data(b"1")
    client.ready.clear()
    go_on = answer.begin_data(b"2")
    assert go_on is not None
    waiting = asyncio.ensure_future(go_on())
    await asyncio.sleep(0.01)
    assert not waiting.done() and client.sent == [b"head", b"1"]
    client.ready.set()
    await asyncio.wait_for(waiting, 10)
    assert client.sent == [b"head", b"1", b"2"]


async def test_a_send_that_waits_can_be_cancelled():
    client = Client()
    client.ready.set()
    answer = Answer(client.send, "id")
    await answer.data(b"1")
    client.ready.clear()
    waiting = asyncio.ensure_future(answer.begin_data(b"2")())
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    client.ready.set()
    await asyncio.sleep(0.01)
    assert client.sent == [b"head", b"1"]
