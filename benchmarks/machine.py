"""What the known chips can do at most, and where each number is from: the only table of chips.

Sources
- [guide] CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions" and "Technical Specifications per
  Compute Capability": https://docs.nvidia.com/cuda/cuda-c-programming-guide/
- [white] NVIDIA's A100, H100 and Blackwell architecture papers and data sheets: peak tensor rates, clocks, bandwidth.
  The clock is the one at which SMs x operations per clock gives the published dense peak (A100 312, H100/H200 989,
  B200 2250 TFLOP/s in 16 bits).
- [geforce] NVIDIA's papers on the architectures GA102, Ada and RTX Blackwell: dense peaks at boost clock, bandwidth.
- [fa3] FlashAttention-3, https://arxiv.org/abs/2407.08608: 3.9 T exponentials/s on H100, so 16 a clock and SM.
"""

from dataclasses import dataclass, replace

from sagan_fast.kernels.configs import AMD, Arch

SHARED_BYTES: dict[Arch, int] = {
    **dict.fromkeys((80, 87), 163 << 10),  # [guide], as all of NVIDIA's
    **dict.fromkeys((86, 89, 120, 121), 99 << 10),
    **dict.fromkeys((90, 100, 103, 110), 227 << 10),
    75: 64 << 10,
    **dict.fromkeys(AMD, 64 << 10),  # the local data share [AMD's ISA documents]
    "gfx950": 160 << 10,
}
"""Most shared memory of one program, by chip: all that the kernels are compiled for."""


@dataclass(frozen=True)
class Machine:
    """One chip; `device` is its name in PyTorch. Rates are per clock and multiprocessor (SM).

    `tensor`: FLOP of the tensor cores by precision; `mufu_lanes`: exponentials; `fp32_lanes`: multiply-adds.
    """

    arch: int
    device: str
    sms: int
    clock_hz: float
    tensor: dict[str, int]
    fp32_lanes: int
    hbm_bytes_per_s: float
    smem_sm: int
    mufu_lanes: int = 16  # [guide], [fa3]
    registers_sm: int = 65536
    warps_sm: int = 64
    blocks_sm: int = 32
    tmem_columns: int = 0

    def limit_us(self, flops: float, exps: float, nbytes: float, dtype: str) -> tuple[float, str]:
        """Return the roofline limit of such work on the whole chip in microseconds, and what sets it.

        That is "tensor", "mufu" or "hbm", or "fp32" for products in IEEE float32, which run on the FP32 lanes.
        """
        second = self.sms * self.clock_hz
        times = {
            "tensor" if dtype in self.tensor else "fp32": flops / self.flop_rate(dtype) / second * 1e6,
            "mufu": exps / self.mufu_lanes / second * 1e6,
            "hbm": nbytes / self.hbm_bytes_per_s * 1e6,
        }
        return max((time, name) for name, time in times.items())

    def flop_rate(self, dtype: str) -> int:
        """Return the FLOP per clock and SM of products in this precision."""
        return self.tensor.get(dtype, 2 * self.fp32_lanes)

    def resident_blocks(self, registers: int, warps: int, shared: int, tmem: int = 0) -> tuple[int, str]:
        """Return how many blocks of a kernel fit on one SM at a time, and what limits them.

        That is "registers", "warps", "blocks", "smem" or "tmem"; `registers` are those of a thread.
        """
        per_warp = -(-max(registers, 1) * 32 // 256) * 256  # registers are handed out by 256 a warp, in four quarters
        room = {
            "registers": 4 * (self.registers_sm // 4 // per_warp) // warps,
            "warps": self.warps_sm // warps,
            "blocks": self.blocks_sm,
            "smem": self.smem_sm // (shared + SMEM_RESERVED),
        }
        if self.tmem_columns and tmem:
            room["tmem"] = self.tmem_columns // tmem
        name = min(room, key=room.__getitem__)
        return room[name], name


SMEM_RESERVED = 1024
"""Bytes of shared memory that CUDA keeps for itself in every resident block [guide]."""

RTX_3090 = Machine(
    86, "NVIDIA GeForce RTX 3090", sms=82, clock_hz=1.695e9,
    tensor={"fp16": 512, "bf16": 512, "tf32": 256},  # [geforce] 71 and 35.6 TFLOP/s, accumulated in float32
    mufu_lanes=16, fp32_lanes=128, smem_sm=100 << 10, warps_sm=48, blocks_sm=16,  # [guide]
    hbm_bytes_per_s=0.936e12,  # [geforce]
)  # fmt: skip

MACHINES = {
    machine.arch: machine
    for machine in (
        Machine(
            arch=80,
            device="NVIDIA A100-SXM4-80GB",
            sms=108,
            clock_hz=1.41e9,
            tensor={"fp16": 2048, "bf16": 2048, "tf32": 1024},  # [white] 312 and 156 TFLOP/s
            fp32_lanes=64,  # [guide]
            hbm_bytes_per_s=2.039e12,  # [white]
            smem_sm=164 << 10,  # [guide]
        ),
        RTX_3090,
        replace(RTX_3090, arch=89, device="NVIDIA GeForce RTX 4090", sms=128, clock_hz=2.52e9,
                hbm_bytes_per_s=1.008e12, blocks_sm=24),  # [geforce] 165.2 TFLOP/s, [guide]
        Machine(
            arch=90,
            device="NVIDIA H200",
            sms=132,
            clock_hz=1.83e9,
            tensor={"fp16": 4096, "bf16": 4096, "tf32": 2048},  # [white] 989 and 495 TFLOP/s
            fp32_lanes=128,  # [guide]
            hbm_bytes_per_s=4.8e12,  # [white]; an H100-SXM has 3.35e12 and is otherwise the same
            smem_sm=228 << 10,  # [guide]
        ),
        Machine(
            arch=100,
            device="NVIDIA B200",
            sms=148,
            clock_hz=1.85e9,
            tensor={"fp16": 8192, "bf16": 8192, "tf32": 4096},  # [white] 2250 and 1125 TFLOP/s
            fp32_lanes=128,  # [guide]
            hbm_bytes_per_s=7.7e12,  # [white] HGX B200
            smem_sm=228 << 10,  # [guide]
            tmem_columns=512,  # [white]
        ),
        replace(RTX_3090, arch=120, device="NVIDIA GeForce RTX 5090", sms=170, clock_hz=2.407e9,
                hbm_bytes_per_s=1.792e12, blocks_sm=24),  # [geforce] 209.5 TFLOP/s, [guide]
    )
}  # fmt: skip
"""One chip for each compilation target, by compute capability times ten."""
