"""How often each loop of the machine code runs: its loop in the source, the trips of that, what the compiler unrolled.

The intermediate code (TTIR) of a kernel names every loop with its source line, its bounds where they are constants,
and the products, exponentials and loads of one trip. A loop of the machine code belongs to the source loop that most
of its lines are from; the work in it over the work of one trip says how far it was unrolled; work of that loop outside
it was peeled off. What cannot be told is a note, never a guess in silence.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.sass import Code, Instruction

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


def read_ttir(text: str) -> tuple[list[SourceLoop], Work]:
    """Return the loops of the TTIR `text` in source order, and the work outside all of them."""
    constants = {name: int(value) for name, value in _CONSTANT.findall(text)}
    locations = {match[1]: match[2] for match in map(_LOC.match, text.splitlines()) if match}
    loops: list[SourceLoop] = []
    outside = Work()
    stack: list[int | None] = []  # one entry for each open brace: the loop it opened, None for any other

    def innermost() -> int | None:
        return next((loop for loop in reversed(stack) if loop is not None), None)

    for row in text.splitlines():
        code = row.strip()
        if code.startswith("}") and stack:
            closed = stack.pop()
            use = _LOC_USE.search(code)
            if closed is not None and use and not code.endswith("{"):
                loops[closed].line = _resolve(use[1], locations)
            if code.startswith("} do {"):
                stack.append(closed)
            elif code.endswith("{"):
                stack.append(None)
            continue
        _count(code, loops[loop].work if (loop := innermost()) is not None else outside)
        match = _FOR.search(code)
        if match or "scf.while" in code:
            bounds = [constants.get(name) for name in match.groups()] if match else [None]
            loops.append(SourceLoop(innermost(), _trips(bounds)))
            stack.append(len(loops) - 1)
        elif code.endswith("{"):
            stack.append(None)
    return loops, outside


def _trips(bounds: list[int | None]) -> int | None:
    if any(bound is None for bound in bounds):
        return None
    low, high, step = bounds
    return max(0, -(-(high - low) // step))


def _resolve(name: str, locations: dict[str, str]) -> tuple[str, int] | None:
    """Follow names and call sites to the innermost file and line."""
    for _ in range(20):
        text = locations.get(name, "")
        if match := re.match(r'"([^"]+)":(\d+):\d+', text):
            return match[1], int(match[2])
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


def count_trips(loops: Sequence[SourceLoop], given: Sequence[int]) -> list[str]:
    """Fill `total` and `entries` of every loop from its constant bounds or from `given`, the plan's counts in source
    order (for a loop inside others: over all of their trips together). Return notes on what did not fit.
    """
    unknown = [loop for loop in loops if loop.constant is None]
    notes = []
    if len(given) == len(loops) != len(unknown):
        for loop, total in zip(loops, given, strict=True):
            loop.total = total
    else:
        counts = list(given) + [1] * (len(unknown) - len(given))
        if len(given) != len(unknown):
            notes.append(f"the plan gives {len(given)} trip counts for {len(unknown)} run-time loops")
        for loop in loops:
            around = loops[loop.parent].total if loop.parent is not None else 1
            loop.total = around * loop.constant if loop.constant is not None else counts.pop(0)
    for loop in loops:
        loop.entries = loops[loop.parent].total if loop.parent is not None else 1
    return notes


@functools.cache
def _ends_by_line(path: str) -> dict[int, int]:
    """Last line of the loop that begins on a line, for every loop of a Python file."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError):
        return {}
    return {
        node.lineno: node.end_lineno or node.lineno for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While))
    }


def _loops_at(line: tuple[str, int] | None, loops: Sequence[SourceLoop]) -> list[int]:
    """Source loops whose lines hold `line`, the outermost first."""
    if line is None:
        return []
    inside = []
    for index, loop in enumerate(loops):
        if loop.line and loop.line[0] == line[0]:
            end = _ends_by_line(loop.line[0]).get(loop.line[1], loop.line[1])
            if loop.line[1] <= line[1] <= end:
                inside.append(index)
    return inside


@dataclass
class Mapping:
    """`executions[i]`: how often one warp runs the body of machine loop i; `loops[i]`: its source loop, `unroll[i]`."""

    executions: list[float]
    source: list[int | None]
    unroll: list[int]
    notes: list[str]


def map_loops(code: Code, loops: Sequence[SourceLoop], warps: int) -> Mapping:
    """Say how often each loop of the machine code runs; `count_trips` must have filled the source loops."""
    notes: list[str] = []
    source = [_source_of(code, index, loops) for index in range(len(code.loops))]
    mapped = set(source)
    unroll = [1] * len(code.loops)
    per_trip = [_inclusive(loops, index, mapped) for index in range(len(loops))]
    for index, loop in enumerate(source):
        if loop is None:
            continue
        ratio = _ratio(code.own_instructions(index), per_trip[loop], warps)
        if ratio is None and code.loops[index].children:
            continue  # unrolled, it would have several copies of what is inside
        if ratio is None:
            notes.append(f"{loops[loop].where}: nothing to tell unrolling by, taken as not unrolled")
        else:
            unroll[index] = max(1, round(ratio))
            if abs(ratio - unroll[index]) > 0.25 * unroll[index]:
                notes.append(f"{loops[loop].where}: {ratio:.2f} trips' work in one of the machine's, taken as whole")
    executions = [1.0] * len(code.loops)
    for loop in sorted({s for s in source if s is not None}):
        same_line = [j for j in range(len(loops)) if loops[j].line == loops[loop].line]
        machine = sorted((i for i, s in enumerate(source) if s == loop), key=lambda i: code.loops[i].header)
        if loop != same_line[0]:
            continue  # shared below with the first loop of that line
        notes += _share(code, [loops[j] for j in same_line], machine, unroll, executions, per_trip[loop], warps)
    for index, loop in enumerate(source):
        if loop is None:
            notes.append(f"a loop of {len(code.own_instructions(index))} instructions has no source loop: counted once")
    return Mapping(executions, source, unroll, notes)


