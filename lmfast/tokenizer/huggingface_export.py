"""Writing tokenizers for the Hugging Face libraries."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from .byte_alphabet import CHAR_TO_BYTE, from_stand_ins, to_stand_ins
from .huggingface import SEPARATORS
from .model import Model
from .patterns import PUBLISHED
from .reference import apply_merges


def check_stand_ins(model: Model) -> None:
    """ValueError for a special token spelled like another token's stand-in characters.

    A vocabulary of stand-ins has one name for both, such as "é" for the byte 0xE9.
    """
    if model.mode == "char":
        return
    for text in model.special_tokens:
        if all(c in CHAR_TO_BYTE for c in text):
            token = from_stand_ins(text)
            if token in model.ids and token != text.encode():
                raise ValueError(
                    f"the special token {text!r} is the name of the token {token!r} in a "
                    "vocabulary of stand-in characters; choose another"
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
    """A tokenizers.Tokenizer that encodes the same."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    except ImportError as error:
        needs = "to_huggingface needs the tokenizers package: pip install tokenizers"
        raise ImportError(needs) from error

    check_stand_ins(model)
    if model.mode == "char":
        name = {id: (token or b"").decode() for id, token in enumerate(model.tokens)}
        decoder: Any = decoders.Metaspace(model.marker, prepend_scheme="always", split=False)
    else:
        name = {id: to_stand_ins(token or b"") for id, token in enumerate(model.tokens)}
        decoder = decoders.ByteLevel()
    doubled = [
        re.escape(text.encode())
        for text, id in model.special_tokens.items()
        if model.mode == "char"
        or (model.ids.get(text.encode(), id) != id and to_stand_ins(text.encode()) == text)
    ]
    if doubled:
        # The text of a special token is matched before merging: tokens that hold it never occur.
        special = re.compile(b"|".join(doubled))
        name = {
            id: "" if special.search(model.tokens[id] or b"") else text for id, text in name.items()
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
    if model.normalizer:
        forms = [getattr(normalizers, form)() for form in model.normalizer]
        tokenizer.normalizer = forms[0] if len(forms) == 1 else normalizers.Sequence(forms)
    tokenizer.pre_tokenizer = _pre_tokenizer(model)
    tokenizer.decoder = decoder
    for text, _ in sorted(model.special_tokens.items(), key=lambda item: item[1]):
        flags = model.token_flags.get(text, ())
        options = {f: f in flags for f in ("normalized", "lstrip", "rstrip", "single_word")}
        alone = text not in model.ordinary
        add = tokenizer.add_special_tokens if alone else tokenizer.add_tokens
        add([AddedToken(text, special=alone, **options)])
    if model.post_processor is None:
        return tokenizer
    document = {
        **json.loads(tokenizer.to_str()),
        "post_processor": json.loads(model.post_processor),
    }
    return Tokenizer.from_str(json.dumps(document))


def _pre_tokenizer(model: Model) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if model.mode == "char":
        split = pre_tokenizers.Split(Regex(SEPARATORS[str(model.pattern)]), "removed")
        space = pre_tokenizers.Metaspace(model.marker, prepend_scheme="always", split=False)
        return pre_tokenizers.Sequence([split, space])
    patterns = model.pattern if isinstance(model.pattern, tuple) else (model.pattern,)
    own = patterns[-1] == "gpt2"
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
    splits = [
        pre_tokenizers.Split(Regex(PUBLISHED.get(pattern, pattern)), "isolated")
        for pattern in patterns[: len(patterns) - own]
        if pattern is not None
    ]
    return pre_tokenizers.Sequence([*splits, level]) if splits else level
