"""A recorded launch says what a real one passes; precision and architecture come from where they should."""

from types import SimpleNamespace

import pytest
import torch

from sagan_fast.kernels import launch as launches
from sagan_fast.kernels.launch import Needs, launch, precision_of, recording, size_of

CONFIG = SimpleNamespace(num_warps=4, num_stages=2)


class Spy:
    """Stands for a kernel; keeps the grid and the arguments it is launched with."""

    def __getitem__(self, grid):
        self.grid = grid
        return lambda **kwargs: setattr(self, "kwargs", kwargs)


def arguments(device):
    x = torch.zeros(40, dtype=torch.float16, device=device)
    return {"x_ptr": x, "y_ptr": x[4:], "b_ptr": None, "stride": 1, "N": 48, "M": 7, "far": 2**31, "scale": 0.5}


def test_a_plan_has_the_arguments_of_the_launch():
    spy = Spy()
    launch("op", spy, (3, 2), CONFIG, arguments("cpu"), {"BLOCK": 16}, Needs)
    assert spy.grid == (3, 2) and spy.kwargs["enable_fp_fusion"] and spy.kwargs["num_warps"] == 4
    with recording(80, "fp16") as found:
        launch("op", spy, (3, 2), CONFIG, arguments("meta"), {"BLOCK": 16}, lambda: Needs(flops=3, loops=(2,)))
    (plan,) = found.plans
    options = {"num_warps", "num_stages", "enable_fp_fusion"}
    assert {*plan.signature, *plan.constexprs} == set(spy.kwargs) - options
    assert plan.signature == {
        "x_ptr": "*fp16", "y_ptr": "*fp16", "N": "i32", "M": "i32", "far": "i64", "scale": "fp32"
    }  # fmt: skip
    assert plan.constexprs == {"BLOCK": 16, "b_ptr": None, "stride": 1}
    assert plan.divisible_by_16 == ("x_ptr", "N", "far")
    assert (plan.grid, plan.flops, plan.loops, plan.dtype) == ((3, 2), 3, (2,), "fp16")


def test_a_cap_on_registers_is_passed_on():
    spy = Spy()
    capped = SimpleNamespace(num_warps=4, num_stages=2, maxnreg=128)
    launch("op", spy, (1,), capped, arguments("cpu"), {}, Needs)
    assert spy.kwargs["maxnreg"] == 128


def test_nothing_is_launched_for_no_programs():
    launch("op", None, (4, 0), CONFIG, {}, {}, Needs)


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
