"""A recorded launch says what a real one passes; precision and architecture come from where they should."""

import sys

import pytest
import torch

from benchmarks.shipped import block_plans, spectral_norm_plans
from sagan_fast.kernels import launch as launches
from sagan_fast.kernels.configs import LaunchConfig
from sagan_fast.kernels.launch import Launch, Needs, launch, precision_of, recording, size_of

CONFIG = LaunchConfig(num_warps=4)


class Spy:
    """Stands for a kernel; keeps the grid and the arguments it is launched with."""

    def __getitem__(self, grid):
        self.grid = grid
        return lambda **kwargs: setattr(self, "kwargs", kwargs)


def tensors(device):
    x = torch.zeros(40, dtype=torch.float16, device=device)
    return {"x_ptr": x, "y_ptr": x[4:], "b_ptr": None}


def described(grid=(3, 2), config=CONFIG, needs=Needs):
    return Launch(grid, config, {"stride": 1, "N": 48, "M": 7, "far": 2**31, "scale": 0.5}, {"BLOCK": 16}, needs)


def test_a_plan_has_the_arguments_of_the_launch():
    spy = Spy()
    launch("op", spy, tensors("cpu"), (), described)
    assert spy.grid == (3, 2) and spy.kwargs["enable_fp_fusion"] and spy.kwargs["num_warps"] == 4
    with recording(80, "fp16") as found:
        launch("op", spy, tensors("meta"), (), lambda: described(needs=lambda: Needs(flops=3, exps=2)))
    (plan,) = found.plans
    options = {"num_warps", "num_stages", "enable_fp_fusion"}
    assert {*plan.signature, *plan.constexprs} == set(spy.kwargs) - options
    assert plan.signature == {
        "x_ptr": "*fp16", "y_ptr": "*fp16", "N": "i32", "M": "i32", "far": "i64", "scale": "fp32"
    }  # fmt: skip
    assert plan.constexprs == {"BLOCK": 16, "b_ptr": None, "stride": 1}
    assert plan.divisible_by_16 == ("x_ptr", "N", "far")
    assert (plan.grid, plan.flops, plan.exps, plan.dtype) == ((3, 2), 3, 2, "fp16")


def test_a_cap_on_registers_is_passed_on():
    spy = Spy()
    capped = LaunchConfig(num_warps=4, maxnreg=128)
    launch("op", spy, tensors("cpu"), (), lambda: described(config=capped))
    assert spy.kwargs["maxnreg"] == 128


def test_nothing_is_launched_for_no_programs():
    launch("op", None, tensors("cpu"), (), lambda: described(grid=(4, 0)))


class Compiling:
    """Stands for a kernel on a GPU: its launch returns what was compiled, which can be launched by itself."""

    arg_names = ("x_ptr", "y_ptr", "b_ptr", "N", "BLOCK", "stride", "M", "far", "scale")

    def __init__(self):
        self.compiled, self.direct = 0, []

    def __getitem__(self, grid):
        def run(**kwargs):
            self.compiled += 1
            assert set(kwargs) >= set(self.arg_names)
            return {(*grid, 1): lambda *values: self.direct.append(values)}

        return run


def test_the_second_launch_takes_what_the_first_compiled(monkeypatch):
    monkeypatch.setattr(launches, "_ready", {})
    kernel, aligned = Compiling(), torch.zeros(80, dtype=torch.float16)

    def run(x, y, b=None, key=(48,)):
        launch("op", kernel, {"x_ptr": x, "y_ptr": y, "b_ptr": b}, key, described)

    run(aligned, aligned[8:])
    run(aligned[16:], aligned[24:])
    (values,) = kernel.direct
    assert kernel.compiled == 1
    assert values[0].data_ptr() == aligned[16:].data_ptr() and values[1].data_ptr() == aligned[24:].data_ptr()
    assert values[2] is None and values[3:] == (48, 16, 1, 7, 2**31, 0.5)
    for changed in (
        lambda: run(aligned, aligned[3:]),  # an address that is no multiple of 16 bytes
        lambda: run(aligned, aligned[8:], aligned),  # a tensor where there was none
        lambda: run(aligned.float(), aligned[8:]),  # another dtype
        lambda: run(aligned, aligned[8:], key=(49,)),
    ):
        before = kernel.compiled
        changed()
        assert kernel.compiled == before + 1 and len(kernel.direct) == 1
    run(aligned, aligned[3:])
    assert len(kernel.direct) == 1


