"""LMFastTokenizer: a BPETokenizer with the interface of transformers' tokenizers.

Padding, truncation, chat templates, special tokens and saving come from transformers; splitting and
merging from the engine.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizer

from lmfast.tokenizer import BPETokenizer
from lmfast.tokenizer.byte_alphabet import CHAR_TO_BYTE, from_stand_ins, to_stand_ins
from lmfast.tokenizer.huggingface_export import check_stand_ins

_FILE = "lmfast_tokenizer.json"
_MARK = 1 << 40  # beyond every id


class LMFastTokenizer(PreTrainedTokenizer):
    """A transformers tokenizer over `lmfast.BPETokenizer`.

    Args:
        vocab_file: a file written by `BPETokenizer.save`; `from_pretrained` gives it.
        tokenizer: a BPETokenizer, instead of a file.
        kwargs: those of transformers, such as pad_token, padding_side, model_max_length and
            chat_template. The names of padding, unknown, begin and end tokens are taken from the
            tokenizer's special tokens unless given.

    Raises:
        TypeError: neither a file nor a tokenizer was given, or both.
        ValueError: a special token is spelled like another token's stand-in characters.

    Example:
        >>> from lmfast import BPETokenizer
        >>> from lmfast.integrations.transformers_tokenizer import LMFastTokenizer
        >>> t = LMFastTokenizer(tokenizer=BPETokenizer.train(["a b"], 5, mode="char"))
        >>> t(["a", "a b"], padding=True)["attention_mask"]
        [[1, 0], [1, 1]]
    """

    vocab_files_names = {"vocab_file": _FILE}  # noqa: RUF012, transformers' own class attribute
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        *,
        tokenizer: BPETokenizer | None = None,
        **kwargs: Any,
    ) -> None:
        if (vocab_file is None) == (tokenizer is None):
            raise TypeError("give either vocab_file or tokenizer")
        if tokenizer is None:
            tokenizer = BPETokenizer.load(vocab_file or "")
        self.bpe: BPETokenizer = tokenizer
        model = self.bpe.model
        check_stand_ins(model)
        special = {id: text for text, id in model.special_tokens.items()}
        stand_in = to_stand_ins if model.mode == "byte" else _as_text
        self._names = [
            special.get(id) or stand_in(token or b"") or f"<unused {id}>"
            for id, token in enumerate(model.tokens)
        ]
        self._ids = {name: id for id, name in enumerate(self._names)}
        # A merge may have made the text of a special token: the name means the special one.
        self._ids.update(model.special_tokens)
        for name in ("pad", "unk", "bos", "eos"):
            id = getattr(self.bpe, f"{name}_id")
            if id is not None:
                kwargs.setdefault(f"{name}_token", special[id])
        named = {str(kwargs.get(f"{name}_token")) for name in ("pad", "unk", "bos", "eos")}
        kwargs.setdefault(
            "extra_special_tokens", [t for t in model.special_tokens if t not in named]
        )
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Ids of the BPETokenizer; tokens added later come on top."""
        return self.bpe.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, in printable stand-ins for bytes as GPT-2 has them."""
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        names = self._names
        return [
            names[id]
            for id in self.bpe.encode(text, disallowed_special=(), add_special_tokens=False)
        ]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token, self.bpe.unk_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index]

    def _encode_plus(
        self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any
    ) -> BatchEncoding:
        # A batch comes back here text by text.
        if not kwargs.get("return_offsets_mapping") or not isinstance(text, str):
            return super()._encode_plus(text, text_pair, *args, **kwargs)
        return_tensors = kwargs.pop("return_tensors", None)
        # Truncation, special tokens and padding happen to marks, which say what is left where.
        first = self._spans(text)
        places = first + (self._spans(text_pair) if text_pair else [])
        marks = list(range(_MARK, _MARK + len(places)))
        encoded = super()._encode_plus(
            marks[: len(first)] or text,  # an empty list would be an empty batch
            marks[len(first) :] or text_pair,
            *args,
            **kwargs,
        )
        encoded["offset_mapping"] = [
            places[mark - _MARK][1] if mark >= _MARK else (0, 0) for mark in encoded["input_ids"]
        ]
        for key in ("input_ids", "overflowing_tokens"):
            if key in encoded:
                encoded[key] = [
                    places[mark - _MARK][0] if mark >= _MARK else mark for mark in encoded[key]
                ]
        return BatchEncoding(
            dict(encoded), tensor_type=return_tensors, prepend_batch_axis=return_tensors is not None
        )

    def _spans(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """(id, characters) of each token of a text."""
        found: list[tuple[int, tuple[int, int]]] = []
        at = 0
        for part in self.tokens_trie.split(text):
            if part in self.added_tokens_encoder:
                found.append((self.added_tokens_encoder[part], (at, at + len(part))))
            else:
                ids, spans = self.bpe.offsets(part, disallowed_special=(), add_special_tokens=False)
                found += [(id, (at + a, at + b)) for id, (a, b) in zip(ids, spans)]
            at += len(part)
        if [id for id, _ in found] != self.convert_tokens_to_ids(self.tokenize(text)):
            raise ValueError(
                "return_offsets_mapping cannot follow added tokens that strip spaces or stand only "
                "for single words; add them without lstrip, rstrip and single_word"
            )
        return found

    def _pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        padded = super()._pad(encoded_inputs, *args, **kwargs)
        spans = padded.get("offset_mapping")
        if spans is not None:
            fill = [(0, 0)] * (len(padded["input_ids"]) - len(spans))
            left = (kwargs.get("padding_side") or self.padding_side) == "left"
            padded["offset_mapping"] = fill + spans if left else spans + fill
        return padded

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens."""
        if self.bpe.mode == "char":
            text = "".join(tokens).replace(self.bpe.model.marker, " ")
            return text[1:] if text.startswith(" ") else text
        raw = b"".join(
            from_stand_ins(token)
            if token not in self.bpe.special_tokens and all(c in CHAR_TO_BYTE for c in token)
            else token.encode()
            for token in tokens
        )
        return raw.decode("utf-8", "replace")

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if any(id >= self.vocab_size for id in ids) or clean_up_tokenization_spaces:
            return super()._decode(ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)
        if skip_special_tokens:
            special = set(self.all_special_ids)
            ids = [id for id in ids if id not in special]
        return self.bpe.decode(ids)

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the tokenizer's file; called by save_pretrained."""
        os.makedirs(save_directory, exist_ok=True)
        name = f"{filename_prefix}-{_FILE}" if filename_prefix else _FILE
        path = os.path.join(save_directory, name)
        self.bpe.save(path)
        return (path,)


def _as_text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
