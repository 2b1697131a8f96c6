"""The command line: runs a command and turns its errors into one sentence and an exit status."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from sagan_fast.errors import Diverged, InputError
from sagan_fast.version import __version__
from sagan_fast.words import nearest

COMMANDS = {
    "prepare": "write a packed set: images decoded once, for fast reading",
    "train": "train a SAGAN on images, or resume a run",
    "sample": "generate images from a run or checkpoint, without a data set",
    "evaluate": "compute IS, FID, KID, precision and more for a checkpoint or a folder of images",
    "attention": "draw attention maps of the generator or the discriminator",
    "view": "show a run or an exported generator as a page in the browser",
    "report": "write what the page shows as one HTML file",
    "export": "write the generator as safetensors, ONNX, TorchScript, or for BigGAN-PyTorch or StudioGAN",
    "import": "read the generator of another code base's checkpoint",
    "faces": "find faces in pictures, crop them to train on, train and measure the detector",
    "info": "describe a run, or show versions, the device and the backend of attention",
}


INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as a shell has it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done. 2: bad input, with one sentence on stderr. 130: interrupted. 1: anything else.
    """
    with _interruptible():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(args: list[str]) -> int:
    try:
        if args[0:1] == ["help"]:
            args = [*args[1:], "--help"]
        if not args or args[0] in ("-h", "--help"):
            print(f"usage: sagan-fast {{{','.join(COMMANDS)}}} ...\n\nTrain, sample and score self-attention GANs.\n")
            for name, what in COMMANDS.items():
                print(f"  {name:9} {what}")
            print("\nsagan-fast COMMAND --help shows a command's options.")
            return 0 if args else 2
        if args[0] == "--version":
            print(f"sagan-fast {__version__}")
            return 0
        if args[0] not in COMMANDS:
            hint = nearest(args[0], COMMANDS) or "; `sagan-fast --help` lists the commands"
            raise InputError(f"unknown command {args[0]!r}{hint}")
        options = import_module("sagan_fast.commands.options")
        try:
            import_module(f"sagan_fast.commands.{args[0]}").run(options.underscored(args[1:]))
        except InputError as error:
            raise InputError(options.as_typed(str(error))) from error
    except InputError as error:
        print(f"sagan-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"sagan-fast: {str(error) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (OSError, Diverged) as error:  # OSError: a full disk, a folder that went away
        print(f"sagan-fast: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, but during an import end the process at once.

    Modules in C turn a KeyboardInterrupt into an error of their own, or lose it, and nothing is under way yet.
    """

    def leave(_number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                if not int(os.environ.get("RANK", "0")):
                    os.write(2, b"sagan-fast: interrupted\n")
                os._exit(INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, leave)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
