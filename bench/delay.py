"""A TCP proxy that adds half of a round-trip time each way: `python -m bench.delay UPSTREAM_PORT MILLISECONDS`.

Prints the port that it listens on. Bytes keep their order, and are not held for longer than the delay.
"""

import asyncio
import sys
from contextlib import suppress

PIECE = 256 * 1024


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

    async def write() -> None:
        while True:
            due, piece = await queue.get()
            if seconds and (left := due - loop.time()) > 0:
                await asyncio.sleep(left)
            if not piece:
                writer.close()
                return
            writer.write(piece)
            await writer.drain()

    writing = asyncio.create_task(write())
    with suppress(OSError):
        while piece := await reader.read(PIECE):
            await queue.put((loop.time() + seconds, piece))
    await queue.put((loop.time() + seconds, b""))
    with suppress(OSError):
        await writing


async def serve(upstream: int, milliseconds: float) -> None:
    """Forward a free port on loopback to `upstream`, with `milliseconds` of added round-trip time."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", upstream, limit=2 * PIECE)
        except OSError:
            writer.close()
            return
        one_way = milliseconds / 2000
        await asyncio.gather(_pump(reader, back, one_way), _pump(there, writer, one_way))

    server = await asyncio.start_server(client, "127.0.0.1", 0, limit=2 * PIECE)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2])))
