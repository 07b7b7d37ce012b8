"""Recurrent layers as the standard RNN, LSTM and GRU nodes of ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmfast.nn.elman import ElmanRNN
from lmfast.nn.textbook_gru import TextbookGRU
from lmfast.nn.textbook_weights import elman_to_torch

# Our rows of gates in the order of ONNX: LSTM i, f, g, o to i, o, f, c; GRU r, z, n to z, r, h.
_ORDERS = {"RNN": (0,), "LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


def export_onnx(
    module: nn.RNNBase | ElmanRNN,
    path: str | Path,
    *,
    sequence_lens: bool = False,
    initial_state: bool = True,
    opset: int = 17,
) -> None:
    """Write a recurrent layer as an ONNX model of one standard node per layer.

    Inputs: `x`, (T, B, D) or (B, T, D) as the layer takes it; with `initial_state` `h0`
    (L directions, B, H) and for an LSTM `c0`; with `sequence_lens` an int32 (B,) of that name.
    Outputs: `y`, `h_n` and for an LSTM `c_n`, as the layer returns them; y is zero behind a row's
    length. B and T are left open.

    Args:
        module: an `lmfast.nn` or `torch.nn` RNN, LSTM or GRU, a `TextbookGRU` or an `ElmanRNN`
            (with batch first), in float32. What is written is inference: without dropout.
        path: of the file to write.
        sequence_lens: whether lengths are an input.
        initial_state: whether states are inputs; else they are zeros.
        opset: version of the operators, 14 or later.

    Raises:
        TypeError: another module.
        ValueError: projections, or another dtype than float32.
        ImportError: the package onnx is not installed.

    Source: the operators RNN, LSTM and GRU of the ONNX specification.

    Example:
        >>> import lmfast, tempfile
        >>> path = tempfile.mkdtemp() + "/lstm.onnx"
        >>> lmfast.nn.export_onnx(lmfast.nn.LSTM(3, 4), path)  # doctest: +SKIP
    """
    layer = _as_torch_layer(module)
    try:
        import onnx
    except ImportError as error:
        raise ImportError("export_onnx needs the package onnx: pip install onnx") from error
    graph = _Graph(layer, sequence_lens, initial_state).build()
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], producer_name="lmfast"
    )
    # The oldest format that has these operators, so that older runtimes read the file.
    model.ir_version = 8
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _as_torch_layer(module: object) -> nn.RNNBase:
    if isinstance(module, ElmanRNN):
        layer: nn.RNNBase = nn.RNN(
            module.emb_dim, module.emb_dim, module.num_layers, batch_first=True
        )
        layer.load_state_dict(elman_to_torch(module))
    elif isinstance(module, nn.RNNBase):
        layer = module
    else:
        raise TypeError(
            f"module must be an RNN, LSTM, GRU, TextbookGRU or ElmanRNN, "
            f"got {type(module).__name__}"
        )
    if layer.proj_size:
        raise ValueError(f"proj_size must be 0, ONNX has no projections; got {layer.proj_size}")
    dtype = next(layer.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(f"module must be in float32, got {dtype}")
    return layer


class _Graph:
    """Collects the nodes and constants of one layer stack."""

    def __init__(self, layer: nn.RNNBase, sequence_lens: bool, initial_state: bool) -> None:
        from onnx import TensorProto, helper, numpy_helper

        self.helper, self.types, self.numpy = helper, TensorProto, numpy_helper
        self.layer = layer
        self.sequence_lens, self.initial_state = sequence_lens, initial_state
        self.kind = "LSTM" if layer.mode == "LSTM" else "GRU" if layer.mode == "GRU" else "RNN"
        self.states = ("h", "c") if self.kind == "LSTM" else ("h",)
        self.directions = 2 if layer.bidirectional else 1
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def build(self) -> Any:
        """Return the graph."""
        layer = self.layer
        x = "x"
        if layer.batch_first:
            x = self._node("Transpose", [x], "x_by_time", perm=[1, 0, 2])
        given = {s: self._state_parts(s) for s in self.states}
        finals: dict[str, list[str]] = {s: [] for s in self.states}
        for index in range(layer.num_layers):
            y, last = self._layer(index, x, [given[s][index] for s in self.states])
            for s, name in zip(self.states, last):
                finals[s].append(name)
            # [T, directions, B, H] to [T, B, directions H]
            y = self._node("Transpose", [y], f"y{index}_by_row", perm=[0, 2, 1, 3])
            shape = self._constant("joined", torch.tensor([0, 0, -1]))
            x = self._node("Reshape", [y, shape], f"y{index}_joined")
        if layer.batch_first:
            self._node("Transpose", [x], "y", perm=[1, 0, 2])
        else:
            self._node("Identity", [x], "y")
        for s in self.states:
            self._node("Concat", finals[s], f"{s}_n", axis=0)
        return self.helper.make_graph(
            self.nodes, self.kind.lower(), self._inputs(), self._outputs(), self.constants
        )

    def _layer(self, index: int, x: str, given: list[str]) -> tuple[str, list[str]]:
        suffixes = [f"_l{index}", f"_l{index}_reverse"][: self.directions]
        weights = [self._gates(f"weight_{which}", suffixes) for which in ("ih", "hh")]
        names = [self._constant(f"{which}{index}", w) for which, w in zip(("W", "R"), weights)]
        bias = ""
        if self.layer.bias:
            both = torch.cat([self._gates(f"bias_{which}", suffixes) for which in ("ih", "hh")], 1)
            bias = self._constant(f"B{index}", both)
        attributes: dict[str, Any] = {"hidden_size": self.layer.hidden_size}
        attributes["direction"] = "bidirectional" if self.directions == 2 else "forward"
        if self.kind == "RNN":
            activation = "Relu" if self.layer.mode == "RNN_RELU" else "Tanh"
            attributes["activations"] = [activation] * self.directions
        if self.kind == "GRU":
            attributes["linear_before_reset"] = 0 if isinstance(self.layer, TextbookGRU) else 1
        lengths = "sequence_lens" if self.sequence_lens else ""
        outputs = [f"Y{index}", *(f"Y_{s}{index}" for s in self.states)]
        inputs = [x, *names, bias, lengths, *given]
        while inputs[-1] == "":
            inputs.pop()
        node = self.helper.make_node(self.kind, inputs, outputs, name=f"layer{index}", **attributes)
        self.nodes.append(node)
        return outputs[0], outputs[1:]

    def _gates(self, name: str, suffixes: list[str]) -> Tensor:
        """(directions, G H, ...) with the gates in ONNX's order."""
        found = []
        for suffix in suffixes:
            parts = list(getattr(self.layer, name + suffix).detach().chunk(len(_ORDERS[self.kind])))
            if isinstance(self.layer, TextbookGRU):
                parts[1] = -parts[1]  # its z takes in the new state, ONNX's keeps the old one
            found.append(torch.cat([parts[i] for i in _ORDERS[self.kind]]))
        return torch.stack(found)

    def _state_parts(self, state: str) -> list[str]:
        """The name of each layer's part of an initial state; empty where it is zeros."""
        layers = self.layer.num_layers
        if not self.initial_state:
            return [""] * layers
        if layers == 1:
            return [f"{state}0"]
        names = [f"{state}0_layer{i}" for i in range(layers)]
        sizes = self._constant("parts", torch.full((layers,), self.directions))
        self.nodes.append(self.helper.make_node("Split", [f"{state}0", sizes], names, axis=0))
        return names

    def _inputs(self) -> list[Any]:
        layer = self.layer
        batch_time = ["B", "T"] if layer.batch_first else ["T", "B"]
        inputs = [self._value("x", [*batch_time, layer.input_size])]
        if self.initial_state:
            inputs += [self._value(f"{s}0", self._state_shape()) for s in self.states]
        if self.sequence_lens:
            inputs.append(self._value("sequence_lens", ["B"], self.types.INT32))
        return inputs

    def _outputs(self) -> list[Any]:
        batch_time = ["B", "T"] if self.layer.batch_first else ["T", "B"]
        y = self._value("y", [*batch_time, self.directions * self.layer.hidden_size])
        return [y, *(self._value(f"{s}_n", self._state_shape()) for s in self.states)]

    def _state_shape(self) -> list[Any]:
        return [self.layer.num_layers * self.directions, "B", self.layer.hidden_size]

    def _value(self, name: str, shape: list[Any], kind: int | None = None) -> Any:
        return self.helper.make_tensor_value_info(name, kind or self.types.FLOAT, shape)

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _constant(self, name: str, value: Tensor) -> str:
        if all(c.name != name for c in self.constants):
            self.constants.append(self.numpy.from_array(value.contiguous().cpu().numpy(), name))
        return name
