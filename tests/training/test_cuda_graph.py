"""Steps as graphs: what a replay computes on the same memory is what the plain step computes, bit for bit."""

import copy
import re

import pytest
import torch
from recorded_steps import OperatorRecorder, as_on_cuda

import sagan_fast.training.step as step_module
from sagan_fast.distributed import World
from sagan_fast.errors import InputError
from sagan_fast.models.checkpoint import load_checkpoint
from sagan_fast.training import cuda_graph
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.cuda_graph import CapturedStep, StaticNoise, captured_step, refusal
from sagan_fast.training.loop import train
from sagan_fast.training.state import TrainState, new_state
from sagan_fast.training.step import Noise, prepare_batch, train_step
from shared_by_tests import assert_same, on_a_real_gpu

CPU = torch.device("cpu")
TINY = dict(
    resolution=16,
    generator={"base_channels": 4, "channel_multipliers": [4, 2, 1], "attention_resolutions": [8]},
    discriminator={"base_channels": 4, "channel_multipliers": [1, 2, 2], "attention_resolutions": [8]},
)
PENALTIES = {"r1_gamma": 1.0, "penalty_every": 2, "lecam_weight": 0.1}
ALL = {"flip": True, "diffaugment": "color,translation,cutout", "micro_batch_size": 2, "checkpoint_activations": True}
PAIRED = {"loss": "relativistic", "gp_weight": 1.0, "r2_gamma": 0.1, "sync_batch_norm": True}
AHEAD_OF_NORM = re.compile(r"blocks\.\d+\.(conv1|conv2|shortcut)\.bias")
"""Biases whose gradient is zero but for rounding, which Adam makes steps of."""


def small(**overrides):
    return TrainConfig.from_preset("shapes-32", **{"out": "x", "batch_size": 4, **TINY, **overrides})


def batches(generator, count):
    size = (4, 3, 16, 16)
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


@pytest.fixture
def float64(float64, monkeypatch):
    """Real images in float64 too."""

    def prepare(*args):
        pixels, y = prepare_batch(*args)
        return pixels.double(), y

    monkeypatch.setattr(step_module, "prepare_batch", prepare)


@pytest.mark.parametrize(
    "overrides", [{}, pytest.param({**PENALTIES, **ALL}, marks=pytest.mark.slow)], ids=["plain", "all"]
)
def test_twenty_replayed_steps_are_those_of_the_plain_trainer_in_float64(generator, monkeypatch, float64, overrides):
    config, given, said = small(**overrides), batches(generator, 20), []
    plain, state, recorder = new_state(config, CPU), new_state(config, CPU), OperatorRecorder()
    expected = [train_step(plain, config, *each, CPU) for each in given]
    as_on_cuda(monkeypatch)  # not before: the plain trainer is as it is
    step = CapturedStep(state, config, said.append, recorder)
    for each, numbers in zip(given, expected, strict=True):
        values = step(*each)
        assert values.keys() == numbers.keys()
        for name, number in numbers.items():
            if name != "grad_norm/g":  # which has the biases ahead of norms in it
                torch.testing.assert_close(values[name], number, rtol=1e-9, atol=1e-9)
    kinds = 2 if overrides else 1
    assert recorder.records == kinds == len(said) and recorder.replays == 20 - 3 * kinds
    for name in ("generator", "discriminator", "ema", "lecam"):
        ours, theirs = getattr(state, name).state_dict(), getattr(plain, name).state_dict()
        for key, tensor in theirs.items():
            if not AHEAD_OF_NORM.match(key) or name == "discriminator":
                torch.testing.assert_close(ours[key], tensor, rtol=1e-9, atol=1e-9)
    assert next(state.generator.parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    "overrides", [PENALTIES, ALL, PAIRED, {"precision": "bf16"}], ids=["r1", "all", "paired", "bf16"]
)
def test_replayed_steps_are_the_plain_ones_bit_for_bit_also_after_a_rollback(generator, monkeypatch, overrides):
    as_on_cuda(monkeypatch)
    last = 8 if "penalty_every" in overrides else 5
    config, given, said = small(**overrides), batches(generator, last + 1), []
    plain, state, recorder = new_state(config, CPU), new_state(config, CPU), OperatorRecorder()
    step = CapturedStep(state, config, said.append, recorder)
    for i, each in enumerate(given):
        if i == last - 1:
            saved = copy.deepcopy(plain.state_dict())
        expected = train_step(plain, config, *each, CPU)
        values = step(*each)
        assert all(torch.equal(values[name], value.to(values[name].dtype)) for name, value in expected.items()), i
    kinds = 2 if last == 8 else 1
    assert are_same(plain, state) and recorder.records == len(said) == kinds and recorder.replays == 3
    for one in (plain, state):  # as after a divergence, with other noise
        one.load_state_dict(saved)
        one.rollbacks = 1
    train_step(plain, config, *given[-1], CPU), step(*given[-1])
    assert are_same(plain, state) and recorder.records == kinds and recorder.replays == 4