def _source_of(code: Code, index: int, loops: Sequence[SourceLoop]) -> int | None:
    """The outermost source loop that a fair share of the machine loop's own lines belongs to itself."""
    votes: Counter[int] = Counter()
    for instruction in code.own_instructions(index):
        inside = _loops_at(instruction.line, loops)
        if inside:
            deepest = max(inside, key=lambda j: _depth(loops, j))
            first = next(j for j in range(len(loops)) if loops[j].line == loops[deepest].line)
            votes[first] += 1
    if not votes:
        return None
    fair = 0.08 * sum(votes.values())
    return min((j for j in votes if votes[j] >= fair), key=lambda j: (_depth(loops, j), -votes[j]))


def _depth(loops: Sequence[SourceLoop], index: int) -> int:
    parent = loops[index].parent
    return 0 if parent is None else 1 + _depth(loops, parent)


def _inclusive(loops: Sequence[SourceLoop], index: int, mapped: set[int | None]) -> Work:
    """Work of one trip, with that of loops inside it that the machine code does not have as loops."""
    total = Work()
    total.add(loops[index].work)
    for child, loop in enumerate(loops):
        if loop.parent == index and child not in mapped and loop.entries:
            total.add(_inclusive(loops, child, mapped), loop.total / loop.entries)
    return total


def _ratio(instructions: Sequence[Instruction], trip: Work, warps: int) -> float | None:
    """Work of these instructions over the work of one trip, by the first of products, exponentials, global loads and
    stores that the trip has. None if it has none, or none of it is in the instructions."""
    threads = 32 * warps
    live = [i for i in instructions if not i.never]
    products = sum(tensor_flops(i, warps) for i in live)
    tcgen05 = sum(i.base == "UTCHMMA" for i in live)
    exps = threads * sum(i.op.startswith("MUFU.EX2") for i in live)
    loaded = threads * sum(access_bytes(i) for i in live if i.base in ("LDG", "LDGSTS"))
    stored = threads * sum(access_bytes(i) for i in live if i.base in ("STG", "RED", "ATOMG"))
    for have, want in (
        (products, trip.flops),
        (tcgen05 if not exps else 0, trip.mma),
        (exps, trip.exps),
        (loaded, trip.load_bytes if trip.load_bytes >= 2 * threads else 0),  # a scalar is loaded by every thread
        (stored, trip.store_bytes if trip.store_bytes >= 2 * threads else 0),
    ):
        if have and want:
            return have / want
    return None


def _share(
    code: Code,
    sources: Sequence[SourceLoop],
    machine: Sequence[int],
    unroll: Sequence[int],
    executions: list[float],
    trip: Work,
    warps: int,
) -> list[str]:
    """Spread the trips of the source loops of one line over the machine loops that came from it."""
    loop = sources[0]
    notes = []
    if len(sources) > 1 and len(sources) == len(machine):  # a helper with a loop, inlined several times
        for one, index in zip(sources, machine, strict=True):
            executions[index] = one.total / unroll[index]
        return notes
    total = sum(one.total for one in sources)
    outside = [i for i in code.own_instructions(None) if loop.line and _loops_at(i.line, [loop])]
    peeled = 0.0
    if loop.parent is None and len(machine) == 1:
        work = Work(flops=trip.flops, mma=trip.mma, exps=trip.exps)
        peeled = _ratio(outside, work, warps) or 0.0
        peeled = min(float(round(peeled)), max(0.0, total - 1))
    if peeled:
        notes.append(f"{loop.where}: {peeled:.0f} of {total:.0f} trips peeled")
    left = total - peeled
    by_unroll = sorted(machine, key=lambda i: -unroll[i])
    factors = [unroll[i] for i in by_unroll]
    if len(machine) > 1 and len(set(factors)) == 1:  # the loop around them was unrolled, or warps have roles
        notes.append(f"{loop.where}: {len(machine)} machine loops, trips shared equally")
        for index in machine:
            executions[index] = left / len(machine) / unroll[index]
        return notes
    entries = max(loop.entries, 1)
    for position, index in enumerate(by_unroll):
        last = position == len(by_unroll) - 1
        each = left / entries / unroll[index]
        runs = each if last else float(int(each + 1e-9))
        executions[index] = runs * entries
        left -= runs * entries * unroll[index]
        if unroll[index] > 1:
            notes.append(f"{loop.where}: unrolled {unroll[index]} times")
    return notes


def tensor_flops(instruction: Instruction, warps: int) -> float:
    """FLOP that all warps of a program do in one run of a tensor-core instruction; 0 for tcgen05, whose shape is not in
    its text, and for anything else."""
    if instruction.base == "HGMMA" and (match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.op)):
        m, n, k = (int(size) for size in match.groups())
        return 2 * m * n * k * warps / 4
    if instruction.base == "HMMA" and (match := re.match(r"HMMA\.(16)(8)(\d+)", instruction.op)):
        return 2 * 16 * 8 * int(match[3]) * warps
    return 0.0


def access_bytes(instruction: Instruction) -> int:
    """Bytes that one thread moves in a load or store."""
    match = re.search(r"\.(?:U|S)?(8|16|64|128)(?:\.|$)", instruction.op)
    return int(match[1]) // 8 if match else 4
