"""What a page or a report shows: the history of a run and the model of its newest checkpoint."""

import base64
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sagan_fast.errors import InputError
from sagan_fast.view.history import History, is_started, mark_of, run_of
from sagan_fast.view.model import Model


class View:
    """What the page shows: the history of a run, and the model of its newest checkpoint at the last `load`.

    Raises InputError if `source` is no run, checkpoint or export, or its checkpoint cannot be read. A run without a
    checkpoint yet has no model.
    """

    def __init__(self, source: Path, device: torch.device) -> None:
        self.source, self.device = source, device
        self.history = History(run_of(source))
        self.model: Model | None = None
        self.missing = ""
        self.mark: tuple[int, int, int] | None = None
        self.load()

    def load(self) -> None:
        """Read the newest weights; InputError if they cannot be read, and the model stays the one before."""
        mark = self._mark()
        if mark is None and is_started(self.source):
            self.missing = "This run has no checkpoint yet. Its curves are below."
            return
        self.model, self.missing = Model(self.source, self.device), ""
        self.mark = mark  # only now: what could not be read is still to be read

    def status(self) -> dict[str, Any]:
        """Return what the page asks for every few seconds."""
        lines, mark = self.history.lines(), self._mark()
        return {
            "step": lines[-1]["step"] if lines else None,
            "steps": self.history.config().get("steps"),
            "time": lines[-1].get("time") if lines else None,
            "lines": len(lines),
            "pictures": [[picture.step, f"/pictures/{picture.path.name}"] for picture in self.history.pictures()],
            "data": "/pictures/data.png" if self.history.picture("data.png") else None,
            "scores": len(self.history.scores()),
            "newer": mark is not None and mark != self.mark,
        }

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            return mark_of(self.source)
        except InputError:
            if is_started(self.source):
                return None
            raise


def png(image: Tensor) -> str:
    """Return the uint8 image (3, H, W) as a data URI."""
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
