"""`sagan-fast info` shows versions, the device and the backends."""

import os
import platform

import sagan_fast
from sagan_fast.commands.options import command_parser


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast info`."""
    command_parser("info", "Show versions, the device, and the backend of attention with its reason.").parse_args(args)
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from sagan_fast.layers.explain import explain
    from sagan_fast.layers.self_attention import SelfAttention2d

    print(f"sagan_fast  {sagan_fast.__version__}")
    print(f"python      {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "triton", "torchvision", "numpy"):
        try:
            print(f"{package:11} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:11} not installed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        capability = ".".join(str(n) for n in torch.cuda.get_device_capability())
        print(f"device      {torch.cuda.get_device_name()}, compute capability {capability}")
    else:
        print(f"device      cpu, {torch.get_num_threads()} threads of {os.cpu_count()}; PyTorch finds no CUDA device")
    for size, channels, pool in ((32, 256, True), (64, 128, True), (64, 64, False)):
        block = SelfAttention2d(channels, pool=pool).to(device)
        x = torch.empty(1, channels, size, size, device=device)
        what = f"{size}x{size}, {channels} channels, {'pooled' if pool else 'unpooled'}"
        line = explain(x, block.theta.weight, block.phi.weight, block.g.weight, None, block.gamma, pool=pool)
        print(f"attention   {what}: {line.split(': ', 1)[1]}")
