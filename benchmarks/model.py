"""A time model of one launch: instructions of every loop, times how often it runs, against what an SM does in a clock.

Per program and pipe, clocks = sum over loops of (instructions x warps x lanes / rate) x trips. Two times bound what a
GPU can do with this code: `overlapped`, every pipe busy whenever it has work, so the largest pipe alone; and `serial`,
one pipe at a time, so their sum. `resident` lies between: blocks on one SM hide each other's pipes, nothing inside a
block does. Latencies, bank conflicts, launch cost and clock throttling are not modelled.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.compile import Compiled
from benchmarks.loops import Mapping, access_bytes, count_trips, map_loops, tensor_flops
from benchmarks.machine import SMEM_RESERVED, Machine
from benchmarks.sass import Code, Instruction
from benchmarks.ttir import Source, Work, read_ttir

PIPES = ("issue", "tensor", "mufu", "fp32", "alu", "lsu", "l2")
"""issue: warp instructions. tensor, mufu, fp32, alu: the units. lsu: loads, stores, shuffles and shared memory, the
tensor cores' operands included. l2: bytes that cross between the L2 cache and the SM for certain (stores, copies that
bypass the SM's own cache, tensor-map copies)."""

SERIAL = ("tensor", "mufu", "fp32", "alu", "lsu")
"""Pipes whose sum is the serial time; issue slots are spent beside them, and memory is added once."""

