import pytest

from benchmarks.step_breakdown import OTHER, breakdown, breakdown_table, flops_of, group_of


def test_operators_are_grouped_by_the_longest_beginning():
    names = {"aten::mkldnn_convolution": "convolutions", "aten::addmv": "spectral norm"}
    names |= {"aten::addcmul": "batch norm, gains", "aten::unknown": OTHER, "aten::threshold_backward": "ReLU"}
    names["aten::add_"] = "additions, products"
    assert {name: group_of(name) for name in names} == names


def test_flops_of_a_call_follow_from_its_shapes():
    x, weight = [2, 3, 8, 8], [5, 3, 3, 3]
    assert flops_of("aten::mkldnn_convolution", [x, weight], ()) == 2 * 2 * 64 * 5 * 27
    assert flops_of("aten::mkldnn_convolution", [x, [5, 3, 4, 4]], ()) == 2 * 2 * 16 * 5 * 48
    assert flops_of("aten::_convolution", [x, [3, 5, 4, 4]], ()) == 2 * 2 * 64 * 5 * 48
    grad = [2, 5, 4, 4]
    assert flops_of("aten::convolution_backward", [grad, x, [5, 3, 4, 4]], (True, True, True)) == 4 * 2 * 16 * 5 * 48
    assert flops_of("aten::convolution_backward", [[2, 5, 8, 8], x, weight], (False, True, True)) == 4 * 64 * 5 * 27
    w4 = [5, 3, 4, 4]
    assert flops_of("sagan_fast::conv_windows", [x, w4, []], 2) == 2 * 2 * 16 * 5 * 48
    assert flops_of("sagan_fast::conv_windows_transpose", [grad, w4, []], 2) == 2 * 2 * 16 * 5 * 48
    assert flops_of("sagan_fast::conv_windows_weight", [grad, x, [], []], 2) == 2 * 2 * 16 * 5 * 48
    assert flops_of("sagan_fast::conv_windows_weight", [[2, 5, 8, 8], x, [], []], 1) == 2 * 2 * 64 * 5 * 27
    assert flops_of("aten::bmm", [[2, 3, 4], [2, 4, 5]], ()) == 2 * 2 * 3 * 4 * 5
    assert flops_of("aten::add", [x, x], ()) == 0


@pytest.mark.parametrize("least_channels", [1, 10**9])
def test_a_step_does_the_work_that_it_needs(monkeypatch, least_channels):
    monkeypatch.undo()  # the poisoned torch.empty does not know the device meta
    for name, value in (("IS_MEASURED", True), ("LEAST_CHANNELS", least_channels), ("LEAST_PAIRS", 1)):
        monkeypatch.setattr(f"sagan_fast.ops.convolution.{name}", value)
    groups = breakdown(4, channels=4, classes=3)
    convolutions = groups["convolutions"]
    # the smallest maps are not folded
    assert 1.0 <= convolutions.done / convolutions.needed < 1.2
    assert convolutions.calls > 50 and convolutions.seconds > 0 and groups["ReLU"].nbytes > 0


@pytest.mark.parametrize("provider", ["ReLU", "convolutions"])
def test_the_table_ends_with_a_sum(provider):
    config = dict(calls=3, needed=2e9, done=3e9, nbytes=1e9, share=0.5, h200_bf16_us=10.0)
    record = dict(provider=provider, p50_us=2e3, bound_us=5e2, bound_by="flop", config=config)
    last = breakdown_table([record, record]).splitlines()[-1]
    assert last == "| all | 6 | 4.00 | 6.00 | 2.00 | 4.00 | 100.0% | 1.00 |  | 3.00 | 75.0% | 20.00 |"
