"""The operators: one public function each, several implementations behind it.

Every function takes ``backend=`` and is differentiable wherever its formula is. ``lmfast.explain``
says which implementation a call would use. DTensors, whole and divided, are taken as PyTorch's own
operators take them (`lmfast/_sharding.py` says what runs without an exchange between processes).
"""

import lmfast.ops._gpu  # noqa: F401  (registers implementations)
from lmfast._dispatch import read_variable
from lmfast.ops.add_rms_norm import add_rms_norm
from lmfast.ops.additive_attention import additive_attention
from lmfast.ops.attention import attention
from lmfast.ops.cached_attention import cached_attention
from lmfast.ops.cross_entropy import cross_entropy
from lmfast.ops.decode_attention import decode_attention
from lmfast.ops.elman_rnn import elman_rnn
from lmfast.ops.geglu import geglu
from lmfast.ops.gru import gru
from lmfast.ops.linear import linear
from lmfast.ops.linear_cross_entropy import linear_cross_entropy
from lmfast.ops.linear_recurrence import linear_recurrence
from lmfast.ops.lora_linear import lora_linear
from lmfast.ops.lstm import lstm
from lmfast.ops.quantised_linear import quantise_weight, quantised_linear
from lmfast.ops.rms_norm import rms_norm
from lmfast.ops.rope import rope
from lmfast.ops.rope_append import rope_append
from lmfast.ops.rope_tables import rope_tables
from lmfast.ops.sample import sample
from lmfast.ops.selected_log_probs import selected_log_probs
from lmfast.ops.swiglu import swiglu

read_variable()

__all__ = [
    "add_rms_norm",
    "additive_attention",
    "attention",
    "cached_attention",
    "cross_entropy",
    "decode_attention",
    "elman_rnn",
    "geglu",
    "gru",
    "linear",
    "linear_cross_entropy",
    "linear_recurrence",
    "lora_linear",
    "lstm",
    "quantise_weight",
    "quantised_linear",
    "rms_norm",
    "rope",
    "rope_append",
    "rope_tables",
    "sample",
    "selected_log_probs",
    "swiglu",
]