def test_the_noise_of_a_graph_is_that_of_each_step_at_one_address():
    config = small(batch_size=512, micro_batch_size=64, diffaugment="color", flip=True)
    static, places = StaticNoise(Noise(config, 0, CPU)), []
    for step in range(3):
        drawn = []
        static.refill(Noise(config, step, CPU))
        for one in (static, Noise(config, step, CPU)):
            drawn.append([one.flips(), one.classes(), one.latent(), *one.changes(3), one.shares(), *one.changes(1)])
        assert all(map(torch.equal, *drawn))
        places.append([each.data_ptr() for each in drawn[0][1:]])  # flips are computed from their numbers
    assert places[0] == places[1] == places[2]


def test_a_changed_learning_rate_is_captured_anew(generator, monkeypatch):
    as_on_cuda(monkeypatch)
    config, given, recorder = small(), batches(generator, 9), OperatorRecorder()
    plain, state = new_state(config, CPU), new_state(config, CPU)
    step = CapturedStep(state, config, lambda said: None, recorder)
    for i, each in enumerate(given):
        for one in (plain, state):
            one.g_optimizer.param_groups[0]["lr"] = 1e-4 if i < 5 else 3e-4
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


def test_results_made_anew_are_found_before_a_replay_would_miss_them(generator, monkeypatch):
    as_on_cuda(monkeypatch)
    config, given, said = small(), batches(generator, 5), []
    plain, state = new_state(config, CPU), new_state(config, CPU)
    step = CapturedStep(state, config, said.append, OperatorRecorder())
    state.d_spectral.in_place = False
    for each in given:
        train_step(plain, config, *each, CPU), step(*each)
    assert are_same(plain, state)
    assert said == [
        "steps are not captured as a CUDA graph: at step 4 the capture failed (a tensor that the next step needs was "
        "made anew)"
    ]


def test_other_numbers_of_images_are_left_to_the_plain_step(generator, monkeypatch):
    as_on_cuda(monkeypatch)
    state, recorder = new_state(small(), CPU), OperatorRecorder()
    step = CapturedStep(state, small(), lambda said: None, recorder)
    images, labels = batches(generator, 1)[0]
    called = []
    monkeypatch.setattr(cuda_graph, "train_step", lambda state, config, *given: called.append(given[0].shape))
    step(images, labels), step(images[:2], labels[:2])
    assert called == [(2, 3, 16, 16)] and recorder.warm_ups == 1


def test_a_run_that_cannot_be_captured_says_why():
    said = []
    config = small(cuda_graph=True)
    assert captured_step(config, new_state(config, CPU), said.append) is None
    assert said == ["steps are not captured as a CUDA graph: the run is on cpu"]
    for left in (small(), small(cuda_graph=False)):
        assert captured_step(left, new_state(config, CPU), said.append) is None and len(said) == 1
    with pytest.raises(InputError, match="cuda_graph must be true, false or auto, got 'yes'"):
        small(cuda_graph="yes")


def on_cuda():
    state = new_state(small(), CPU)
    state.world = World(torch.device("cuda"))
    return state


