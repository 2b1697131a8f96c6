import pytest
import torch

from sagan_fast.kernels.spectral_norm import stacks
from sagan_fast.kernels.spectral_norm.addresses import NOWHERE
from sagan_fast.kernels.spectral_norm.stacks import stack_of, stacked_addresses, stacked_tables
from sagan_fast.kernels.spectral_norm.tables import is_dense_stack, matrices_of, shape_of

ARE_STACKS = [False, True, True]


def inputs(dtype=torch.float32):
    tensors = [torch.ones(4, 8), torch.ones(5, 3, 7), torch.ones(2, 4, 2, 3, 3)]
    us = [torch.ones(4), torch.ones(5, 3), torch.ones(2, 4)]
    vs = [torch.ones(8), torch.ones(5, 7), torch.ones(2, 18)]
    return [tensor.to(dtype) for tensor in tensors], us, vs


def matrices(tensors):
    return [one for each, is_stack in zip(tensors, ARE_STACKS, strict=True) for one in matrices_of(each, is_stack)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_matrix_of_a_stack_is_where_its_view_is(dtype):
    tensors, us, vs = inputs(dtype)
    stacked = stacked_tables(tensors, ARE_STACKS, False)
    table = stacked_addresses(stacked, tensors, us, vs)
    for column, some in enumerate((tensors, us, vs)):
        assert table[:, column].tolist() == [each.data_ptr() for each in matrices(some)]
    # 21 elements: every fourth, or eighth, matrix starts at a multiple of 16 bytes
    assert stacked.tables.layout.shapes == tuple(shape_of(each) for each in matrices(tensors))


def test_matrices_alone_need_no_other_table_and_a_missing_tensor_is_nowhere():
    tensors = inputs()[0][:1]
    assert stacked_tables(tensors, [False], False).places is None
    tensors, _, _ = inputs()
    stacked = stacked_tables(tensors, ARE_STACKS, False)
    nothing = [None] * 3
    assert stacked_addresses(stacked, tensors, nothing, nothing)[0, 1] == NOWHERE.value


def test_tables_belong_to_shapes_and_not_to_addresses(monkeypatch):
    first = stacked_tables(inputs()[0], ARE_STACKS, False)
    assert stacked_tables(inputs()[0], ARE_STACKS, False) is first
    assert stacked_tables(inputs()[0], ARE_STACKS, True) is not first
    monkeypatch.setattr(stacks, "is_capturing", lambda device: True)
    assert stacked_tables(inputs()[0], ARE_STACKS, False) is first
    assert first in stacks._captured.values(), "a graph reads them at every replay"


def test_a_stack_is_read_where_it_lies_only_if_its_matrices_follow_each_other():
    stack = torch.ones(4, 3, 6)
    assert is_dense_stack(stack, True) and is_dense_stack(stack[1:2], True) and is_dense_stack(stack[0], False)
    assert not is_dense_stack(stack[::2], True) and not is_dense_stack(stack.transpose(1, 2), True)
    assert not is_dense_stack(stack.transpose(0, 1), True)
    assert stack_of(stack, True)[:5] == (4, 3, 6, 6, 1) and stack_of(stack[0], False).number == 1
