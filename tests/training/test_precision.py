import pytest
import torch

from sagan_fast.errors import InputError
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.precision import Precision, Scaler
from sagan_fast.training.state import new_state
from sagan_fast.training.step import train_step

CPU = torch.device("cpu")


def test_auto_is_fp32_without_a_gpu_and_what_the_cpu_cannot_do_is_refused():
    assert Precision("auto", CPU).name == "fp32"
    for name in ("tf32", "fp16"):
        with pytest.raises(InputError, match=f"precision {name} needs a CUDA device, and this run is on cpu"):
            Precision(name, CPU)


@pytest.mark.parametrize(("name", "expected"), [("fp32", "ieee"), ("bf16", "tf32")])
def test_products_are_as_asked_and_as_before_afterwards(name, expected):
    before = torch.backends.cuda.matmul.fp32_precision
    with Precision(name, CPU).products():
        assert torch.backends.cuda.matmul.fp32_precision == expected
        assert torch.backends.cudnn.allow_tf32 == (expected == "tf32")
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_bf16_computes_in_bf16_and_keeps_weights_and_losses_in_fp32(generator):
    narrow = {"base_channels": 4}
    config = TrainConfig.from_preset(
        "shapes-32", out="x", generator=narrow, discriminator=narrow, batch_size=4, precision="bf16"
    )
    state = new_state(config, CPU)
    seen = set()
    state.generator.blocks[0].conv2.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    values = train_step(state, config, images, torch.arange(4), CPU)
    assert seen == {torch.bfloat16}
    assert all(value.dtype == torch.float32 and value.isfinite() for value in values.values())
    for model in (state.generator, state.discriminator, state.ema):
        assert {t.dtype for t in model.state_dict().values()} <= {torch.float32, torch.int64}
    assert all(p.grad.dtype == torch.float32 for p in state.discriminator.parameters() if p.grad is not None)


class Overflowing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


def update(scaler, loss, optimizer):
    optimizer.zero_grad()
    scaler.backward(loss)
    return scaler.update(optimizer)


def test_a_step_that_overflows_is_skipped_counted_and_remembered():
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), Scaler("cpu", enabled=True)
    assert update(scaler, 2 * weight, optimizer) == 2
    assert torch.isclose(weight.detach(), torch.tensor(0.8)) and scaler.skipped == 0
    assert update(scaler, Overflowing.apply(weight), optimizer) == 0
    assert torch.isclose(weight.detach(), torch.tensor(0.8)) and scaler.skipped == 1
    resumed = Scaler("cpu", enabled=True)
    resumed.load_state_dict(scaler.state_dict())
    assert resumed.skipped == 1 and resumed.get_scale() == scaler.get_scale() == 2.0**15


def test_fused_adam_takes_unscaled_gradients_and_leaves_out_the_step_that_overflows():
    weight, plain = (torch.nn.Parameter(torch.full((3,), 2.0)) for _ in range(2))
    scaled, reference = Scaler("cpu", enabled=True), Scaler("cpu", enabled=False)
    fused, other = (torch.optim.Adam([w], lr=0.1, betas=(0.0, 0.9), fused=True) for w in (weight, plain))
    for factor in (3.0, float("inf"), 5.0):
        norm = update(scaled, (factor * weight).sum() if factor < 9 else Overflowing.apply(weight).sum(), fused)
        if factor < 9:
            torch.testing.assert_close(norm, update(reference, (factor * plain).sum(), other))
    torch.testing.assert_close(weight, plain)
    assert scaled.skipped == 1


def test_without_scaling_it_is_a_plain_step_and_a_bad_gradient_shows():
    weight = torch.nn.Parameter(torch.ones(()))
    scaler, optimizer = Scaler("cpu", enabled=False), torch.optim.SGD([weight], lr=0.1)
    assert update(scaler, 2 * weight, optimizer) == 2
    assert torch.isclose(weight.detach(), torch.tensor(0.8))
    assert scaler.state_dict() == {"skipped": 0}
    assert update(scaler, Overflowing.apply(weight), optimizer) == float("inf")
