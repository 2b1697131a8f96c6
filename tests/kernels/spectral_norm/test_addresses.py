import torch

from sagan_fast.kernels.spectral_norm import addresses
from sagan_fast.kernels.spectral_norm.addresses import NOWHERE, addresses_of


def of(count):
    return [torch.ones(3) for _ in range(count)]


def test_more_than_one_launch_carries_and_a_missing_tensor_is_nowhere():
    grads, weights = of(19), of(19)
    table = addresses_of([None, *grads[1:]], weights)
    assert table.shape == (19, 2) and table[0, 0] == NOWHERE.value
    assert table[1:, 0].tolist() == [grad.data_ptr() for grad in grads[1:]]
    assert table[:, 1].tolist() == [weight.data_ptr() for weight in weights]


def test_found_again_while_nothing_moved_and_written_again_when_it_did():
    weights = of(3)
    first = addresses_of(weights)
    assert addresses_of(weights) is first
    weights[1] = weights[1].clone()
    assert addresses_of(weights)[1, 0] == weights[1].data_ptr()


def test_a_capture_writes_its_own(monkeypatch):
    weights = of(3)
    first = addresses_of(weights)
    monkeypatch.setattr(addresses, "is_capturing", lambda device: True)
    captured = addresses_of(weights)
    assert captured is not first and torch.equal(captured, first)
    monkeypatch.undo()
    assert addresses_of(weights) is first


def test_only_so_many_are_kept_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(addresses, "_written", addresses.OrderedDict())
    monkeypatch.setattr(addresses, "MAX_WRITTEN", 2)
    lists = [of(1) for _ in range(3)]
    first, second = (addresses_of(some) for some in lists[:2])
    assert addresses_of(lists[0]) is first
    addresses_of(lists[2])
    assert addresses_of(lists[0]) is first and addresses_of(lists[1]) is not second


def test_129_separately_normalised_layers_write_once(monkeypatch):
    written = []
    write = addresses._write
    monkeypatch.setattr(addresses, "_write", lambda *arguments: written.append(1) or write(*arguments))
    layers = [(of(1), of(1), of(1)) for _ in range(129)]
    for _ in range(3):
        for layer in layers:
            addresses_of(*layer)
    assert len(written) == 129