def test_each_reason_not_to_capture_has_its_words(monkeypatch):
    assert refusal(on_cuda()) == ""
    assert "give a number" in refusal(on_cuda(), size_was_found=True)
    state = on_cuda()
    state.world = World(torch.device("cuda"), size=2)
    assert refusal(state).startswith("2 processes exchange gradients")
    state = on_cuda()
    monkeypatch.setattr(state.d_scaler, "is_enabled", lambda: True)
    assert refusal(state).startswith("fp16 skips steps")
    state = on_cuda()
    state.discriminator.linear.register_forward_hook(lambda *args: None)
    assert refusal(state) == "linear has hooks, and a replay calls none"
    state = on_cuda()
    state.generator.blocks[0].norm1.gain.weight.register_post_accumulate_grad_hook(lambda p: None)
    assert refusal(state) == "blocks.0.norm1.gain has hooks, and a replay calls none"
    state = on_cuda()
    state.g_optimizer.register_step_post_hook(lambda *args: None)
    assert refusal(state) == "Adam has hooks, and a replay calls none"
    state.g_optimizer = torch.optim.SGD(state.generator.parameters(), lr=0.1)
    del state.g_optimizer.param_groups[0]["foreach"]
    assert refusal(state) == "SGD has no option capturable"


@pytest.mark.slow
def test_a_run_of_replayed_steps_that_stops_and_goes_on_is_the_plain_run(tmp_path, monkeypatch, capsys):
    as_on_cuda(monkeypatch)
    recorders = []
    monkeypatch.setattr(cuda_graph, "refusal", lambda *args: "")
    monkeypatch.setattr(
        cuda_graph, "CudaRecorder", lambda device: recorders.append(OperatorRecorder()) or recorders[-1]
    )

    def go(name, **options):
        train(small(device="cpu", log_every=5, checkpoint_every=5, out=str(tmp_path / name), **options), resume=True)

    go("plain", steps=10)
    assert not recorders
    for steps in (5, 10):
        go("replayed", steps=steps, cuda_graph=True)
    assert [each.replays for each in recorders] == [2, 2]
    assert "from step 4 on each step is the replay of a CUDA graph" in capsys.readouterr().out
    plain, replayed = (load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("plain", "replayed"))
    for name in TrainState.PARTS:
        assert_same(plain[name], replayed[name])


GPU_RUNS = [
    {},
    {"diffaugment": "color,translation,cutout"},
    {"precision": "bf16", "r1_gamma": 0.1, "penalty_every": 2, "lecam_weight": 0.1, "flip": True},
    {"micro_batch_size": 2, "checkpoint_activations": True},
]


@on_a_real_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("overrides", GPU_RUNS, ids=["plain", "diffaugment", "bf16-penalties", "micro-batches"])
def test_captured_steps_on_a_gpu_are_the_plain_ones(generator, overrides):
    """Learning rates are small: Adam makes whole steps of rounding noise, which would then change the losses."""
    device = torch.device("cuda")
    config = small(**{"precision": "fp32", "g_lr": 1e-6, "d_lr": 1e-6, "device": "cuda", **overrides})
    given, said = batches(generator, 14), []
    plain, state = new_state(config, device), new_state(config, device)
    before = [p.detach().clone() for p in plain.generator.parameters()]
    step = CapturedStep(state, config, said.append)
    tolerance = 5e-2 if "precision" in overrides else 1e-3
    with plain.precision.products():
        for each in given:
            expected, values = train_step(plain, config, *each, device), step(*each)
            for name in ("d_loss", "g_loss"):
                torch.testing.assert_close(values[name], expected[name], rtol=tolerance, atol=tolerance)
    assert len(said) == (2 if "r1_gamma" in overrides else 1) and all("replay of a CUDA graph" in each for each in said)
    for ours, theirs in zip(state.g_optimizer.state.values(), plain.g_optimizer.state.values(), strict=True):
        assert float(ours["step"]) == float(theirs["step"]) == len(given)
    ours, theirs, start = (
        torch.cat([p.detach().flatten().double() for p in some])
        for some in (state.generator.parameters(), plain.generator.parameters(), before)
    )
    assert (ours - theirs).norm() < 0.5 * (theirs - start).norm()


@on_a_real_gpu
@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_is_done_without_a_graph(generator, monkeypatch):
    device = torch.device("cuda")
    config, said, update = small(device="cuda", precision="fp32"), [], cuda_graph.update_networks

    def waiting(*args):
        values = update(*args)
        values["d_loss"].item()
        return values

    monkeypatch.setattr(cuda_graph, "update_networks", waiting)
    state = new_state(config, device)
    step = CapturedStep(state, config, said.append)
    for each in batches(generator, 6):
        assert torch.isfinite(step(*each)["d_loss"])
    assert state.step == 6 and len(said) == 1 and "at step 4 the capture failed" in said[0]
