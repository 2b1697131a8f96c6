"""Machine code as data: instructions with their source lines, basic blocks, loops.

Reads what `nvdisasm -g -c` prints (labels and source lines, the same text from every Triton), not `asm["sass"]`,
whose text knows neither. Loops are natural loops of the control-flow graph: a branch back to a block that dominates
it, so that waits placed out of line behind the kernel are not taken for loops around everything.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
_LABEL = re.compile(r"^(\.L_x_\d+|\.L_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+\{?\s*(?:@(!?U?PT?\d*)\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_x_\d+|\.L_\d+)\)")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL", "BPT")


@dataclass(frozen=True)
class Instruction:
    """`op` is the opcode with its modifiers ("LDG.E.128"), `line` the (file, line) it was compiled from, if known."""

    address: int
    op: str
    operands: str = ""
    predicate: str = ""
    line: tuple[str, int] | None = None
    target: str | None = None

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.op.split(".", 1)[0]

    @property
    def never(self) -> bool:
        """Predicated off for good: it costs an issue slot and nothing else."""
        return self.predicate == "!PT"


@dataclass
class Loop:
    """A loop of the machine code: indices of its blocks, of the loop around it (None: none), and of those inside."""

    blocks: frozenset[int]
    header: int
    parent: int | None = None
    children: list[int] = field(default_factory=list)


@dataclass
class Code:
    """One kernel's instructions in basic blocks; `loops` outermost first, then by address."""

    blocks: list[list[Instruction]]
    loops: list[Loop]
    reachable: frozenset[int]

    @property
    def instructions(self) -> list[Instruction]:
        """All instructions by address."""
        return [instruction for block in self.blocks for instruction in block]

    def count(self, *prefixes: str) -> int:
        """How many instructions start with one of `prefixes` ("HGMMA", "LDG.E.128"), never executed ones left out."""
        return sum(i.op.startswith(prefixes) and not i.never for i in self.instructions)

    def opcodes(self) -> Counter[str]:
        """Number of instructions by opcode without modifiers."""
        return Counter(i.base for i in self.instructions)

    def loop_of_block(self) -> list[int | None]:
        """For every block the index of its innermost loop, None outside all loops."""
        owner: list[int | None] = [None] * len(self.blocks)
        for index, loop in enumerate(self.loops):  # outer loops come first, inner ones overwrite them
            for block in loop.blocks:
                owner[block] = index
        return owner

    def own_instructions(self, loop: int | None) -> list[Instruction]:
        """Reachable instructions of a loop that are in no loop inside it; None: those outside all loops."""
        owner = self.loop_of_block()
        return [i for b, block in enumerate(self.blocks) if owner[b] == loop and b in self.reachable for i in block]


def parse(text: str) -> Code:
    """Return the code in `text`, the output of `nvdisasm -g -c` on a cubin with one kernel."""
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    pending: list[str] = []
    line: tuple[str, int] | None = None
    for row in text.splitlines():
        if match := _LINE.search(row):
            line = (folder_and_name(match[1]), int(match[2]))  # the innermost of an inlined chain is printed first
        elif match := _LABEL.match(row):
            pending.append(match[1])
        elif match := _INSTRUCTION.match(row):
            target = _TARGET.search(match[4])
            for name in pending:
                labels[name] = len(instructions)
            pending.clear()
            instructions.append(
                Instruction(
                    int(match[1], 16), match[3], match[4].strip(), match[2] or "", line, target[1] if target else None
                )
            )
    if not instructions:
        raise ValueError("sass: text must hold at least one instruction, got none")
    blocks, edges = _blocks(instructions, labels)
    loops, reachable = _loops(edges)
    loops = [loop for loop in loops if not _is_wait([blocks[b] for b in loop.blocks])]
    _nest(loops)
    return Code(blocks, loops, reachable)


def folder_and_name(path: str) -> str:
    """The last two parts of `path`. Cached code may have been compiled from another checkout: the lines are the same
    then, as Triton's key has them, the folders above are not."""
    return "/".join(path.split("/")[-2:])


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Cut at branch targets and behind branches; return the blocks and each one's successors."""
    starts = {0}
    for index, instruction in enumerate(instructions):
        if instruction.target in labels and instruction.base in ("BRA", "JMP"):
            starts.add(labels[instruction.target])
        if instruction.base in ("BRA", "JMP", *_ENDS):
            starts.add(index + 1)
    order = sorted(start for start in starts if start < len(instructions))
    block_at = {start: block for block, start in enumerate(order)}
    blocks = [instructions[a:b] for a, b in zip(order, [*order[1:], len(instructions)], strict=True)]
    edges: list[list[int]] = []
    for number, block in enumerate(blocks):
        last = block[-1]
        successors = []
        if last.base in ("BRA", "JMP") and last.target in labels:
            successors.append(block_at[labels[last.target]])
        conditional = bool(last.predicate) or last.operands.startswith(("U", "!U", "P", "!P"))
        if number + 1 < len(blocks) and (conditional or last.base not in ("BRA", "JMP", *_ENDS)):
            successors.append(number + 1)
        edges.append(successors)
    return blocks, edges


def _loops(edges: list[list[int]]) -> tuple[list[Loop], frozenset[int]]:
    """Natural loops, those with one header merged, outermost first; and the blocks that can be reached from the top."""
    reachable, stack = {0}, [0]
    while stack:
        for successor in edges[stack.pop()]:
            if successor not in reachable:
                reachable.add(successor)
                stack.append(successor)
    predecessors: dict[int, list[int]] = {b: [] for b in reachable}
    for block in reachable:
        for successor in edges[block]:
            predecessors[successor].append(block)
    dominators = {b: set(reachable) for b in reachable}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            new = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    bodies: dict[int, set[int]] = {}
    for block in reachable:
        for header in edges[block]:
            if header in dominators[block]:
                body = bodies.setdefault(header, {header})
                stack = [block]
                while stack:
                    member = stack.pop()
                    if member not in body:
                        body.add(member)
                        stack.extend(predecessors[member])
    loops = [Loop(frozenset(body), header) for header, body in bodies.items()]
    loops.sort(key=lambda loop: (-len(loop.blocks), loop.header))
    return loops, frozenset(reachable)


def _is_wait(blocks: list[list[Instruction]]) -> bool:
    """True for a spin on a barrier or lock, and for the endless branch to itself that pads a kernel."""
    instructions = [i for block in blocks for i in block]
    if len(instructions) <= 1:
        return True
    waits = any("TRYWAIT" in i.op or i.base in ("NANOSLEEP", "UTCATOMSWS", "ATOMS", "ATOM") for i in instructions)
    return len(instructions) < 16 and waits and not any(i.base in ("STG", "MUFU", "FFMA") for i in instructions)


def _nest(loops: list[Loop]) -> None:
    """Set each loop's parent and children."""
    for index, loop in enumerate(loops):
        around = [j for j, other in enumerate(loops) if loop.blocks < other.blocks]
        loop.parent = min(around, key=lambda j: len(loops[j].blocks)) if around else None
        if loop.parent is not None:
            loops[loop.parent].children.append(index)
