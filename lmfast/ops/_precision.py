"""What float32 products may be rounded to, by whichever of PyTorch's two settings was used.

``torch.set_float32_matmul_precision`` sets all libraries at once. ``torch.backends.<library>...
.fp32_precision`` sets one, and once it was used the common setting cannot be read: PyTorch raises.
"""

from __future__ import annotations

import torch


def bf16_products_allowed() -> bool:
    """Whether the CPU's kernels may round the factors of float32 products to bf16."""
    # A compiled graph keeps the answer; torch traces it again when the setting goes to or from
    # "highest", which it guards on.
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:
        return torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]


# What torch.compiler.assume_constant_result sets; that function would import all of the compiler
# with this module, which takes longer than torch itself.
bf16_products_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tf32_products_allowed() -> bool:
    """Whether float32 products on a GPU may be TF32's."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