_FP32 = ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FMUL2", "FADD2", "FADD32I", "FMUL32I")
_XU = ("MUFU", "F2I", "I2F", "F2F", "FRND", "POPC", "FLO", "BREV", "I2I")
_LSU = ("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "RED", "REDG", "ATOM", "ATOMG", "ATOMS", "LDL", "STL")
_ALU = (
    "FMNMX", "FMNMX3", "FSEL", "FSETP", "FSET", "FCHK", "ISETP", "ISET", "IADD3", "IADD", "LOP3", "LEA", "SEL", "SHF",
    "PRMT", "VIADD", "VIMNMX", "VIMNMX3", "VIADDMNMX", "IMNMX", "IABS", "PLOP3", "SGXT", "BMSK", "MOV", "F2FP", "I2FP",
    "P2R", "R2P", "HMNMX2", "HSETP2", "HSET2", "VOTE", "FSWZADD", "SHL", "SHR", "LOP", "INEG", "IABSDIFF", "CS2R",
)  # fmt: skip


@dataclass(frozen=True)
class Region:
    """One loop of the machine code, or what is outside all: clocks by pipe of one trip, its runs, its opcodes; FLOP
    of HMMA and HGMMA and exponentials of one trip of a whole program."""

    name: str
    instructions: int
    executions: float
    clocks: dict[str, float]
    opcodes: dict[str, int]
    flops: float
    exps: float


@dataclass
class Model:
    """Times in microseconds, None where they cannot be told; `notes` say what is not certain and why."""

    regions: list[Region]
    clocks: dict[str, float]
    resident_blocks: int
    resident_limit: str
    waves: float
    overlapped_us: float | None
    resident_us: float | None
    serial_us: float | None
    binds: str
    limit_us: float
    limit_binds: str
    flops_done: float | None
    exps_done: float | None
    notes: list[str] = field(default_factory=list)


def resident_blocks(machine: Machine, registers: int, warps: int, shared: int, tmem: int = 0) -> tuple[int, str]:
    """How many blocks of a kernel fit on one SM at a time, and what limits it: registers, smem, tmem, warps, blocks."""
    per_warp = -(-max(registers, 1) * 32 // 256) * 256  # registers are handed out by 256 a warp, in four equal parts
    room = {
        "registers": 4 * (machine.registers_sm // 4 // per_warp) // warps,
        "warps": machine.warps_sm // warps,
        "blocks": machine.blocks_sm,
        "smem": machine.smem_sm // (shared + SMEM_RESERVED),
    }
    if machine.tmem_columns and tmem:
        room["tmem"] = machine.tmem_columns // tmem
    name = min(room, key=room.__getitem__)
    return room[name], name


def instruction_clocks(instruction: Instruction, machine: Machine, warps: int) -> dict[str, float]:
    """Clocks of one SM, by pipe, when all `warps` of a program run this instruction once."""
    clocks = {"issue": warps / machine.issue}
    if instruction.never:
        return clocks
    base, op, lanes = instruction.base, instruction.op, 32 * warps
    if base in ("HGMMA", "HMMA"):
        dtype = "tf32" if "TF32" in op else "bf16"
        rate = machine.tensor[dtype] * (machine.mma_sync if base == "HMMA" else 1.0)
        clocks["tensor"] = tensor_flops(instruction, warps) / rate
        if base == "HGMMA":
            m, n, _ = (int(size) for size in re.findall(r"\d+", op.split(".")[1]))
            rows = n + (m if instruction.operands.count("gdesc") > 1 or _both_shared(instruction) else 0)
            clocks["lsu"] = rows * 32 * warps / 4 / machine.lsu_bytes  # 32 bytes of K a row, once a warpgroup
    elif base in _XU:
        clocks["mufu"] = lanes / machine.mufu_lanes
    elif base in _FP32:
        clocks["fp32"] = lanes / machine.fp32_lanes * (2 if base.endswith("2") and base[0] == "F" else 1)
    elif base.startswith("IMAD") or base == "IMUL":
        clocks["fp32"] = lanes / machine.imad_lanes
    elif base in _ALU:
        clocks["alu"] = lanes / machine.alu_lanes
    elif base == "SHFL":
        clocks["lsu"] = lanes / machine.shuffle_lanes
    elif base in _LSU:
        size = 16 if op.endswith(".4") and base in ("LDSM", "STSM") else access_bytes(instruction)
        if base in ("LDSM", "STSM") and op.endswith(".2"):
            size = 8
        clocks["lsu"] = max(lanes / 32, lanes * size / machine.lsu_bytes)
        if base in ("STG", "RED", "REDG", "ATOMG") or ".BYPASS" in op:  # an LDG may hit the SM's own cache
            clocks["l2"] = lanes * size / machine.l2_bytes
    return clocks


def _both_shared(instruction: Instruction) -> bool:
    """HGMMA with both factors in shared memory names one descriptor pair and no register operand before it."""
    return bool(re.match(r"R\d+, gdesc", instruction.operands))


def model(plan: Any, compiled: Compiled, machine: Machine) -> Model:
    """Model the launch `plan` from its machine code on `machine`.

    Where the trips of a loop are not known, only the bytes against the bandwidth are: `serial_us` and `resident_us`
    are None then, and the notes say why.
    """
    code, warps = compiled.code(), compiled.warps
    kernel = read_ttir(compiled.ttir)
    problem = count_trips(kernel.loops, plan.loops)
    if code.count("USETMAXREG"):
        problem = "warps have roles, and which of them runs which loop is not known"
    blocks, limited_by = resident_blocks(machine, compiled.registers, warps, compiled.shared, compiled.tmem)
    needed_bytes = plan.bytes_read + plan.bytes_written
    limit, limit_binds = machine.limit_us(plan.flops, plan.exps, needed_bytes, plan.dtype)
    times = {"hbm": needed_bytes / machine.hbm_bytes_per_s * 1e6}
    found = Model(
        regions=[],
        clocks={},
        resident_blocks=blocks,
        resident_limit=limited_by,
        waves=plan.programs / (machine.sms * max(blocks, 1)),
        overlapped_us=times["hbm"],
        resident_us=None,
        serial_us=None,
        binds="hbm",
        limit_us=limit,
        limit_binds=limit_binds,
        flops_done=None,
        exps_done=None,
    )
    if blocks == 0:
        found.overlapped_us = None
        found.notes.append(f"does not fit on an SM: {limited_by}")
        return found
    if problem:
        found.notes.append(f"only bytes are modelled: {problem}")
        return found
    mapping = map_loops(code, kernel, warps)
    work = Work()
    work.add(kernel.outside)
    for loop in kernel.loops:
        work.add(loop.work, loop.total)
    found.regions = _regions(code, kernel, mapping, machine, warps)
    clocks = {pipe: sum(r.clocks.get(pipe, 0.0) * r.executions for r in found.regions) for pipe in PIPES}
    if code.count("UTCHMMA"):
        clocks["tensor"] += work.flops / machine.flop_rate(plan.dtype if plan.dtype != "fp32" else "tf32")
    clocks["l2"] += work.descriptor_bytes / machine.l2_bytes
    each = -(-plan.programs // machine.sms)  # programs of the busiest SM
    times |= {pipe: machine.us(clocks[pipe] * each) for pipe in PIPES}
    serial = sum(times[pipe] for pipe in SERIAL) + max(times["l2"], times["hbm"])
    found.clocks = clocks
    found.binds = max(times, key=times.__getitem__)
    found.overlapped_us = times[found.binds]
    found.resident_us = max(times[found.binds], serial / min(blocks, each))
    found.serial_us = max(serial, times[found.binds])
    products = sum(region.flops * region.executions for region in found.regions)  # none of tcgen05 or on FP32 lanes
    found.flops_done = (products or work.flops) * plan.programs
    found.exps_done = sum(region.exps * region.executions for region in found.regions) * plan.programs
    found.notes += mapping.notes
    return found


def _regions(code: Code, kernel: Source, mapping: Mapping, machine: Machine, warps: int) -> list[Region]:
    """The code outside all loops, then every loop."""
    regions = []
    for index in (None, *range(len(code.loops))):
        clocks: dict[str, float] = {}
        instructions = code.own_instructions(index)
        for instruction in instructions:
            costs = instruction_clocks(instruction, machine, warps)
            if instruction.base == "LDGSTS" and _is_ahead(instruction, index, kernel, mapping):
                costs = {"issue": costs["issue"]}
            for pipe, value in costs.items():
                clocks[pipe] = clocks.get(pipe, 0.0) + value
        name = "outside loops" if index is None else f"loop at {code.blocks[code.loops[index].header][0].address:#x}"
        runs = 1.0 if index is None else mapping.executions[index]
        opcodes = dict(Counter(i.base for i in instructions).most_common())
        live = [i for i in instructions if not i.never]
        flops = sum(tensor_flops(i, warps) for i in live)
        exps = 32 * warps * sum(i.op.startswith("MUFU.EX2") for i in live)
        regions.append(Region(name, len(instructions), runs, clocks, opcodes, flops, exps))
    return regions


def _is_ahead(copy: Instruction, index: int | None, kernel: Source, mapping: Mapping) -> bool:
    """Whether a copy stands before a loop to fetch its first tiles: the copies inside are then off in the last trips,
    and counting those in every trip counts all."""
    owner = kernel.owner.get(copy.line) if copy.line else None
    machine = [i for i, source in enumerate(mapping.source) if source is not None and source == owner]
    if not machine or index in machine:
        return False
    trips = sum(mapping.executions[i] * mapping.unroll[i] for i in machine)
    return owner is not None and trips >= kernel.loops[owner].total  # no trip was peeled off, with its copies
