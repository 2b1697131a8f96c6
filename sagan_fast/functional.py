"""The flat functional API: every op of sagan_fast as one function of tensors."""

from sagan_fast.ops.attention import attention
from sagan_fast.ops.batch_norm import conditional_batch_norm
from sagan_fast.ops.self_attention import self_attention_2d
from sagan_fast.ops.spectral_norm import spectral_norm_group
from sagan_fast.ops.spectral_norms import scale_spectral_norms_, spectral_norms

__all__ = [
    "attention",
    "conditional_batch_norm",
    "scale_spectral_norms_",
    "self_attention_2d",
    "spectral_norm_group",
    "spectral_norms",
]
