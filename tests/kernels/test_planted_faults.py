"""Faults planted in copies of the kernels are found by ttsem, or show against float64: `make sanitize`."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from sagan_fast.kernels.attention import backward, forward, preprocess, second, tangent
from sagan_fast.kernels.attention.backward import attention_bwd
from sagan_fast.kernels.attention.forward import attention_fwd
from sagan_fast.kernels.attention.reference import attention, attention_second
from sagan_fast.kernels.batch_norm import backward as norm_backward
from sagan_fast.kernels.batch_norm import forward as norm_forward
from sagan_fast.kernels.batch_norm import reference as norm_reference
from sagan_fast.kernels.batch_norm import tiling
from sagan_fast.kernels.configs import LaunchConfig
from sagan_fast.kernels.projection import forward as projection
from sagan_fast.kernels.self_attention import backward as block_backward
from sagan_fast.kernels.self_attention import forward as block_forward
from sagan_fast.kernels.self_attention import preprocess as block_preprocess
from sagan_fast.kernels.self_attention.inputs import BlockInputs
from sagan_fast.kernels.self_attention.reference import self_attention
from sagan_fast.kernels.spectral_norm import forward as spectral_norm
from sagan_fast.kernels.spectral_norm import norms, stacks, sweep
from sagan_fast.kernels.spectral_norm.forward import spectral_norm_fwd
from sagan_fast.kernels.spectral_norm.reference import norm_of_update
from sagan_fast.kernels.spectral_norm.tables import offsets
from shared_by_tests import randn, spectral_norm_inputs, spectral_norm_truth

under_ttsem = pytest.mark.skipif("ttsem" not in sys.modules, reason="runs under ttsem: make sanitize")


def run_attention(generator):
    """Return outputs and gradients of ragged attention and the same in float64."""
    tensors = [randn(2, n, d, generator=generator).float() for n, d in ((300, 8), (170, 8), (170, 24), (300, 24))]
    q, k, v, d_out = tensors
    out, lse, lost = attention_fwd(q, k, v)
    found = [out, *attention_bwd(d_out, q, k, v, out, lse, lost)]
    exact = [tensor.double().requires_grad_(tensor is not d_out) for tensor in tensors]
    truth = attention(*exact[:3])
    return found, [truth, *torch.autograd.grad(truth, exact[:3], exact[3])]


def run_second(generator):
    """Return the tangent and the second gradients of ragged attention and the same in float64."""
    sizes = [(300, 8), (170, 8), (170, 24), (300, 24), (300, 8), (170, 8), (170, 24)]
    q, k, v, d_o, *tangents = tensors = [randn(2, n, d, generator=generator).float() for n, d in sizes]
    q *= 8**-0.5
    found = second.attention_second(d_o, q, k, v, *attention_fwd(q, k, v), *tangents)
    q, k, v, d_o, *tangents = (tensor.double() for tensor in tensors)
    return found, attention_second(d_o, q, k, v, *tangents)


def run_batch_norm(generator):
    """Return all results of batch norm + ReLU by class, of both memory formats, and the same in float64.

    Tiles are so small that a program has several, and the last program of a map fewer than the others.
    """
    found, truths = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "lookup_size", lambda name, size: LaunchConfig(BLOCK=64, num_warps=4))
        patch.setattr(tiling, "PROGRAMS", 4)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            one, truth = run_one_batch_norm(generator, memory_format)
            found += one
            truths += truth
    return found, truths


def run_one_batch_norm(generator, memory_format):
    shape, C, classes = (2, 3, 6, 13), 3, torch.tensor([4, 1])
    form = dict(eps=1e-3, one_plus=True)
    gain, bias, running_mean, running_var = (
        randn(*size, generator=generator).float() for size in ((5, C), (5, C), (C,), (C,))
    )
    running = [tensor.double() for tensor in (running_mean, running_var)]
    while True:  # until rounding decides no sign before the ReLU
        x = (2 * randn(*shape, generator=generator) + 3).float().contiguous(memory_format=memory_format)
        wide = [tensor.double().requires_grad_() for tensor in (x, gain, bias)]
        moments = norm_reference.moments(wide[0])
        out = norm_reference.batch_norm(wide[0], *moments, *wide[1:], classes, relu=False, **form)
        if out.abs().min() > 1e-4:
            break
    d_out = randn(*shape, generator=generator).float().contiguous(memory_format=memory_format)
    torch.nn.functional.batch_norm(x.double(), *running, training=True, momentum=0.3)
    truths = [*moments, *running, out.relu(), *torch.autograd.grad(out.relu(), wide, d_out.double())]

    mean, var = norm_forward.batch_norm_moments(x, running_mean, running_var, 0.3)
    y = norm_forward.batch_norm_fwd(x, mean, var, gain, bias, classes, relu=True, **form)
    sums = norm_backward.batch_norm_bwd_sums(d_out, x, mean, var, gain, bias, classes, relu=True, **form)
    totals = norm_backward.batch_norm_bwd_totals(sums, x, gain, classes, factor=C / x.numel(), one_plus=True)
    tables = norm_backward.batch_norm_bwd_tables(sums, x, gain, bias, classes)
    d_x = norm_backward.batch_norm_bwd_input(d_out, x, mean, var, gain, bias, classes, totals, relu=True, **form)
    return [mean, var, running_mean, running_var, y, d_x, *tables], [truth.detach() for truth in truths]


def run_block(generator, pool=True):
    """Return output and gradients of a block on odd maps, with biases, and the same in float64."""
    B, C, H, W, D_QK, D_V = 2, 20, 17, 19, 4, 12
    sizes = [(B, C, H, W), (D_QK, C), (D_QK, C), (D_V, C), (C, D_V), (), (D_QK,), (D_QK,), (D_V,), (C,)]
    inputs = BlockInputs(*(randn(*size, generator=generator, scale=0.5).float() for size in sizes))
    d_y = randn(B, C, H, W, generator=generator).float()
    y, saved = block_forward.self_attention_fwd(inputs, pool=pool)
    given = block_backward.self_attention_bwd(d_y, inputs, saved)
    exact = [tensor[:, :, None, None] if tensor.ndim == 2 else tensor for tensor in inputs]
    exact = BlockInputs(*(tensor.double().requires_grad_() for tensor in exact))
    truth = self_attention(exact, pool)
    truths = torch.autograd.grad(truth, (exact.x, exact.w_theta, exact.gamma), d_y.double())
    return [y, given.x, given.w_qkv[:D_QK], given.gamma], [truth, *truths]


def run_unpooled(generator):
    """Do the same without the pool."""
    return run_block(generator, pool=False)


def run_spectral_norm(generator, n_power_iterations=1):
    """Return W/sigma and u of matrices of all kinds and the same in float64."""
    shapes = [(3000, 27), (300, 576), (70, 1201), (140, 2304)]
    weights, us, vs = spectral_norm_inputs(shapes, generator)
    truths = [spectral_norm_truth(*one) for one in zip(weights, us, vs, strict=True)]
    found = spectral_norm_fwd(weights, us, vs, n_power_iterations=n_power_iterations)
    starts, _ = offsets([weight.numel() for weight in weights])
    parts = [found[0][start : start + weight.numel()] for start, weight in zip(starts, weights, strict=True)]
    return [*parts, *us], [truth[i] for i in (0, 2) for truth in truths]


def run_norms(generator):
    """Return sigma, u and v of a matrix and of a stack, and both scaled, and the same in float64."""
    inputs = spectral_norm_inputs([(300, 27), (7, 9), (7, 9), (7, 9)], generator)
    tensors, us, vs = ([some[0].clone(), torch.stack(some[1:])] for some in inputs)
    truths = [norm_of_update(*(x.double() for x in one)) for one in zip(*inputs, strict=True)]
    sigmas = norms.spectral_norms(tensors, us, vs)
    norms.scale_spectral_norms(tensors, [False, True], sigmas, 2.0)
    found = [sigmas[:1], sigmas[1:], *us, *vs, *tensors]
    truths = [*truths, [2 * x.double() / truth[0] for x, truth in zip(inputs[0], truths, strict=True)]]
    each = [*zip(*truths[:-1], strict=True), truths[-1]]
    return found, [part for some in each for part in (some[0][None], torch.stack(some[1:]))]


PLANTED = {
    "queries past the end are stored": (
        forward, "    mask_n = offs_n < N\n", "    mask_n = offs_n < N + BLOCK_N\n", run_attention,
    ),
    "keys past the end are read": (
        forward, "mask_m = (start_m + offs_m < M) | EVEN_M", "mask_m = start_m + offs_m < M + BLOCK_M", run_attention,
    ),
    "keys past the end are attended to": (
        forward, 's = tl.where(mask_m[None, :], s, float("-inf"))', "pass", run_attention,
    ),
    "keys advance by too much": (
        forward, "k_ptrs += BLOCK_M * stride_k_m", "k_ptrs += (BLOCK_M + 1) * stride_k_m", run_attention,
    ),
    "two programs own each row": (
        forward, "    mask_n = offs_n < N\n", "    offs_n = offs_n // (2 * BLOCK_N) * BLOCK_N + offs_n % BLOCK_N\n"
        "    mask_n = offs_n < N\n", run_attention,
    ),
    "the log-sum-exp of the first tile alone is stored": (
        forward, "tl.log2(row_sum), mask=mask_n)", "tl.log2(row_sum), mask=offs_n < BLOCK_N)", run_attention,
    ),
    "gradients of keys read queries past the end": (
        backward, "mask_n = (start_n + offs_n < N) | EVEN_N", "mask_n = offs_n >= 0", run_attention,
    ),
    "dq of one image is stored in the next": (
        backward, "dq_ptr + b * stride_dq_b", "dq_ptr + (b + 1) * stride_dq_b", run_attention,
    ),
    "the log-sum-exp is read with a wrong stride": (
        backward, "lse_ptr + rows,", "lse_ptr + rows * 2,", run_attention,
    ),
    "delta is stored without a mask": (
        preprocess, "tl.store(delta_ptr + rows, delta, mask=mask_n)", "tl.store(delta_ptr + rows, delta)",
        run_attention,
    ),
    "all images store one sum for gamma": (
        block_preprocess, "b * tl.num_programs(0) + tl.program_id(0)", "tl.program_id(0)", run_block,
    ),
    "windows past the last are taken": (
        projection, "mask_w = offs_w < windows\n", "mask_w = offs_w < windows + BLOCK_M\n", run_unpooled,
    ),
    "an odd map's missing positions are read": (
        projection, "if POOL and not EVEN_HW:", "if POOL and EVEN_HW:", run_block,
    ),
    "channels past the last are written": (
        block_forward, "mask_c = (c < C) | EVEN_C", "mask_c = c < C + 1", run_block,
    ),
    "rows of the next program are stored": (
        sweep, "mask_r = row < rows\n", "mask_r = row < rows + 1\n", run_spectral_norm,
    ),
    "all programs of a matrix stage v in one place": (
        sweep, "v_ptr = _partial_ptr(partial_ptr, matrices_ptr, items_ptr, K)",
        "v_ptr = t_ptr + tl.load(entry_ptr + _T) * _OFFSET_UNIT", run_spectral_norm,
    ),
    "partial sums are added with a wrong stride": (
        spectral_norm, "partial_ptr += second_size", "partial_ptr += second_size + 1", run_spectral_norm,
    ),
    "W/sigma is stored without a mask": (
        spectral_norm, ".to(out_ptr.dtype.element_ty), mask=offs < size)", ".to(out_ptr.dtype.element_ty))",
        run_spectral_norm,
    ),
    "u past its end is stored": (
        norms, "tl.store(u_ptr + index, u, mask=index < R)", "tl.store(u_ptr + index, u)", run_norms,
    ),
    "all matrices of a stack are at its start": (
        stacks, "address + tl.load(place_ptr + 1 + offs % 3, mask=mask, other=0)", "address", run_norms,
    ),
    "a matrix is scaled by the sigma of the next": (
        norms, "sigma = tl.load(sigma_ptr + matrix)\n    if", "sigma = tl.load(sigma_ptr + matrix + 1)\n    if",
        run_norms,
    ),
    "a tangent reads keys past the end": (
        tangent, "mask_m = (offs_m < M) | EVEN_M", "mask_m = offs_m < M + BLOCK_M", run_second,
    ),
    "a tangent attends to keys past the end": (tangent, "if not EVEN_M:  #", "if EVEN_M:  #", run_second),
    "means past the last query are stored": (
        tangent, "tl.store(mean_ptr + rows, mean + shift, mask=mask_n)", "tl.store(mean_ptr + rows, mean + shift)",
        run_second,
    ),
    "a tangent's keys are those of a map as long as the queries": (
        tangent, "t_k_ptr += b * M * D_QK", "t_k_ptr += b * N * D_QK", run_second,
    ),
    "a tangent is less about the mean of the last keys": (
        tangent, "shift = tl.where(start_m == 0, first, shift)", "shift = first", run_second,
    ),
    "second gradients of keys past the end are stored": (
        second, "mask_m = offs_m < M\n", "mask_m = offs_m < M + BLOCK_M\n", run_second,
    ),
    "two programs own each row of the second gradients": (
        second, "    mask_n = offs_n < N\n", "    offs_n = offs_n // (2 * BLOCK_N) * BLOCK_N + offs_n % BLOCK_N\n"
        "    mask_n = offs_n < N\n", run_second,
    ),
    "the second gradients of the first tile of keys alone are stored": (
        second, "store_rows(dv_ptr, D_V, dv, keys, mask_m,", "store_rows(dv_ptr, D_V, dv, keys, offs_m < BLOCK_M,",
        run_second,
    ),
    "second gradients take the delta of the next query": (
        second, "delta_ptr + rows,", "delta_ptr + rows + 1,", run_second,
    ),
    "second gradients read the log-sum-exp with a wrong stride": (
        second, "lse_ptr + rows,", "lse_ptr + rows * 2,", run_second,
    ),
    "all images have the keys of the first": (second, "keys = b * M + offs_m", "keys = offs_m", run_second),
    "moments count what is past the end": (
        norm_forward, "tl.where(mask, x - shift[:, None], 0.0)", "x - shift[:, None]", run_batch_norm,
    ),
    "the last program has tiles past the last": (
        norm_forward, "end = tl.minimum(begin + share, all_tiles)\n    b,", "end = begin + share\n    b,",
        run_batch_norm,
    ),
    "all programs store their moments in one place": (
        norm_forward, "partial_ptr += part.to(tl.int64) * C + c", "partial_ptr += c", run_batch_norm,
    ),
    "squared distances of the first program alone are stored": (
        norm_forward, "tl.where(distance < 0.0, 0.0, distance), mask=mask_c)",
        "tl.where(distance < 0.0, 0.0, distance), mask=mask_c & (part == 0))", run_batch_norm,
    ),
    "running averages past the last channel move": (
        norm_forward, "running_mean_ptr + c, mean, momentum, mask_c,", "running_mean_ptr + c, mean, momentum, c >= 0,",
        run_batch_norm,
    ),
    "normalised positions past the end are stored": (
        norm_forward, "y.to(out_ptr.dtype.element_ty), mask=mask)", "y.to(out_ptr.dtype.element_ty))", run_batch_norm,
    ),
    "sums of channels past the last are stored": (
        norm_backward, "tl.sum(d_bias, axis=1), mask=mask_c)", "tl.sum(d_bias, axis=1))", run_batch_norm,
    ),
    "an image's last program sums the tiles of the next image": (
        norm_backward, "end = tl.minimum(begin + share, tiles)", "end = begin + share", run_batch_norm,
    ),
    "sums are read with a wrong stride": (
        norm_backward, "sums_ptr + all_parts * C + offs", "sums_ptr + all_parts * (C + 1) + offs", run_batch_norm,
    ),
    "a class has the gradients of those before it too": (
        norm_backward, "other=-1) == row", "other=-1) <= row", run_batch_norm,
    ),
    "gradients past the end of a map are stored": (
        norm_backward, "(d_x * scale[:, None]).to(d_x_ptr.dtype.element_ty), mask=mask)",
        "(d_x * scale[:, None]).to(d_x_ptr.dtype.element_ty))", run_batch_norm,
    ),
    "one mean is taken for the other": (
        norm_backward, "totals_ptr + C + c, mask", "totals_ptr + c, mask", run_batch_norm,
    ),
}  # fmt: skip
"""What is wrong, where, the right text and the planted one, and what runs it."""


def largest_error(found, truths):
    """Return the largest error relative to the largest value; infinity where something is not finite."""
    errors = []
    for one, truth in zip(found, truths, strict=True):
        error = (one.double().flatten() - truth.flatten()).abs().amax() / truth.abs().amax()
        errors.append(float(error) if bool(one.isfinite().all()) else float("inf"))
    return max(errors)


RUNS = [run_attention, run_second, run_block, run_unpooled, run_batch_norm, run_spectral_norm, run_norms]


@under_ttsem
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_without_a_fault_all_is_right(run, generator):
    assert largest_error(*run(generator)) < 1e-4


def plant(fault):
    """Return the kernel's module, and its source with the fault. Raises LookupError where the text is not found."""
    module, right, wrong, _ = PLANTED[fault]
    source = Path(module.__file__).read_text()
    planted = source.replace(right, wrong)
    if planted == source:
        raise LookupError(f"{fault}: {Path(module.__file__).name} must have the text {right!r}: plant the fault anew")
    return module, planted


@pytest.mark.parametrize("fault", PLANTED)
def test_every_fault_has_its_place_in_a_kernel(fault):
    module, planted = plant(fault)
    before = ast.dump(ast.parse(Path(module.__file__).read_text()))
    assert ast.dump(ast.parse(planted)) != before, "a comment alone differs"


def test_a_fault_without_a_place_is_an_error(monkeypatch):
    monkeypatch.setitem(PLANTED, "gone", (forward, "a text that no kernel has", "pass", run_attention))
    with pytest.raises(LookupError, match="gone: forward.py must have the text 'a text that no kernel has'"):
        plant("gone")


@under_ttsem
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault, generator, monkeypatch, tmp_path):
    module, source = plant(fault)
    path = tmp_path / "planted.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.planted", path)
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, getattr(planted, name))
    try:
        error = largest_error(*PLANTED[fault][-1](generator))
    except Exception as stopped:
        if type(stopped).__name__ != "KernelFault":  # the class of the ttsem that is the main program
            raise
        print(f"{fault}: {stopped.fault.kind}")
    else:
        assert error > 1e-3, "nobody noticed"
        print(f"{fault}: in its values, by {error:.1g}")