def test_only_so_many_launches_are_kept(monkeypatch):
    monkeypatch.setattr(launches, "_ready", {})
    monkeypatch.setattr(launches, "MAX_READY", 3)
    kernel, x = Compiling(), torch.zeros(80, dtype=torch.float16)
    for size in range(10):
        launch("op", kernel, {"x_ptr": x, "y_ptr": x, "b_ptr": None}, (size,), described)
        assert len(launches._ready) <= 3
    launch("op", kernel, {"x_ptr": x, "y_ptr": x, "b_ptr": None}, (9,), described)
    assert kernel.compiled == 10 and len(kernel.direct) == 1


def test_recording_sets_architecture_and_precision_and_ends_with_its_block():
    with recording(100, "tf32"):
        assert launches.arch_of(torch.zeros(1)) == 100 and precision_of(torch.float32) == "tf32"
        with recording(80, "bf16") as inner:
            assert launches.arch_of(torch.zeros(1)) == 80
        assert inner.plans == [] and launches.arch_of(torch.zeros(1)) == 100
    assert launches.arch_of(torch.zeros(1)) == launches.INTERPRETED_ARCH


@pytest.fixture
def restored_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_float32_products_are_tf32_only_where_allowed(restored_precision):
    torch.set_float32_matmul_precision("highest")
    assert precision_of(torch.float32) == "fp32"
    torch.set_float32_matmul_precision("high")
    assert precision_of(torch.float32) == "tf32"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = True
    assert precision_of(torch.float32) == "tf32"
    assert [precision_of(t) for t in (torch.float16, torch.bfloat16, torch.float64)] == ["fp16", "bf16", "fp64"]


def test_size_of_counts_bytes():
    assert size_of(torch.zeros(3, 2), None, torch.zeros(5, dtype=torch.uint8)) == 29


def test_equal_keys_mean_equal_launches(generator, monkeypatch):
    """A launch is kept under its key and the dtypes of its tensors: they must say all that its arguments depend on."""
    said = {}

    def spy(name, kernel, tensors, key, describe):
        if key is not None:
            what = describe()
            kinds = tuple(None if tensor is None else tensor.dtype for tensor in tensors.values())
            arguments = (what.grid, what.config, what.numbers, what.constexprs)
            assert said.setdefault((name, key, kinds), arguments) == arguments, name

    block_plans(1, 16, 4, 4, 2, 8), spectral_norm_plans([(4, 8)])  # so that all modules are there to be patched
    for name, module in list(sys.modules.items()):
        if name.startswith("sagan_fast.kernels.") and module is not launches and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", spy)

    def draw(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    for _ in range(300):
        D_QK, D_V, C = draw(2, 8, 16), draw(16, 64), draw(16, 64)
        out_proj = C != D_V or draw(True, False)
        block_plans(
            draw(1, 2), C, draw(8, 9), draw(8, 9), D_QK, D_V, pool=draw(True, False), out_proj=out_proj,
            bias=draw(True, False), dtype=draw("fp32", "bf16"), channels_last=draw(True, False),
            backward=draw(True, False),
        )  # fmt: skip
        matrices = [(draw(3, 64), draw(27, 64, 2304, 9217)) for _ in range(draw(1, 2, 3))]
        spectral_norm_plans(matrices, draw("fp32", "bf16"), draw("fp32", "bf16"))
    assert len({name for name, _, _ in said}) == 14
