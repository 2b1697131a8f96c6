"""Spectral-normed layers as other code bases have them, written from their description for several tests."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Parameter


class OneVector:
    """What BigGAN-PyTorch, mmgeneration and mimicry share: u (1, R), iterated but not stored in evaluation."""

    U, SIGMA = "u0", "sv0"
    transpose = False

    def keep(self, rows, eps=1e-12, iterations=1):
        self.eps, self.num_itrs, self.num_iters = eps, iterations, iterations
        self.register_buffer(self.U, torch.randn(1, rows))
        self.register_buffer(self.SIGMA, torch.ones(1))

    def normalised(self):
        matrix = self.weight.flatten(1)
        u = getattr(self, self.U)
        with torch.no_grad():
            for _ in range(self.num_itrs):
                v = F.normalize(u @ matrix, eps=self.eps)
                u = F.normalize(v @ matrix.t(), eps=self.eps)
        sigma = (v @ matrix.t() @ u.t()).squeeze()
        if self.training:
            getattr(self, self.U)[:] = u
            getattr(self, self.SIGMA)[:] = sigma.detach()
        return self.weight / sigma


class BigGANConv(nn.Conv2d, OneVector):
    def __init__(self, *args, num_svs=1, eps=1e-12, iterations=1, **options):
        super().__init__(*args, **options)
        self.num_svs = num_svs
        self.keep(self.out_channels, eps, iterations)

    def W_(self):  # noqa: N802
        return self.normalised()

    def forward(self, x):
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding)


class BigGANLinear(nn.Linear, OneVector):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.keep(self.out_features)

    def W_(self):  # noqa: N802
        return self.normalised()

    def forward(self, x):
        return F.linear(x, self.W_(), self.bias)


class BigGANEmbedding(nn.Embedding, OneVector):
    def __init__(self, *args):
        super().__init__(*args)
        self.keep(self.num_embeddings)

    def W_(self):  # noqa: N802
        return self.normalised()

    def forward(self, y):
        return F.embedding(y, self.W_())


class MmgenConv(nn.Conv2d, OneVector):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.keep(self.out_channels)

    def sn_weight(self):
        return self.normalised()

    def forward(self, x):
        return F.conv2d(x, self.sn_weight(), self.bias, self.stride, self.padding)


class MimicryConv(nn.Conv2d, OneVector):
    U, SIGMA = "sn_u", "sn_sigma"

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.keep(self.out_channels)

    def sn_weights(self):
        return self.normalised()

    def forward(self, x):
        return F.conv2d(x, self.sn_weights(), self.bias, self.stride, self.padding)


class Wrapped(nn.Module):
    """A wrapper that makes W, u and v Parameters of the wrapped layer and moves u and v in evaluation too."""

    def __init__(self, module, name="weight", power_iterations=1):
        super().__init__()
        self.module, self.name, self.power_iterations = module, name, power_iterations
        weight = module._parameters.pop(name)
        for end, size in (("_u", weight.shape[0]), ("_v", weight[0].numel())):
            vector = F.normalize(torch.randn(size, dtype=weight.dtype), dim=0)
            module.register_parameter(name + end, Parameter(vector, requires_grad=False))
        module.register_parameter(name + "_bar", Parameter(weight.data))

    def _update_u_v(self):
        u, v, weight = (getattr(self.module, self.name + end) for end in ("_u", "_v", "_bar"))
        matrix = weight.flatten(1)
        for _ in range(self.power_iterations):
            v.data = F.normalize(matrix.data.t() @ u.data, dim=0)
            u.data = F.normalize(matrix.data @ v.data, dim=0)
        setattr(self.module, self.name, weight / u.dot(matrix.mv(v)))

    def forward(self, *args):
        self._update_u_v()
        return self.module.forward(*args)


class HookWithU:
    """A forward pre-hook that keeps u alone, sets the buffer `weight`, and moves u in evaluation too."""

    def __init__(self, name):
        self.name = name

    def compute_weight(self, module):
        weight, u = getattr(module, self.name + "_orig"), getattr(module, self.name + "_u")
        matrix = weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(matrix.t() @ u, dim=0)
            u = F.normalize(matrix @ v, dim=0)
        return weight / (u @ matrix @ v), u

    def __call__(self, module, inputs):
        weight, u = self.compute_weight(module)
        setattr(module, self.name, weight)
        setattr(module, self.name + "_u", u)


def hooked(module, name="weight"):
    weight = module._parameters.pop(name)
    module.register_parameter(name + "_orig", weight)
    module.register_buffer(name, weight.data)
    module.register_buffer(name + "_u", torch.randn(weight.shape[0], dtype=weight.dtype))
    module.register_forward_pre_hook(HookWithU(name))
    return module


def replica_of(model, change):
    """What nn.parallel.replicate makes of `model`, on the CPU: parameters changed by `change`, buffers shared."""
    places = {id(m): m._replicate_for_data_parallel() for m in model.modules()}
    for source in model.modules():
        replica = places[id(source)]
        replica._former_parameters = {}
        for key, child in source._modules.items():
            replica._modules[key] = places[id(child)]
        for key, parameter in source._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                replica._parameters.pop(key, None)
                setattr(replica, key, change(parameter))
    return places[id(model)]
