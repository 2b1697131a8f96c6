"""What a benchmark file declares: parts, each a name and a function that builds its cases for a target.

A bench is one file, `bench_NAME.py`: a function that builds a `Case` (its inputs, its float64 truth, its providers), a
function that yields the cases of a `Target`, and `PARTS`. It becomes a command of its own with
`sys.exit(command.main(PARTS))`, and part of `python -m benchmarks.run` with a place in the list there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.harness import Case


@dataclass(frozen=True)
class Target:
    """Where cases run, and whose providers they have.

    `device`, "cuda" or "cpu", holds the tensors. With `dry_run` the CPU walks what a GPU would be given: a GPU's
    providers, in float32 and with sizes cut down.
    """

    device: str
    dry_run: bool = False

    @property
    def gpu(self) -> bool:
        """Whether the providers, and the list of cases, are a GPU's."""
        return self.dry_run or self.device == "cuda"

    @property
    def backend(self) -> str:
        """The backend of our own provider: "triton" for a GPU's, else what "auto" takes."""
        return "triton" if self.gpu else "auto"


@dataclass(frozen=True)
class Part:
    """Cases that run together in one process; `cases` builds each when its turn comes.

    `gpu` and `cpu` say where the part is run. With `timed` off, results are held against the truth and not timed. With
    `by_default` off, the part runs only when it is named.
    """

    name: str
    cases: Callable[[Target], Iterable[Case]]
    gpu: bool = True
    cpu: bool = True
    timed: bool = True
    by_default: bool = True
