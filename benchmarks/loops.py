"""How often each loop of the machine code runs: its loop in the source, the trips of that, what the compiler unrolled.

A loop of the machine code belongs to the source loop that most of its lines are from; the work in it over the work of
one trip says how far it was unrolled; work of that loop outside it was peeled off. What cannot be told is a note, never
a guess in silence.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.sass import Code, Instruction
from benchmarks.ttir import Source, SourceLoop, Work


def count_trips(loops: Sequence[SourceLoop], given: Sequence[int]) -> str | None:
    """Fill `total` and `entries` of every loop from its constant bounds or from `given`, the plan's counts in source
    order (for a loop inside others: over all of their trips together). Return what does not fit, if anything.
    """
    unknown = [loop for loop in loops if loop.constant is None]
    if len(given) > len(loops) and sum(count != 1 for count in given) <= len(loops):
        surplus = len(given) - len(loops)  # a loop of one trip, known at compile time, is no loop any more
        given = [n for i, n in enumerate(given) if n != 1 or sum(m == 1 for m in given[: i + 1]) > surplus]
    if len(given) == len(loops):
        for loop, total in zip(loops, given, strict=True):
            loop.total = total
    elif len(given) == len(unknown):
        counts = iter(given)
        for loop in loops:
            around = loops[loop.parent].total if loop.parent is not None else 1
            loop.total = next(counts) if loop.constant is None else around * loop.constant
    else:
        return f"the plan gives {len(given)} trip counts, the kernel has {len(unknown)} run-time loops"
    for loop in loops:
        loop.entries = loops[loop.parent].total if loop.parent is not None else 1
    return None


@dataclass
class Mapping:
    """`executions[i]`: how often one warp runs the body of machine loop i; `loops[i]`: its source loop, `unroll[i]`."""

    executions: list[float]
    source: list[int | None]
    unroll: list[int]
    notes: list[str]


def map_loops(code: Code, kernel: Source, warps: int) -> Mapping:
    """Say how often each loop of the machine code runs; `count_trips` must have filled the source loops."""
    notes: list[str] = []
    loops = kernel.loops
    source = _sources(code, kernel, warps)
    mapped = set(source)
    unroll = [1] * len(code.loops)
    for index, loop in enumerate(source):
        if loop is None:
            notes.append(f"a loop of {len(code.own_instructions(index))} instructions has no source loop: counted once")
            continue
        ratios = _ratios(code.own_instructions(index), _inclusive(loops, loop, mapped), warps)
        if not ratios and code.loops[index].children:
            continue  # unrolled, it would have several copies of what is inside
        if not ratios:
            notes.append(f"{loops[loop].where}: nothing to tell unrolling by, taken as not unrolled")
            continue
        whole = [ratio for ratio in ratios.values() if ratio >= 0.75 and abs(ratio - round(ratio)) <= 0.12 * ratio]
        unroll[index] = round(min(whole, default=1.0))
        if not whole:
            found = ", ".join(f"{name} of {ratio:.2f} trips" for name, ratio in ratios.items())
            notes.append(f"{loops[loop].where}: {found} in one of the machine's, taken as not unrolled")
        for name, ratio in ratios.items():
            if name in ("products", "exponentials") and ratio > 1.25 * unroll[index]:
                notes.append(
                    f"{loops[loop].where}: {name} done {ratio / unroll[index]:.2f} times over, in several warps"
                )
    executions = [1.0] * len(code.loops)
    for loop in sorted({s for s in source if s is not None}):
        machine = [i for i, s in enumerate(source) if s == loop]
        notes += _share(code, kernel, loop, machine, unroll, executions, _inclusive(loops, loop, mapped), warps)
    return Mapping(executions, source, unroll, notes)


def _sources(code: Code, kernel: Source, warps: int) -> list[int | None]:
    """The source loop of every machine loop. Several source loops can have one line (a helper inlined several times,
    some of them unrolled away): then they go in order if there are as many machine loops, else by the work in them."""
    loops = kernel.loops
    found = [_line_of(code, index, kernel) for index in range(len(code.loops))]
    for first in {f for f in found if f is not None}:
        twins = [j for j in range(len(loops)) if loops[j].line == loops[first].line]
        machine = sorted((i for i, f in enumerate(found) if f == first), key=lambda i: code.loops[i].header)
        if len(twins) == len(machine):
            for index, twin in zip(machine, twins, strict=True):
                found[index] = twin
        elif len(twins) > 1:
            for index in machine:
                instructions = code.own_instructions(index)
                works = (_inclusive(loops, j, set()) for j in twins)
                ratios = [min(_ratios(instructions, work, warps).values(), default=math.inf) for work in works]
                found[index] = min(zip(ratios, twins, strict=True), key=lambda pair: abs(math.log(pair[0])))[1]
    return found


def _line_of(code: Code, index: int, kernel: Source) -> int | None:
    """The outermost source loop that a fair share of the machine loop's own lines belongs to itself; of several with
    one line the first."""
    owners = (kernel.owner.get(i.line) for i in code.own_instructions(index) if i.line)
    votes = Counter(owner for owner in owners if owner is not None)
    fair = 0.08 * sum(votes.values())
    loops = (loop for loop in votes if votes[loop] >= fair)
    return min(loops, key=lambda loop: (_depth(kernel.loops, loop), -votes[loop]), default=None)


def _depth(loops: Sequence[SourceLoop], index: int) -> int:
    parent = loops[index].parent
    return 0 if parent is None else 1 + _depth(loops, parent)


def _holds(kernel: Source, outer: int, inner: int | None) -> bool:
    """Whether loop `inner` is loop `outer` or inside it."""
    return inner is not None and (inner == outer or _holds(kernel, outer, kernel.loops[inner].parent))


def _inclusive(loops: Sequence[SourceLoop], index: int, mapped: set[int | None]) -> Work:
    """Work of one trip, with that of loops inside it that the machine code does not have as loops."""
    total = Work()
    total.add(loops[index].work)
    for child, loop in enumerate(loops):
        if loop.parent == index and child not in mapped and loop.entries:
            total.add(_inclusive(loops, child, mapped), loop.total / loop.entries)
    return total


def _ratios(instructions: Sequence[Instruction], trip: Work, warps: int) -> dict[str, float]:
    """Work of these instructions over that of one trip, by each kind of work that both have.

    Unrolling multiplies all of them; products and exponentials alone grow where warps repeat each other's work.
    """
    threads = 32 * warps
    live = [i for i in instructions if not i.never]
    loaded = sum(access_bytes(i) for i in live if i.base in ("LDG", "LDGSTS"))
    stored = sum(access_bytes(i) for i in live if i.base in ("STG", "RED", "ATOMG"))
    exps = sum(i.op.startswith("MUFU.EX2") for i in live)
    kinds = {
        "products": (sum(tensor_flops(i, warps) for i in live), trip.flops),
        "exponentials": (threads * exps, trip.exps),
        "loads": (threads * loaded, trip.load_bytes if trip.load_bytes >= 16 * threads else 0),
        "stores": (threads * stored, trip.store_bytes if trip.store_bytes >= 2 * threads else 0),
    }
    if not exps:  # of tcgen05 the text does not tell the size, and other trips' products may be issued ahead
        kinds["tcgen05 products"] = (sum(i.base == "UTCHMMA" for i in live), trip.mma)
    return {name: have / want for name, (have, want) in kinds.items() if have and want}


def _share(
    code: Code,
    kernel: Source,
    number: int,
    machine: Sequence[int],
    unroll: Sequence[int],
    executions: list[float],
    trip: Work,
    warps: int,
) -> list[str]:
    """Spread the trips of a source loop over the machine loops that came from it."""
    notes = []
    loop = kernel.loops[number]
    peeled = 0.0
    if loop.parent is None and len(machine) == 1:
        outside = [
            i for i in code.own_instructions(None) if i.line and _holds(kernel, number, kernel.owner.get(i.line))
        ]
        products = Work(flops=trip.flops, mma=trip.mma, exps=trip.exps)  # loads are issued ahead without being peeled
        ratios = _ratios(outside, products, warps)
        peeled = min(float(round(min(ratios.values(), default=0.0))), max(0.0, loop.total - 1))
    if peeled:
        notes.append(f"{loop.where}: {peeled:.0f} of {loop.total:.0f} trips peeled")
    left = loop.total - peeled
    by_unroll = sorted(machine, key=lambda i: -unroll[i])
    if len(machine) > 1 and len({unroll[i] for i in machine}) == 1:  # the loop around was unrolled, or warps have roles
        notes.append(f"{loop.where}: {len(machine)} machine loops, trips shared equally")
        for index in machine:
            executions[index] = left / len(machine) / unroll[index]
        return notes
    entries = max(loop.entries, 1)
    for position, index in enumerate(by_unroll):
        each = left / entries / unroll[index]
        runs = each if position == len(by_unroll) - 1 else float(int(each + 1e-9))
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
