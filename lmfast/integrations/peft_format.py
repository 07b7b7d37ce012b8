"""Low-rank updates as `peft` saves them: adapter_config.json and adapter_model.safetensors.

Only the files are read and written; `peft` itself is not needed.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmfast.training import low_rank_sites as sites
from lmfast.training.files import CheckpointError
from lmfast.training.low_rank import LoRA, attach

_PREFIX = "base_model.model."
# Entries that change what an adapter computes, and the values under which they do not.
_MUST_BE_OFF: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None,),
}
# Of the ways to begin an adapter, those that change the model's own matrices as well.
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_peft(adapter: LoRA, directory: str | Path, *, base_model: str | None = None) -> None:
    """Write updates of linear layers as `peft` reads them.

    Args:
        adapter: from `lmfast.training.lora`.
        directory: made if absent.
        base_model: name or path of the model, for those who load the adapter.

    Raises:
        ValueError: an update is of a packed projection or a bare parameter, which `peft` does not
            know: there is no linear layer it could find.
        OSError: the directory cannot be written.
    """
    updates = adapter.updates()
    modules = dict(adapter.model.named_modules())
    other = [name for name in updates if name not in modules]
    if other:
        raise ValueError(f"{other[0]} is no linear layer, and peft knows no other updates: save()")
    tensors: dict[str, Tensor] = {}
    for name, parameter in adapter.named_parameters():
        layer, _, factor = name.rpartition(".")
        key = f"{_PREFIX}{layer}.lora_{factor}.weight"
        tensors[key] = parameter.detach().cpu().t().contiguous()
    first = next(iter(updates.values()))
    transposed = {not isinstance(modules[name], nn.Linear) for name in updates}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.scale * first.rank,
        "rank_pattern": {n: u.rank for n, u in updates.items() if u.rank != first.rank},
        "alpha_pattern": {
            n: u.scale * u.rank
            for n, u in updates.items()
            if u.scale * u.rank != first.scale * first.rank
        },
        "target_modules": list(updates),
        "lora_dropout": adapter.dropout,
        "fan_in_fan_out": transposed == {True},
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2)
    (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def load_peft(directory: str | Path, model: nn.Module) -> LoRA:
    """Put an adapter that `peft` saved on a model without updates.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        model: of the kind the adapter was trained on, with the same names of layers.

    Returns:
        The updates, ready to train on or to merge.

    Raises:
        CheckpointError: a file is missing or damaged, an entry asks for something else than
            low-rank updates of linear layers, or the layers are not those of the model.
    """
    directory = Path(directory)
    config = _config(directory / "adapter_config.json")
    try:
        tensors = load_file(directory / "adapter_model.safetensors")
    except Exception as error:
        raise CheckpointError(f"{directory}/adapter_model.safetensors: {error}") from error
    factors: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.endswith(".base_layer.weight"):
            _check_own(key, value, model, directory)
            continue
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight", key)
        if match is None:
            raise CheckpointError(f"{directory}: {key} is no factor of a low-rank update")
        factors[f"{match[1]}.{match[2]}"] = value.t()
    wanted: dict[sites.Site, tuple[int, float]] = {}
    try:
        for name in (key[:-2] for key in factors if key.endswith(".A")):
            rank = factors[f"{name}.A"].shape[1]
            alpha = _of_layer(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
            by = math.sqrt(rank) if config.get("use_rslora") else rank
            wanted[sites.named(model, name)] = (rank, float(alpha) / by)
        adapter = attach(model, wanted, float(config.get("lora_dropout") or 0.0))
        try:
            adapter.load_tensors(factors)
        except ValueError:
            adapter.remove()
            raise
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{directory} does not fit this model: {error}") from error
    return adapter


def _check_own(key: str, value: Tensor, model: nn.Module, directory: Path) -> None:
    """CheckpointError for a matrix of the model that `peft` saved too, if it is another one."""
    name = key.removeprefix(_PREFIX).removesuffix(".base_layer.weight")
    own = dict(model.named_parameters(remove_duplicate=False)).get(f"{name}.weight")
    if own is None or own.shape != value.shape or not torch.equal(own.detach().cpu(), value):
        raise CheckpointError(
            f"{directory} holds the matrix {name} of the model it was trained on, and the model's "
            "is another"
        )


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise CheckpointError(f"{path}: peft_type must be LORA, got {found!r}")
    for name, off in _MUST_BE_OFF.items():
        if config.get(name) not in off:
            raise CheckpointError(f"{path}: {name} = {config[name]!r} is not supported")
    begin = config.get("init_lora_weights")
    if isinstance(begin, str) and begin.startswith(_CHANGES_THE_MODEL):
        raise CheckpointError(
            f"{path}: init_lora_weights = {begin!r} changed the model's matrices: have peft save "
            "it as a plain update (path_initial_model_for_weight_conversion)"
        )
    return config


def _of_layer(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value for a layer: keys are regular expressions that match the end of its name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
