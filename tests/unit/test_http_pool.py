"""The pool of connections, against a real server: no place is lost to those who give up, and errors are httpx's."""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from shared.http_pool import PooledTransport

PLACES = 4
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter, bytes], Awaitable[None]]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    """Address of a server that reads heads and bodies and lets ``answer`` do the rest."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = re.search(rb"content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                await answer(reader, writer, body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def client(url: str, **options: object) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=PLACES, max_keepalive_connections=PLACES)
    timeout = httpx.Timeout(None, **options)
    return httpx.AsyncClient(base_url=url, transport=PooledTransport(limits), timeout=timeout, trust_env=False)


def says(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)


async def test_no_place_is_lost_to_those_who_give_up() -> None:
    dice = random.Random(0)
    all_here = asyncio.Barrier(PLACES)

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        if body == b"together":
            await all_here.wait()
        else:
            await asyncio.sleep(dice.random() * 0.004)
        says(writer, body)

    async def given_up_on(http: httpx.AsyncClient, gate: asyncio.Semaphore) -> bool:
        async with gate:
            try:
                async with asyncio.timeout(10 ** dice.uniform(-3.5, -0.5)):
                    return (await http.post("/", content=b"alone")).content == b"alone"
            except TimeoutError:
                return False

    async with serving(answer) as url, client(url) as http:
        gate = asyncio.Semaphore(2 * PLACES)
        answered = await asyncio.gather(*(given_up_on(http, gate) for _ in range(1500)))
        assert min(answered.count(True), answered.count(False)) > 100
        async with asyncio.timeout(20):  # as many at once as there are places, none of which is answered before all
            together = await asyncio.gather(*(http.post("/", content=b"together") for _ in range(PLACES)))
        assert [response.content for response in together] == [b"together"] * PLACES


async def test_what_is_sent_and_what_comes_back_may_be_streams() -> None:
    parts = [bytes([number]) * number * 1000 for number in range(1, 20)]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _body: bytes) -> None:
        got = b""
        while (size := int(await reader.readline(), 16)) > 0:
            got += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
        says(writer, got)

    async def pieces() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    async with serving(answer) as url, client(url) as http:
        request = http.build_request("PUT", "/a/path?and=a%20query", content=pieces())
        response = await http.send(request, stream=True)
        assert b"".join([part async for part in response.aiter_bytes()]) == b"".join(parts)
        await response.aclose()


async def test_what_goes_wrong_is_an_error_of_httpx() -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        match body:
            case b"hang up":
                raise ConnectionError
            case b"break off":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
                await writer.drain()
                raise ConnectionError
            case b"no HTTP":
                writer.write(b"220 ready\r\n\r\n")
            case _:
                await asyncio.sleep(0.5)
                says(writer, body)

    async with serving(answer) as url, client(url, read=0.1, pool=0.05) as http:
        for body in (b"hang up", b"break off", b"no HTTP"):
            with pytest.raises(httpx.RemoteProtocolError):
                await http.post("/", content=body)
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/", content=b"wait")
        with pytest.raises(httpx.UnsupportedProtocol):
            await http.get("ftp://127.0.0.1/")
        found = await asyncio.gather(*(http.post("/", content=b"wait") for _ in range(9)), return_exceptions=True)
        assert {type(error) for error in found} == {httpx.PoolTimeout, httpx.ReadTimeout}
    with pytest.raises(httpx.ConnectError):
        async with client(url) as http:
            await http.get("/")
