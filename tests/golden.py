"""Tensors with known contents, from which the golden numbers of the tests were derived."""

import torch


def fill(n, shape, s=0.3):
    """Element i in row-major order is s * sin(0.7 i + n), in float64."""
    count = 1
    for size in shape:
        count *= size
    values = s * torch.sin(0.7 * torch.arange(count, dtype=torch.float64) + n)
    return values.reshape(shape)


def golden_decoder_state(names_and_shapes):
    """Fill the parameters in the order of their sorted names; scales around 1, row 0 padding."""
    state = {}
    for n, name in enumerate(sorted(names_and_shapes)):
        value = fill(n, names_and_shapes[name])
        state[name] = 1 + value if name.endswith("scale") else value
    state["embedding.weight"][0] = 0
    return state
