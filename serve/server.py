"""Runs the application in uvicorn: loads the model meanwhile, and ends when it is told to."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from pastkey.runtime import LanguageModel

from .app import application
from .connection import TimedConnection
from .service import Service
from .settings import ServerSettings


class Server(uvicorn.Server):
    """uvicorn's server, which ends with success after SIGTERM: its requests were answered.

    Attributes:
        loading: Whether the model is loaded meanwhile.
    """

    loading = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's; but nothing interrupts the thread that loads, and Python would wait for it."""
        if self.loading:
            atexit._run_exitfuncs()  # they remove an unpacked bundle
            os._exit(0 if sig == signal.SIGTERM else 128 + sig)
        if sig == signal.SIGTERM:
            self.should_exit = True  # uvicorn would raise the signal again at the end
        else:
            super().handle_exit(sig, frame)


def run(settings: ServerSettings, listening: socket.socket, load: Callable[[], LanguageModel]) -> None:
    """Answers until SIGTERM or Ctrl-C. Raises the errors of `load`."""
    asyncio.run(serve(settings, listening, load))


async def serve(
    settings: ServerSettings,
    listening: socket.socket,
    load: Callable[[], LanguageModel],
    started: Callable[[Server, Service], None] = lambda server, service: None,
) -> None:
    """Serves in a running event loop. `started` gets the server, whose `should_exit` ends it."""
    service = Service(settings)
    config = uvicorn.Config(
        application(service),
        http=type("TimedConnection", (TimedConnection,), {"header_seconds": settings.receive_seconds}),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=settings.access_log,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, round(settings.receive_seconds)),
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    # uvicorn's messages of clients that send no HTTP, or go away, are of no use to a user.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    access = logging.getLogger("uvicorn.access")
    access.setLevel(logging.INFO if settings.access_log else logging.CRITICAL)
    if settings.access_log and not access.handlers:
        access.addHandler(logging.StreamHandler())
    server = Server(config)
    started(server, service)

    async def loading() -> LanguageModel:
        try:
            model = await asyncio.to_thread(load)
            service.loaded(model)
            return model
        except BaseException:
            server.should_exit = True
            raise
        finally:
            server.loading = False

    task = asyncio.create_task(loading())
    await server.serve([listening])
    if task.done():
        await asyncio.to_thread(task.result().close)  # requests that were cut end meanwhile
