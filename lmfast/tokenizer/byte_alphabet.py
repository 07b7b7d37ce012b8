"""GPT-2's printable stand-ins for bytes, in which its files and Hugging Face's are written."""

from __future__ import annotations

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [b for b in range(256) if b not in set(_PRINTABLE)]

# Printable bytes stand for themselves, the others for U+0100 and up. In this order the alphabet
# gets its ids: by code point of the stand-in.
BYTE_ORDER = (*_PRINTABLE, *_OTHERS)
BYTE_TO_CHAR = {
    **{b: chr(b) for b in _PRINTABLE},
    **{b: chr(0x100 + i) for i, b in enumerate(_OTHERS)},
}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def to_stand_ins(token: bytes) -> str:
    """b" the" -> "Ġthe"."""
    return "".join(BYTE_TO_CHAR[b] for b in token)


def from_stand_ins(token: str) -> bytes:
    """ "Ġthe" -> b" the"; KeyError for a character that stands for no byte."""
    return bytes(CHAR_TO_BYTE[c] for c in token)
