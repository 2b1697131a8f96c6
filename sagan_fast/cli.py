"""The command line: runs a command and turns its errors into one sentence and an exit status."""

import sys
from collections.abc import Sequence
from importlib import import_module

import sagan_fast
from sagan_fast.commands.options import underscored
from sagan_fast.errors import Diverged, InputError, nearest

COMMANDS = {
    "prepare": "write a packed set: images decoded once, for fast reading",
    "train": "train a SAGAN on images, or resume a run",
    "sample": "generate images from a run or checkpoint, without a data set",
    "evaluate": "compute IS, FID, KID, precision and more for a checkpoint or a folder of images",
    "attention": "draw attention maps of the generator or the discriminator",
    "export": "write the generator as safetensors, ONNX, TorchScript, or for BigGAN-PyTorch or StudioGAN",
    "import": "read the generator of another code base's checkpoint",
    "faces": "find faces in pictures, crop them to train on, train and measure the detector",
    "info": "show versions, the device, and the backend of attention with its reason",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 2 bad input (one sentence on stderr), 1 anything else."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] in ("-h", "--help"):
            print(f"usage: sagan-fast {{{','.join(COMMANDS)}}} ...\n\nTrain, sample and score self-attention GANs.\n")
            for name, what in COMMANDS.items():
                print(f"  {name:9} {what}")
            print("\nsagan-fast COMMAND --help shows a command's options.")
            return 0 if args else 2
        if args[0] == "--version":
            print(f"sagan-fast {sagan_fast.__version__}")
            return 0
        if args[0] not in COMMANDS:
            raise InputError(f"unknown command {args[0]!r}{nearest(args[0], COMMANDS)}")
        import_module(f"sagan_fast.commands.{args[0]}").run(underscored(args[1:]))
    except InputError as error:
        print(f"sagan-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sagan-fast: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (OSError, Diverged) as error:  # OSError: a full disk, a folder that went away
        print(f"sagan-fast: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
