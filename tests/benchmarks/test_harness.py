import time
from dataclasses import replace

import pytest
import torch

from benchmarks.harness import CLOCKS_PER_S, Case, Provider, Target, busy_clocks, check_replay, measure


def case(providers, mode="forward", truth=lambda: [torch.ones(4)]):
    return Case("b", "s", "fp32", mode, providers, truth)


def right(_):
    return [torch.ones(4)]


def test_wrong_and_impossible_providers_are_recorded_and_never_timed():
    timed = []

    def wrong():
        def run(i):
            timed.append(i)
            return [torch.full((4,), 1.01)]

        return run

    def impossible():
        raise RuntimeError("no such\n  backend")

    def nan():
        return lambda i: [torch.full((4,), float("nan"))]

    providers = [
        Provider("right", lambda: right),
        Provider("wrong", wrong),
        Provider("no", impossible),
        Provider("nan", nan),
    ]
    records = {r.provider: r for r in measure(case(providers), "cpu", rounds=3)}
    assert timed == [0]
    assert (
        records["right"].samples == 3 and records["right"].p20_us <= records["right"].p50_us <= records["right"].p80_us
    )
    assert records["right"].error == "" and records["right"].relative_rms == 0.0
    assert records["wrong"].p50_us is None and records["wrong"].error.startswith("wrong: relative RMS error 0.01")
    assert records["nan"].p50_us is None and "wrong" in records["nan"].error
    assert records["no"].error == "cannot run: RuntimeError: no such backend"


def test_providers_take_turns_and_sets_are_used_in_turn():
    calls = []

    def provider(name):
        def prepare():
            def run(i):
                calls.append((name, i))
                return [torch.ones(4)]

            return run

        return Provider(name, prepare)

    made = Case("b", "s", "fp32", "forward", [provider("a"), provider("b")], lambda: [torch.ones(4)], num_sets=2)
    measure(made, "cpu", rounds=2, warmup=2)
    for turn in (calls[-8:-4], calls[-4:]):  # in an order drawn anew each time
        assert turn in ([(n, i) for n in order for i in (0, 1)] for order in ("ab", "ba"))


def test_a_provider_may_have_a_truth_of_its_own():
    own = Provider("own", lambda: lambda i: [torch.zeros(4) + 2], truth=lambda: [torch.full((4,), 2.0)])
    (record,) = measure(case([own]), "cpu", rounds=1)
    assert record.error == ""


def test_bytes_kept_for_backward_are_counted_without_the_inputs():
    x = torch.randn(1000, requires_grad=True)

    def run(i):
        y = x.exp()  # keeps its result, 4000 bytes
        return [torch.autograd.grad((y * x).sum(), x)[0]]  # keeps x, which is an input, and y again

    truth = [(x + 1) * x.exp()]
    made = Case("b", "s", "fp32", "forward+backward", [Provider("p", lambda: run)], lambda: truth, own=lambda: [x])
    (record,) = measure(made, "cpu", rounds=1)
    assert record.error == "" and record.saved_bytes == 4000


def test_a_graph_that_missed_some_of_the_work_is_not_timed():
    results, expected = [torch.ones(4), torch.ones(4)], [torch.ones(4), torch.ones(4)]
    check_replay(lambda: [t.fill_(1.0) for t in results], results, expected, 1e-5)
    with pytest.raises(RuntimeError, match="the replay differs from a call: relative RMS nan"):
        check_replay(lambda: results[0].fill_(1.0), results, expected, 1e-5)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_in_any_result_is_wrong_and_not_timed(place):
    def results():
        made = [torch.ones(3) for _ in range(3)]
        made[place][1] = torch.nan
        return made

    bad = Provider("bad", lambda: lambda i: results())
    case = Case("b", "s", "fp32", "forward+backward", [bad], lambda: [torch.ones(3)] * 3)
    (record,) = measure(case, "cpu", rounds=1)
    assert record.error.startswith("wrong") and record.p50_us is None


def test_a_provider_may_take_its_samples_itself_and_a_case_limit_them():
    times = iter([3.0, 1.0, 2.0])
    own = Provider("own", lambda: right, timer=lambda: next(times))
    (record,) = measure(replace(case([own]), most_rounds=3), "cpu", rounds=9)
    assert (record.p50_us, record.samples) == (2.0, 3) and next(times, None) is None


def test_a_case_without_needs_has_no_bound():
    made = case([Provider("p", lambda: right)])
    (without,) = measure(made, "cpu", 1, bound=lambda _: (1.0, "flop"))
    (with_needs,) = measure(replace(made, needs=(1.0, 0.0, 0.0)), "cpu", 1, bound=lambda _: (1.0, "flop"))
    assert (without.bound_us, with_needs.bound_us) == (None, 1.0)


def test_a_dry_run_is_a_gpus_list_on_the_cpu():
    cpu, cuda, dry = Target("cpu"), Target("cuda"), Target("cpu", dry_run=True)
    assert (cpu.gpu, cuda.gpu, dry.gpu) == (False, True, True)
    assert (cpu.backend, cuda.backend, dry.backend) == ("auto", "triton", "triton")
    assert dry.device == "cpu"


def test_the_gpu_is_busy_for_as_long_as_a_graphs_launch_takes(monkeypatch):
    """A graph of 1,000 nodes takes the host milliseconds; the number of calls in it says nothing."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    launches = []

    def launch():
        launches.append(time.sleep(0.03 if not launches else 0.01))

    assert 2 * 0.01 * CLOCKS_PER_S <= busy_clocks(launch) < 2 * 0.03 * CLOCKS_PER_S, "the first launch does not count"
    assert busy_clocks(lambda: None) == CLOCKS_PER_S // 1000
