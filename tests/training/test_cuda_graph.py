"""Steps as graphs: what a replay computes on the same memory is what the plain step computes, bit for bit."""

import pytest
import torch

from recorded_steps import OperatorRecorder, as_on_cuda
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.cuda_graph import CapturedStep, captured_step
from sagan_fast.training.state import new_state
from sagan_fast.training.step import train_step

CPU = torch.device("cpu")


def small(**overrides):
    narrow = {"base_channels": 4}
    return TrainConfig.from_preset(
        "shapes-32", data="shapes", out="x", generator=narrow, discriminator=narrow, batch_size=4, **overrides
    )


def batches(generator, count):
    size = (4, 3, 32, 32)
    return [
        (torch.randint(256, size, dtype=torch.uint8, generator=generator), torch.randint(10, (4,), generator=generator))
        for _ in range(count)
    ]


def tensors_of(saved):
    for value in saved.values():
        if isinstance(value, dict):
            yield from tensors_of(value)
        elif isinstance(value, torch.Tensor):
            yield value


def are_same(a, b):
    return all(map(torch.equal, tensors_of(a.state_dict()), tensors_of(b.state_dict())))


@pytest.mark.parametrize(
    "overrides", [{}, {"r1_gamma": 1.0, "penalty_every": 2, "lecam_weight": 0.1, "flip": True, "micro_batch_size": 2}]
)
def test_twenty_replayed_steps_are_the_plain_ones_also_after_a_checkpoint_is_loaded(generator, monkeypatch, overrides):
    as_on_cuda(monkeypatch)
    config, given, said = small(**overrides), batches(generator, 20), []
    plain, state, recorder = new_state(config, CPU), new_state(config, CPU), OperatorRecorder()
    step = CapturedStep(state, config, said.append, recorder)
    expected = [train_step(plain, config, *each, CPU) for each in given]
    saved = None
    for i in [*range(14), *range(10, 20)]:  # back from 14 to 10, as after a divergence
        if i == 10 and saved is None:
            saved = torch.utils._pytree.tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, state.state_dict())
        elif i == 10:
            state.load_state_dict(saved)
        values = step(*given[i])
        assert all(torch.equal(values[name], value) for name, value in expected[i].items()), i
    kinds = 2 if overrides else 1
    assert are_same(plain, state) and recorder.records == kinds == len(said) and recorder.replays > 10


def test_a_changed_learning_rate_is_captured_anew(generator, monkeypatch):
    as_on_cuda(monkeypatch)
    config, given, recorder = small(), batches(generator, 12), OperatorRecorder()
    plain, state = new_state(config, CPU), new_state(config, CPU)
    step = CapturedStep(state, config, lambda said: None, recorder)
    for i, each in enumerate(given):
        for one in (plain, state):
            one.g_optimizer.param_groups[0]["lr"] = 1e-4 if i < 6 else 3e-4
        train_step(plain, config, *each, CPU), step(*each)
    assert are_same(plain, state) and recorder.records == 2


def test_a_step_that_would_wait_for_the_device_is_not_captured_and_nothing_is_lost(generator):
    """On the CPU the networks look at the classes."""
    config, given, said = small(), batches(generator, 6), []
    plain, state = new_state(config, CPU), new_state(config, CPU)
    step = CapturedStep(state, config, said.append, OperatorRecorder())
    for each in given:
        train_step(plain, config, *each, CPU), step(*each)
    assert are_same(plain, state)
    assert len(said) == 1 and "at step 4 the capture failed (operation not permitted" in said[0]


def test_a_run_that_cannot_be_captured_says_why():
    said = []
    config = small(cuda_graph=True)
    assert captured_step(config, new_state(config, CPU), said.append) is None
    assert said == ["steps are not captured as a CUDA graph: the run is on cpu"]
    assert captured_step(small(), new_state(config, CPU), said.append) is None and len(said) == 1
