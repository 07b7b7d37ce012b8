"""Decoding: the half of BPETokenizer that works on ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .call_arguments import checked_ids
from .model import Model
from .streaming import StreamDecoder


class Decoding:
    """What BPETokenizer does with ids; see there."""

    __slots__ = ()

    _model: Model
    _backend: str
    _made_encoder: Any
    _made_decoder: Any

    @property
    def model(self) -> Model:
        """The data of this tokenizer."""
        return self._model

    @property
    def _decoder(self) -> Any:
        raise NotImplementedError

    def decode(
        self, ids: Any, *, errors: str = "replace", skip_special_tokens: bool = False
    ) -> str:
        """The text of ids.

        Args:
            ids: list, array or tensor of ints, one-dimensional.
            errors: for bytes that are not UTF-8: "strict", "replace" or "ignore".
            skip_special_tokens: leave out special tokens.

        Raises:
            ValueError: an id is not in the vocabulary; names it and its place.
            UnicodeDecodeError: the bytes are not UTF-8 and errors is "strict".
        """
        if errors not in ("strict", "replace", "ignore"):
            raise ValueError(f'errors must be "strict", "replace" or "ignore", got {errors!r}')
        ids = self._clean_ids(ids, skip_special_tokens)
        text = self._decoder.decode(ids, errors)
        # In the char mode the marker is the space between words: there is none before the first.
        return text[1:] if self._model.mode == "char" and text[:1] == " " else text

    def decode_bytes(self, ids: Any, *, skip_special_tokens: bool = False) -> bytes:
        """The bytes of ids: as `decode`, for text that need not be UTF-8."""
        raw = self.raw_bytes(self._clean_ids(ids, skip_special_tokens))
        return raw[1:] if self._model.mode == "char" and raw[:1] == b" " else raw

    def raw_bytes(self, ids: Any) -> bytes:
        """The bytes of ids as they stand in the middle of a text: a first marker is a space too."""
        return self._decoder.decode_bytes(self._clean_ids(ids, False))

    def decode_batch(self, batch: Iterable[Any], **options: Any) -> list[str]:
        """`decode` for each of several sequences of ids."""
        return [self.decode(ids, **options) for ids in batch]

    def stream_decoder(self, *, errors: str = "replace") -> StreamDecoder:
        """A decoder for ids that come one by one; see `StreamDecoder`."""
        return StreamDecoder(self, errors=errors)

    def _clean_ids(self, ids: Any, skip: bool) -> Any:
        model = self._model
        return checked_ids(ids, model.size, model.left_out if skip else ())
