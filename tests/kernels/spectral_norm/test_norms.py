import pytest
import torch
from torch import Tensor

from sagan_fast.kernels.spectral_norm import eager, norms, reference
from sagan_fast.kernels.spectral_norm.tables import matrices_of
from shared_by_tests import assert_close_to_truth, spectral_norm_inputs

SHAPES = [(64, 27), (3, 1201), (1, 8), (70, 3)]
NARROW = [(64, 27), (3, 70), (1030, 4), (6, 4, 3, 3)]
"""For the mirrored sweep, whose programs are columns: the interpreter takes milliseconds each."""

launchers = pytest.mark.parametrize("launch", [norms.spectral_norms, eager.spectral_norms], ids=["triton", "eager"])
scalers = pytest.mark.parametrize(
    "scale", [norms.scale_spectral_norms, eager.scale_spectral_norms], ids=["triton", "eager"]
)


def inputs(shapes, generator, dtype=torch.float32) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return matrices and a stack of three, which do not all start at multiples of 16 bytes."""
    tensors, us, vs = spectral_norm_inputs([*shapes, *[(5, 11)] * 3], generator, dtype)
    return tuple([*some[:-3], torch.stack(some[-3:])] for some in (tensors, us, vs))


def flat(tensors, us):
    return [one for each, u in zip(tensors, us, strict=True) for one in matrices_of(each, u.ndim == 2)]


def check(launch, tensors, us, vs, v_first=False, n_power_iterations=1):
    before = [x.clone() for x in tensors]
    truths = []
    for x, u, v in zip(flat(tensors, us), flat(us, us), flat(vs, us), strict=True):
        truth = (None, u.double(), v.double())
        for _ in range(n_power_iterations):
            truth = reference.norm_of_update(x.double().flatten(1), *truth[1:], v_first)
        truths.append(truth)
    sigmas = launch(tensors, us, vs, v_first=v_first, n_power_iterations=n_power_iterations)
    assert sigmas.dtype == torch.float32 and all(map(torch.equal, tensors, before))
    found = zip(sigmas, flat(us, us), flat(vs, us), truths, strict=True)
    for i, (*ours, truth) in enumerate(found):
        for name, one, exact in zip(("sigma", "u", "v"), ours, truth, strict=True):
            assert_close_to_truth(f"{name} of matrix {i}", one, exact)


@launchers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64(generator, launch, dtype):
    check(launch, *inputs(SHAPES, generator, dtype))


@launchers
@pytest.mark.parametrize(("v_first", "n_power_iterations"), [(True, 1), (False, 2)])
def test_both_orders_and_several_iterations(generator, launch, v_first, n_power_iterations):
    tensors, us, vs = inputs(NARROW, generator)
    tensors[3] = tensors[3].contiguous(memory_format=torch.channels_last)
    check(launch, tensors, us, vs, v_first, n_power_iterations)


@launchers
def test_without_update_sigma_is_of_u_and_v_as_they_are(generator, launch):
    tensors, us, vs = inputs(NARROW, generator)
    before = [x.clone() for x in (*us, *vs)]
    sigmas = launch(tensors, us, vs, update=False)
    for sigma, x, u, v in zip(sigmas, flat(tensors, us), flat(us, us), flat(vs, us), strict=True):
        assert_close_to_truth("sigma", sigma, u.double() @ x.double().flatten(1) @ v.double())
    assert all(map(torch.equal, (*us, *vs), before))


@launchers
@pytest.mark.parametrize("v_first", [False, True])
def test_u_and_v_stay_where_there_is_no_direction(generator, launch, v_first):
    """Zeros, less than 1e-6, and what is not finite; the matrices beside them move."""
    tensors, us, vs = inputs([(4, 6)] * 5, generator)
    for x, factor in zip(tensors, (0.0, 1e-9, float("nan"), float("inf"), 1.0), strict=False):
        x.mul_(factor)
    tensors[-1][1] = 0
    expected = [
        (x.double().T @ u.double() if v_first else x.double() @ v.double()).norm()
        for x, u, v in zip(flat(tensors, us), flat(us, us), flat(vs, us), strict=True)
    ]
    before = [x.clone() for x in (*flat(us, us), *flat(vs, us))]
    sigmas = launch(tensors, us, vs, v_first=v_first)
    kept = [torch.equal(x, old) for x, old in zip((*flat(us, us), *flat(vs, us)), before, strict=True)]
    assert kept == [True, True, True, True, False, False, True, False] * 2
    for i in (0, 1, 6):
        assert abs(sigmas[i].item() - expected[i].item()) < 1e-12
    assert not sigmas[2].isfinite() and not sigmas[3].isfinite() and (sigmas[[4, 5, 7]] > 1e-6).all()


@scalers
@pytest.mark.parametrize(
    ("dtype", "per_matrix"), [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)]
)
def test_scales_in_place_and_leaves_what_has_no_norm(generator, scale, dtype, per_matrix):
    tensors, us, _ = inputs(NARROW, generator, dtype)
    sigmas = torch.rand(7, generator=generator) + 0.5
    sigmas[1], sigmas[2], sigmas[5] = 0.0, float("nan"), float("inf")
    targets = torch.rand(7, generator=generator) + 0.5 if per_matrix else 0.75
    before = [x.clone() for x in flat(tensors, us)]
    scale(tensors, [u.ndim == 2 for u in us], sigmas, targets)
    for i, (x, old) in enumerate(zip(flat(tensors, us), before, strict=True)):
        if i in (1, 2, 5):
            assert torch.equal(x, old)
        else:
            factor = (targets[i] if per_matrix else targets) / sigmas[i].double()
            assert_close_to_truth(f"matrix {i}", x, old.double() * factor)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x, u, v: ([], [], []), ValueError, "at least one tensor"),
        (lambda x, u, v: (x, u, []), ValueError, "must have one length"),
        (lambda x, u, v: ([x[0].double()], u, v), TypeError, r"tensors\[0\] must have dtype"),
        (lambda x, u, v: ([x[0].t()], v, u), ValueError, "must be contiguous or channels_last"),
        (lambda x, u, v: ([torch.ones(4, 6, 8)[::2]], [u[0].expand(2, 6)], v), ValueError, "one behind the other"),
        (lambda x, u, v: ([torch.zeros(1, 16385)], u, v), ValueError, "1 to 16384"),
        (lambda x, u, v: (x, [u[0].half()], v), TypeError, r"us\[0\] must have dtype"),
        (lambda x, u, v: (x, u, [v[0][1:]]), ValueError, r"vs\[0\] must have shape"),
        (lambda x, u, v: (x, u, [v[0].repeat(2)[::2]]), ValueError, "contiguous"),
    ],
)
def test_refuses_what_it_cannot_take(change, error, match):
    with pytest.raises(error, match=match):
        norms.spectral_norms(*change([torch.ones(6, 8)], [torch.ones(6)], [torch.ones(8)]))
