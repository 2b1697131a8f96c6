"""Sends the numbers and pictures of a run to Weights & Biases as well; the package wandb is optional.

API: https://docs.wandb.ai/ref/python (init, define_metric, log, Image, finish).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sagan_fast.errors import InputError


class WandbBoard:
    """A run of the wandb project `project`, with the methods of TensorBoard's SummaryWriter that the log calls.

    Its name is that of the folder `run`, and its files lie in RUN/wandb. A resumed run goes on in the same curves.
    Raises InputError if wandb is not installed or cannot start.
    """

    def __init__(self, project: str, run: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError("--wandb needs the package wandb: pip install 'sagan_fast[wandb]'") from error
        self.wandb: Any = wandb
        note = run / "wandb" / "id.txt"
        known = note.read_text().strip() if note.exists() else None
        try:
            self.run = wandb.init(
                project=project, name=run.absolute().name, dir=str(run), config=dict(config), id=known, resume="allow"
            )
        except Exception as error:  # no login, no network: of many kinds
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"--wandb {project} cannot start: {said}") from error
        note.parent.mkdir(exist_ok=True)
        note.write_text(self.run.id)
        self.run.define_metric("*", step_metric="step")  # an evaluation in the background is of an earlier step
        self.numbers: dict[int, dict[str, Any]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Note `value`; `flush` sends what was noted."""
        self.numbers.setdefault(step, {})[name] = value

    def add_image(self, name: str, image: Tensor, step: int) -> None:
        """Note the uint8 picture (3, h, w)."""
        self.numbers.setdefault(step, {})[name] = self.wandb.Image(image.permute(1, 2, 0).numpy())

    def add_text(self, name: str, text: str) -> None:
        """Do nothing: the configuration is given at the start."""

    def flush(self) -> None:
        """Send what was noted since the last call, a message for each step."""
        for step, values in sorted(self.numbers.items()):
            self.run.log({"step": step, **values})
        self.numbers = {}

    def close(self) -> None:
        """Send the rest and end the run there."""
        self.flush()
        self.run.finish()
