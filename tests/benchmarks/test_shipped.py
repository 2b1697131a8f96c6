"""The recorded launches: what they are for, and that together they need what the block needs."""

import pytest

from benchmarks.shapes import SAGAN_MATRICES, BlockShape
from benchmarks.shipped import (
    BACKWARD,
    FORWARD,
    FUNCTIONAL,
    INFERENCE,
    batch_norm_launches,
    batch_norm_plans,
    block_launches,
    functional_launches,
    second_plans,
    spectral_norm_launches,
)

POOLED = BlockShape("pooled", B=2, C=48, H=8, W=12, d_qk=6, d_v=24)
BARE = BlockShape("bare", B=3, C=16, H=5, W=7, d_qk=2, d_v=16, pool=False, out_proj=False, bias=True)


@pytest.mark.parametrize("shape", [POOLED, BARE], ids=lambda s: s.name)
@pytest.mark.parametrize("channels_last", [True, False])
def test_launches_need_what_the_block_needs(shape, channels_last):
    launches = block_launches(shape, "bf16", 90, channels_last)
    assert {launch.shape for launch in launches} == {shape.name}
    plans = {part: [one.plan for one in launches if one.part == part] for part in (INFERENCE, FORWARD, BACKWARD)}
    for part in (INFERENCE, FORWARD):
        assert sum(plan.flops for plan in plans[part]) == shape.flops()
        assert sum(plan.exps for plan in plans[part]) == shape.exps()
    assert all(plan.dtype == "bf16" and plan.programs > 0 for plan in plans[BACKWARD])
    needed = shape.bytes("bf16")
    assert needed < sum(plan.bytes_read + plan.bytes_written for plan in plans[INFERENCE]) < 3 * needed
    kept = [sum(plan.bytes_written for plan in plans[part]) for part in (INFERENCE, FORWARD)]
    assert kept[0] < kept[1]


@pytest.mark.parametrize("shape", [POOLED, BARE], ids=lambda s: s.name)
def test_backward_needs_at_least_the_rest(shape):
    """With the library's products (dx, dW_theta, dW_phi, dW_g, dW_o), at least the needed FLOP of the backward pass;
    the scores may be computed twice."""
    ours = sum(launch.plan.flops for launch in block_launches(shape, "fp16", 80) if launch.part == BACKWARD)
    width = 2 * (2 * shape.d_qk + shape.d_v) + (shape.d_v if shape.out_proj else 0)
    library = 2 * shape.B * shape.N * width * shape.C
    rest = shape.flops(backward=True) - shape.flops()
    assert rest <= ours + library <= 1.6 * rest


def test_functional_attention_is_launched_too():
    launches = functional_launches(POOLED, "fp32", 100)
    assert launches[0].plan.name == "attention_fwd" and {launch.part for launch in launches} == {FUNCTIONAL}
    scores = POOLED.B * POOLED.N * POOLED.M
    assert launches[0].plan.exps == scores and launches[0].plan.flops == 2 * scores * (POOLED.d_qk + POOLED.d_v)


def test_a_second_backward_is_three_launches():
    plans = second_plans(2, 70, 40, 8, 24, "fp32", 90)
    assert [plan.name for plan in plans] == ["attention_tangent", "attention_second_dkv", "attention_second_dq"]
    scores = 2 * 70 * 40
    assert [plan.flops // (2 * scores) for plan in plans] == [3 * 8 + 2 * 24, 5 * 8 + 3 * 24, 5 * 8 + 2 * 24]
    assert [plan.name for plan in second_plans(2, 70, 40, 8, 130, "fp32", 90)] == ["attention_tangent"]


def test_one_update_of_all_matrices_is_three_launches():
    launches = spectral_norm_launches(90)
    update = [one.plan for one in launches if one.part == FORWARD and one.shape.endswith("fp32")]
    assert ["sweep" in update[0].name, "reduce" in update[1].name, "scale" in update[2].name] == [True] * 3
    elements = sum(R * K for R, K in SAGAN_MATRICES)
    moved = sum(plan.bytes_read + plan.bytes_written for plan in update)
    assert 3 * 4 * elements <= moved <= 3.2 * 4 * elements  # two reads of the weights and a write


@pytest.mark.parametrize("channels_last", [True, False])
def test_batch_norm_and_relu_read_a_map_twice_forward_and_twice_backward(channels_last):
    shape = (64, 64, 128, 128)
    plans = batch_norm_plans(shape, 1000, "bf16", 90, channels_last)
    names = [plan.name for plan in plans]
    assert names[:3] == ["batch_norm_moments", "batch_norm_merge", "batch_norm_fwd"] and len(names) == 7
    one = 2 * 64 * 64 * 128 * 128
    for part, maps in ((plans[:3], 3), (plans[3:], 5)):  # x, x, y; x, dy, x, dy, dx
        moved = sum(plan.bytes_read + plan.bytes_written for plan in part)
        assert maps * one <= moved <= 1.05 * maps * one
    assert [plan.name for plan in batch_norm_plans(shape, None, "fp32", 90, channels_last, training=False)] == [
        "batch_norm_fwd",
        "batch_norm_bwd_sums",
        "batch_norm_bwd_tables",
        "batch_norm_bwd_input",
    ]
    assert {one.part for one in batch_norm_launches("bf16", 90)} == {FORWARD, BACKWARD}
