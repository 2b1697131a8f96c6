"""`sagan-fast view` shows a run or an exported generator as a page in the browser, from this machine alone."""

import socket
from dataclasses import dataclass
from pathlib import Path

from sagan_fast.choices import Device
from sagan_fast.commands.options import read_options
from sagan_fast.errors import InputError

HOST, PORT = "127.0.0.1", 8321


@dataclass
class Options:
    """Show a run or an exported generator as a page in the browser.

    The page has samples, attention maps, the way between two samples, and for a run its curves and scores, also while
    it trains. The server answers this machine only. It writes nothing and reads nothing outside the run.
    """

    checkpoint: str
    """run folder, checkpoint file or exported folder"""
    port: int | None = None
    """port of the page (default: 8321, or a free one if that is in use); 0 takes a free one"""
    device: Device = "auto"
    """where to compute; auto takes cuda if available, else cpu. mps (Apple GPUs) is untested"""


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast view`."""
    options = read_options("view", Options, args, positional=("checkpoint",))
    if options.port is not None and not 0 <= options.port <= 65535:
        raise InputError(f"port must be 0 to 65535, got {options.port}")
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise InputError(f"the page needs the package {error.name}: pip install 'sagan_fast[view]'") from error
    from sagan_fast.distributed import pick_device
    from sagan_fast.view.server import application
    from sagan_fast.view.source import View

    taken = open_port(options.port)
    with taken:
        app = application(View(Path(options.checkpoint), pick_device(options.device)))
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off",
                                timeout_graceful_shutdown=2)  # fmt: skip
        print(f"http://{HOST}:{taken.getsockname()[1]}/ shows {options.checkpoint}; Ctrl-C ends it", flush=True)
        try:
            uvicorn.Server(config).run(sockets=[taken])
        except KeyboardInterrupt:  # uvicorn has ended in good order, and raises it again
            print()


def open_port(port: int | None) -> socket.socket:
    """Return a listening socket on loopback at `port`; None is PORT or, if that is in use, a free one.

    Raises InputError if the port is in use or not allowed.
    """
    out = socket.socket()
    try:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        out.bind((HOST, PORT if port is None else port))
        out.listen(128)
    except OSError as error:
        out.close()
        if port is None:
            return open_port(0)
        why = error.strerror or str(error)
        raise InputError(f"port {port} cannot be used ({why}): choose another with --port, or leave it out") from error
    return out
