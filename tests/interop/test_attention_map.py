import copy
import io

import pytest
import torch

from sagan_fast.interop.attention_map import LazyMap


def lazy(values, calls):
    return LazyMap(lambda: calls.append(1) or values, tuple(values.shape), values)


def test_values_come_once_and_only_when_used(generator):
    values, calls = torch.rand(2, 3, 4, generator=generator), []
    found = lazy(values, calls)
    assert found.shape == (2, 3, 4) and found.dtype == torch.float32 and found.device.type == "cpu"
    assert found.ndim == found.dim() == 3 and found.size(1) == 3 and len(found) == 2 and isinstance(found, torch.Tensor)
    assert not calls and not found.is_computed
    for use, expected in [
        (lambda t: t.sum(), values.sum()),
        (lambda t: t[0, 1], values[0, 1]),
        (lambda t: 2 * t, 2 * values),
        (lambda t: torch.stack([t, t]), torch.stack([values, values])),
        (lambda t: t.detach().cpu().double(), values.double()),
        (lambda t: torch.from_numpy(t.numpy()), values),
        (copy.deepcopy, values),
        (lambda t: torch.nn.parallel.scatter_gather.gather([t], "cpu") if False else torch.cat([t]), values),
    ]:
        assert torch.equal(use(found), expected)
    assert calls == [1] and found.is_computed and "LazyMap" not in repr(found)
    stream = io.BytesIO()
    torch.save({"map": found}, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=True)["map"], values)


def test_gradients_pass_through(generator):
    weight = torch.rand(3, 4, generator=generator, requires_grad=True)
    found = lazy(weight * 2, [])
    (found.square().sum()).backward()
    torch.testing.assert_close(weight.grad, 8 * weight.detach())
    assert found.requires_grad


def test_an_error_of_the_computation_reaches_the_user():
    def fail():
        raise RuntimeError("too late")

    with pytest.raises(RuntimeError, match="too late"):
        LazyMap(fail, (2,), torch.zeros(2)).sum()
