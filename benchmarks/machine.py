"""What the modelled chips can do in a clock, and where each number is from: the only constants of the time model.

Sources
- [guide] CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions" and "Technical Specifications per
  Compute Capability": https://docs.nvidia.com/cuda/cuda-c-programming-guide/
- [white] NVIDIA's A100, H100 and Blackwell architecture papers and data sheets: peak tensor rates, clocks, bandwidth.
  The clock is the one at which SMs x operations per clock gives the published dense peak (A100 312, H100/H200 989,
  B200 2250 TFLOP/s in 16 bits).
- [bench] Luo et al. 2024, "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking",
  https://arxiv.org/abs/2402.13499: mma.sync reaches about 63 % of Hopper's peak; wgmma the whole of it.
- [fa3] FlashAttention-3, https://arxiv.org/abs/2407.08608: 3.9 T exponentials/s on H100, so 16 a clock and SM.
- [same] no figure published: taken as on the generation before.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One chip; `device` is its name in PyTorch. Rates are per clock and SM.

    `*_lanes`: threads' worth of instructions; `*_bytes`: bytes; `tensor`: FLOP.
    """

    arch: int
    device: str
    sms: int
    clock_hz: float
    tensor: dict[str, int]
    mma_sync: float
    mufu_lanes: int
    fp32_lanes: int
    imad_lanes: int
    alu_lanes: int
    shuffle_lanes: int
    lsu_bytes: int
    issue: int
    l2_bytes: float
    hbm_bytes_per_s: float
    l2_size: int
    smem_block: int
    smem_sm: int
    registers_sm: int = 65536
    warps_sm: int = 64
    blocks_sm: int = 32
    tmem_columns: int = 0

    def us(self, clocks: float) -> float:
        """Microseconds of so many clocks."""
        return clocks / self.clock_hz * 1e6

    def limit_us(self, flops: float, exps: float, nbytes: float, dtype: str) -> tuple[float, str]:
        """The least time of such work on the whole chip in microseconds, and what sets it: tensor, mufu or hbm.

        fp32 means IEEE products, on the FP32 lanes (two FLOP a lane); tf32, fp16 and bf16 use the tensor cores.
        """
        times = {
            "tensor" if dtype in self.tensor else "fp32": self.us(flops / self.flop_rate(dtype) / self.sms),
            "mufu": self.us(exps / self.mufu_lanes / self.sms),
            "hbm": nbytes / self.hbm_bytes_per_s * 1e6,
        }
        name = max(times, key=times.__getitem__)
        return times[name], name

    def flop_rate(self, dtype: str) -> int:
        """FLOP per clock and SM of products in this precision."""
        return self.tensor.get(dtype, 2 * self.fp32_lanes)


MACHINES = {
    machine.arch: machine
    for machine in (
        Machine(
            arch=80,
            device="NVIDIA A100-SXM4-80GB",
            sms=108,
            clock_hz=1.41e9,
            tensor={"fp16": 2048, "bf16": 2048, "tf32": 1024},  # [white] 312 and 156 TFLOP/s
            mma_sync=1.0,
            mufu_lanes=16,  # [guide]
            fp32_lanes=64,  # [guide]
            imad_lanes=64,  # [guide] 32-bit integer multiply-add
            alu_lanes=64,  # [guide] integer add, compare, minimum, logic
            shuffle_lanes=32,  # [guide]
            lsu_bytes=128,  # [guide] 32 banks of 4 bytes
            issue=4,  # [white] four schedulers, one warp instruction each
            l2_bytes=5120 / 108,  # [white] 5120 B a clock for the chip
            hbm_bytes_per_s=2.039e12,  # [white]
            l2_size=40 << 20,
            smem_block=166912,  # [guide] 163 KB
            smem_sm=164 << 10,
        ),
        Machine(
            arch=90,
            device="NVIDIA H200",
            sms=132,
            clock_hz=1.83e9,
            tensor={"fp16": 4096, "bf16": 4096, "tf32": 2048},  # [white] 989 and 495 TFLOP/s
            mma_sync=0.63,  # [bench]
            mufu_lanes=16,  # [guide], [fa3]
            fp32_lanes=128,  # [guide]
            imad_lanes=64,  # [guide]
            alu_lanes=64,  # [guide]
            shuffle_lanes=32,  # [guide]
            lsu_bytes=128,  # [guide]
            issue=4,  # [white]
            l2_bytes=5120 / 132,  # [same] the A100's 5120 B a clock for the chip
            hbm_bytes_per_s=4.8e12,  # [white]; an H100-SXM has 3.35e12 and is otherwise the same
            l2_size=50 << 20,
            smem_block=232448,  # [guide] 227 KB
            smem_sm=228 << 10,
        ),
        Machine(
            arch=100,
            device="NVIDIA B200",
            sms=148,
            clock_hz=1.85e9,
            tensor={"fp16": 8192, "bf16": 8192, "tf32": 4096},  # [white] 2250 and 1125 TFLOP/s
            mma_sync=0.31,  # [same] mma.sync at Hopper's absolute rate
            mufu_lanes=16,  # [guide]
            fp32_lanes=128,  # [guide]
            imad_lanes=64,  # [guide]
            alu_lanes=64,  # [guide]
            shuffle_lanes=32,  # [guide]
            lsu_bytes=128,  # [guide]
            issue=4,  # [white]
            l2_bytes=5120 / 132,  # [same]
            hbm_bytes_per_s=7.7e12,  # [white] HGX B200
            l2_size=126 << 20,
            smem_block=232448,  # [guide]
            smem_sm=228 << 10,
            tmem_columns=512,  # [white]
        ),
    )
}
"""The modelled chip of each compilation target, by compute capability times ten."""

SMEM_RESERVED = 1024
"""Bytes of shared memory that CUDA keeps of every resident block from compute capability 8.0 on [guide]."""
