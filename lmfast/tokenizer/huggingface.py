"""Tokenizers of the Hugging Face libraries, both ways."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from .byte_alphabet import to_stand_ins
from .formats import pairs_to_model, read_json
from .model import Model, make_merges
from .patterns import PUBLISHED
from .reference import apply_merges

_SEPARATORS = {"words": r"[\s\x1c-\x1f]+", "lines": r"[\r\n]+"}


def _document(source: Any) -> tuple[dict[str, Any], str]:
    """The tokenizer.json content of whatever was given, and a name for messages."""
    source = getattr(source, "backend_tokenizer", source)
    if isinstance(source, os.PathLike):
        document, name = read_json(source), os.fspath(source)
    elif isinstance(source, str) and source.lstrip().startswith("{"):
        document, name = json.loads(source), "tokenizer.json"
    elif isinstance(source, str):
        document, name = read_json(source), source
    elif hasattr(source, "to_str"):
        document, name = json.loads(source.to_str()), type(source).__name__
    else:
        raise TypeError(
            "source must be a path, the text of a tokenizer.json, a tokenizers.Tokenizer or a "
            f"transformers fast tokenizer, got {type(source).__name__}"
        )
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ValueError(f"{name}: not a tokenizer.json, it has no model")
    return document, name


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part.get("type") == "Sequence" else [part]


def _split_regex(step: dict[str, Any], behaviors: tuple[str, ...], name: str) -> str:
    pattern = step.get("pattern", {})
    if step.get("invert") or step.get("behavior") not in behaviors or "Regex" not in pattern:
        raise ValueError(f"{name}: this Split has no counterpart: {step}")
    return pattern["Regex"]


def _added_tokens(document: dict[str, Any], name: str) -> dict[str, int]:
    specials = {}
    for token in document.get("added_tokens") or []:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise ValueError(f"{name}: the added token {token['content']!r} has {flag}")
        specials[token["content"]] = token["id"]
    return specials


def read(source: Any) -> Model:
    """A model from a tokenizer.json in any form."""
    document, name = _document(source)
    model = document["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{name}: the model is {model.get('type')}, only BPE can be read")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ValueError(f"{name}: the model has {key}={model[key]!r}, which is not supported")
    if document.get("normalizer") is not None:
        raise ValueError(f"{name}: the normalizer {document['normalizer']} is not supported")
    pairs = []
    for index, merge in enumerate(model.get("merges", [])):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2:
            raise ValueError(f"{name}: merge {index} must be a pair, got {merge!r}")
        pairs.append((parts[0], parts[1]))
    specials = _added_tokens(document, name)
    steps = _steps(document.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if kinds == ["Split", "Metaspace"]:
        return _read_characters(model, pairs, steps, specials, name)
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(
            f"{name}: the pre-tokenizer {' + '.join(map(str, kinds))} is not supported"
        )
    level = steps[-1]
    if level.get("add_prefix_space"):
        raise ValueError(f"{name}: ByteLevel has add_prefix_space, which is not supported")
    own = level.get("use_regex", True)
    if own and len(steps) == 2:
        raise ValueError(f"{name}: ByteLevel has use_regex after a Split, which is not supported")
    pattern: str | None = "gpt2" if own else None
    if len(steps) == 2:
        pattern = _split_regex(steps[0], ("Isolated",), name)
    return pairs_to_model(
        model["vocab"],
        pairs,
        pattern=pattern,
        special_tokens=specials,
        name=name,
        whole_piece=bool(model.get("ignore_merges")),
    )


def _read_characters(model, pairs, steps, specials, name: str) -> Model:
    """The form that `build` gives the char mode."""
    separator = _split_regex(steps[0], ("Removed",), name)
    pattern = next((p for p, regex in _SEPARATORS.items() if regex == separator), None)
    if pattern is None or steps[1].get("split", True) or model.get("fuse_unk"):
        raise ValueError(f"{name}: this Split and Metaspace have no counterpart")
    vocab = model["vocab"]
    for index, pair in enumerate(pairs):
        for part in (*pair, "".join(pair)):
            if part not in vocab:
                raise ValueError(
                    f"{name}: merge {index} {pair} needs the token {part!r}, which is not in the "
                    "vocabulary"
                )
    tokens: list[bytes | None] = [None] * (1 + max([*vocab.values(), *specials.values()]))
    for token, id in vocab.items():
        if token not in specials:
            tokens[id] = token.encode()
    return Model(
        mode="char",
        pattern=pattern,
        tokens=tuple(tokens),
        merges=make_merges([(vocab[a], vocab[b], vocab[a + b]) for a, b in pairs]),
        special_tokens=specials,
        marker=steps[1]["replacement"],
        unk=model.get("unk_token"),
    )


def canonical_pairs(model: Model) -> list[tuple[int, int, int]]:
    """One (left, right, new) per merged token, in rank order.

    Where a rank has several pairs (tiktoken), the pair is the one left when the token itself is
    merged by the ranks below its own; a token for which more than two parts are left has none and
    is reached as a whole piece only.
    """
    if len(np.unique(model.merges[:, 3])) == len(model.merges):
        return [(a, b, new) for a, b, new, _ in model.merges.tolist()]
    pairs = []
    ranks: dict[tuple[int, int], tuple[int, int]] = {}
    pending: dict[tuple[int, int], tuple[int, int]] = {}
    symbols = model.symbols()
    last = None
    for left, right, new, rank in model.merges.tolist():
        if rank != last:
            ranks.update(pending)
            pending.clear()
            token = model.tokens[new] or b""
            parts = apply_merges([symbols[b] for b in token], ranks)
            if len(parts) == 2:
                pairs.append((parts[0], parts[1], new))
            last = rank
        pending[left, right] = rank, new
    return pairs


def build(model: Model) -> Any:
    """A tokenizers.Tokenizer that encodes the same (with ``add_special_tokens=False``)."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if model.mode == "char":
        name = {id: (token or b"").decode() for id, token in enumerate(model.tokens)}
        split = pre_tokenizers.Split(Regex(_SEPARATORS[model.pattern or "words"]), "removed")
        space = pre_tokenizers.Metaspace(model.marker, prepend_scheme="always", split=False)
        before: Any = pre_tokenizers.Sequence([split, space])
        decoder: Any = decoders.Metaspace(model.marker, prepend_scheme="always", split=False)
    else:
        name = {id: to_stand_ins(token or b"") for id, token in enumerate(model.tokens)}
        before = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=model.pattern == "gpt2")
        if model.pattern not in (None, "gpt2"):
            regex = Regex(PUBLISHED.get(model.pattern, model.pattern))
            split = pre_tokenizers.Split(regex, "isolated")
            before = pre_tokenizers.Sequence([split, before])
        decoder = decoders.ByteLevel()
    if model.mode == "char":
        # The text of a special token is matched before merging: tokens that hold it never occur.
        name = {
            id: "" if any(special in text for special in model.special_tokens) else text
            for id, text in name.items()
        }
    name.update({id: text for text, id in model.special_tokens.items()})
    vocab = {text: id for id, text in name.items() if text}
    pairs = [(name[a], name[b], new) for a, b, new in canonical_pairs(model)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(a, b) for a, b, new in pairs if name[new]],
            unk_token=model.unk,
            ignore_merges=model.whole_piece,
        )
    )
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text, _ in sorted(model.special_tokens.items(), key=lambda item: item[1])
        ]
    )
    return tokenizer
