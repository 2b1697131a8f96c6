"""A kernel's intermediate code (TTIR) as loops: their source lines, bounds where constant, and the work of one trip."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from benchmarks.sass import folder_and_name

_BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i16": 2, "i8": 1, "i1": 1}
_CONSTANT = re.compile(r"(%[\w#]+) = arith\.constant (-?\d+) : (?:i\d+|index)")
_FOR = re.compile(r"scf\.for %\S+ = (\S+) to (\S+) step (\S+)")
_DOT = re.compile(r"tt\.dot .*: tensor<([\dx]+)x(\w+)> \* tensor<([\dx]+)x\w+>")
_TENSOR = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)")
_LOC = re.compile(r"^(#loc\d*) = loc\((.*)\)\s*$")
_LOC_USE = re.compile(r"loc\((#loc\d*)\)\s*$")


@dataclass
class Work:
    """What one run of a piece of intermediate code asks of a whole program; `mma` counts tcgen05 instructions."""

    flops: int = 0
    mma: int = 0
    exps: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    descriptor_bytes: int = 0

    def add(self, other: Work, times: float = 1) -> None:
        """Add `times` runs of `other`."""
        for name in ("flops", "mma", "exps", "load_bytes", "store_bytes", "descriptor_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name) * times)


@dataclass
class SourceLoop:
    """A `for` or `while` of the intermediate code. `constant` is its trip count where both bounds are constants,
    `total` how often one program runs its body over all entries (filled by `count_trips`)."""

    parent: int | None
    constant: int | None = None
    line: tuple[str, int] | None = None
    work: Work = field(default_factory=Work)
    total: float = 0
    entries: float = 1

    @property
    def where(self) -> str:
        """The source line, for people."""
        return f"line {self.line[1]}" if self.line else "an unknown line"


@dataclass
class Source:
    """A kernel's loops in source order, the work outside all of them, and to which loop each source line belongs.

    `owner` maps (file, line) to the first loop of that line that holds operations of it directly, or to None for
    lines outside all loops. Lines of several loops, or from inside and outside of one (functions that are called
    twice), are left out.
    """

    loops: list[SourceLoop]
    outside: Work
    owner: dict[tuple[str, int], int | None]


def read_ttir(text: str) -> Source:
    """Return what the TTIR `text` says about a kernel."""
    rows = text.splitlines()
    constants = {name: int(value) for name, value in _CONSTANT.findall(text)}
    locations = {match[1]: match[2] for match in map(_LOC.match, rows) if match}
    loops: list[SourceLoop] = []
    outside = Work()
    lines: list[tuple[tuple[str, int], int | None]] = []  # every operation's line and innermost loop
    stack: list[int | None] = []  # one entry for each open brace: the loop it opened, None for any other

    def innermost() -> int | None:
        return next((loop for loop in reversed(stack) if loop is not None), None)

    for row in rows:
        code = row.strip()
        use = _LOC_USE.search(code)
        line = _resolve(use[1], locations) if use else None
        if code.startswith("}") and stack:
            closed = stack.pop()
            if closed is not None and not code.endswith("{"):
                loops[closed].line = line
            if code.endswith("{"):
                stack.append(closed if code.startswith("} do {") else None)
            continue
        if code.startswith(("#loc", "module", "tt.func")):
            stack += [None] * code.endswith("{")
            continue
        here = innermost()
        if line and "arith.constant" not in code:
            lines.append((line, here))
        _count(code, loops[here].work if here is not None else outside)
        match = _FOR.search(code)
        if match or "scf.while" in code:
            bounds = [constants.get(name) for name in match.groups()] if match else []
            loops.append(SourceLoop(here, _trips(bounds)))
            stack.append(len(loops) - 1)
        elif code.endswith("{"):
            stack.append(None)
    return Source(loops, outside, _owners(loops, lines))


def _owners(
    loops: list[SourceLoop], lines: list[tuple[tuple[str, int], int | None]]
) -> dict[tuple[str, int], int | None]:
    first = [next(j for j in range(len(loops)) if loops[j].line == loop.line) for loop in loops]
    owners: dict[tuple[str, int], set[int | None]] = {}
    for line, loop in lines:
        owners.setdefault(line, set()).add(None if loop is None else first[loop])
    owner = {line: next(iter(found)) for line, found in owners.items() if len(found) == 1}
    return owner | {loop.line: first[index] for index, loop in enumerate(loops) if loop.line}


def _trips(bounds: list[int | None]) -> int | None:
    """How often range(*bounds) yields; None unless all three are known."""
    known = [bound for bound in bounds if bound is not None]
    return len(range(*known)) if len(known) == 3 else None


def _resolve(name: str, locations: dict[str, str]) -> tuple[str, int] | None:
    """Follow names and call sites to the innermost file and line."""
    for _ in range(20):
        text = locations.get(name, "")
        if match := re.match(r'"([^"]+)":(\d+):\d+', text):
            return folder_and_name(match[1]), int(match[2])
        inner = re.search(r"#loc\d*", text)
        if not inner:
            return None
        name = inner[0]
    return None


def _count(code: str, work: Work) -> None:
    """Add what one line of TTIR does."""
    if match := _DOT.search(code):
        *batch, m, k = (int(size) for size in match[1].split("x"))
        n = int(match[3].split("x")[-1])
        count = functools.reduce(int.__mul__, batch, 1)
        work.flops += 2 * count * m * n * k
        work.mma += count * -(-m // 128) * -(-n // 256) * -(-k * _BYTES.get(match[2], 2) // 32)
    elif "math.exp2 " in code or "math.exp " in code:
        work.exps += _elements(code)[0]
    elif "tt.load " in code or "tt.descriptor_load" in code:
        elements, size = _elements(code)
        work.load_bytes += elements * size
        work.descriptor_bytes += elements * size if "descriptor" in code else 0
    elif "tt.store " in code or "tt.descriptor_store" in code or "tt.atomic_rmw" in code:
        elements, size = _elements(code)
        work.store_bytes += elements * size


def _elements(code: str) -> tuple[int, int]:
    """Elements of the first tensor in the line's types, and bytes of one; a scalar has one element of four bytes."""
    match = _TENSOR.search(code.rsplit(" : ", 1)[-1]) or _TENSOR.search(code)
    if not match:
        return 1, 4
    sizes = [int(size) for size in match[1].rstrip("x").split("x")]
    return functools.reduce(int.__mul__, sizes, 1), _BYTES.get(match[2], 4)
