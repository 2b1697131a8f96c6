"""DINOv2 ViT-L/14, whose class tokens FD-DINOv2 compares (Stein et al. 2023, https://arxiv.org/abs/2306.04675).

The code of the network comes from its authors' repository through torch.hub, and the input is normalised as
torch-fidelity 0.4 does it. torch-fidelity cannot take the weights from a file, so that is done here.
"""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sagan_fast.errors import InputError
from sagan_fast.files import file_sha256, reason

REPOSITORY, NAME = "facebookresearch/dinov2", "dinov2_vitl14"
CHECKPOINT = f"{NAME}_pretrain.pth"
URL = f"https://dl.fbaipublicfiles.com/dinov2/{NAME}/{CHECKPOINT}"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dinov2(weights: str | None) -> tuple[nn.Module, str]:
    """Return the network, (B, 3, 224, 224) in [0, 255] to (features, no logits), and the SHA-256 of its weights.

    Args:
        weights: file of the weights; None takes PyTorch's cache, or downloads them.

    Raises InputError if the weights or the code of the network cannot be had; the sentence says what to do.
    """
    path = Path(weights).expanduser() if weights else Path(torch.hub.get_dir(), "checkpoints", CHECKPOINT)
    if weights and not path.is_file():
        raise InputError(f"there is no file of DINOv2's weights {path}")
    load: Any = torch.hub.load
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if weights else None
        with redirect_stdout(sys.stderr):
            network = load(REPOSITORY, NAME, pretrained=state is None)
        if state is not None:
            network.load_state_dict(state)
    except OSError as error:  # URLError is
        raise InputError(
            f"DINOv2 cannot be fetched ({reason(error)}): on a machine with a network, run torch.hub.load("
            f"'{REPOSITORY}', '{NAME}') and copy {torch.hub.get_dir()}; --inception-weights FILE takes the weights "
            f"alone ({URL})"
        ) from error
    except Exception as error:  # pickle's and PyTorch's complaints about a wrong file are of many kinds
        raise InputError(f"{path} does not hold the weights of DINOv2 ViT-L/14: {reason(error)}") from error
    return _Normalised(network), file_sha256(path) if path.exists() else URL


class _Normalised(nn.Module):
    """`network` of images in [0, 255], with no logits."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None] * 255)
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None] * 255)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network((x - self.mean) / self.deviation)
        return features, features.new_zeros(len(x), 0)
