"""The server's life: a port, an application on it, and a drain when it is told to end."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn
from starlette.routing import BaseRoute

from rooflight.errors import InvalidValue
from rooflight.serve.api.app import Gate, build_app
from rooflight.serve.api.context import ServingEngine
from rooflight.serve.settings import ServerSettings

# After the engine has drained, for the last bytes to reach their clients.
FLUSH_SECONDS = 2


def listen(settings: ServerSettings) -> socket.socket:
    """A socket bound to the address of the settings; raises InvalidValue when it cannot be had.

    Made before a model is loaded, so that a port that is taken is known at once.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise InvalidValue(
            f"--host {settings.host} --port {settings.port}: {error.strerror or error}; name another --host or --port"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, but a first signal drains the engine before anything closes, and its exit is a success."""

    def __init__(self, app: Gate):
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self.gate = app
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._say: Callable[[str], None] | None = None
        self.stopped = False

    async def run_on(self, bound: socket.socket, say: Callable[[str], None] | None = None) -> None:
        """Serve until a signal or `end`, then drain and return; `say` is told when connections are taken."""
        self._loop, self._say = asyncio.get_running_loop(), say
        await self.serve(sockets=[bound])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self._say is not None and sockets:
            self._say(f"serving {', '.join(self.gate.context.names)} at {address_of(sockets[0])}/v1")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first drains, a second ends at once."""
        if self._loop is None or self.gate.context.draining:
            self.should_exit = self.force_exit = True
            return
        self.gate.context.draining = True
        # Not here: a handler may run in the middle of another print, and before the next signal it must be through.
        self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def _begin_drain(self, name: str) -> None:
        seconds = self.gate.context.settings.drain_seconds
        print(f"{name}: no new requests; up to {seconds:g} s for those that run", file=sys.stderr, flush=True)
        self._drain = asyncio.ensure_future(self.end())

    async def end(self) -> None:
        """Refuse new work, let running requests end for as long as the settings allow, then close."""
        self.gate.context.draining = True
        self.stopped = True
        try:
            await self.gate.context.engine.stop(self.gate.context.settings.drain_seconds)
        finally:
            self.should_exit = True


def serve(
    engine: ServingEngine,
    settings: ServerSettings,
    extra_routes: Sequence[BaseRoute] = (),
    bound: socket.socket | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> None:
    """Serve an engine until SIGTERM or SIGINT, drain, and return; raises InvalidValue when the port is taken."""
    asyncio.run(_serve(engine, settings, extra_routes, bound or listen(settings), say))


async def _serve(
    engine: ServingEngine,
    settings: ServerSettings,
    extra_routes: Sequence[BaseRoute],
    bound: socket.socket,
    say: Callable[[str], None],
) -> None:
    server = Server(build_app(engine, settings, extra_routes))
    await engine.start()
    try:
        await server.run_on(bound, say)
    finally:
        if not server.stopped:
            await engine.stop(0.0)
