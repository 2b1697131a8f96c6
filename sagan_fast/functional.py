"""The flat functional API: every op of sagan_fast as one function of tensors."""

from sagan_fast.ops.attention import attention
from sagan_fast.ops.self_attention import self_attention_2d
from sagan_fast.ops.spectral_norm import spectral_norm_group

__all__ = ["attention", "self_attention_2d", "spectral_norm_group"]
