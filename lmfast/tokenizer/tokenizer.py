"""BPETokenizer: the public class over the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from . import formats, huggingface, huggingface_export, training
from .backend import engine
from .call_arguments import check_text
from .encoding import Coding
from .engine_tables import decoder_tables, encoder_tables
from .model import Model
from .patterns import Pattern, scanner_code
from .template import NOTHING
from .training_arguments import TrainingOptions, checked_counts, is_one, whole

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "unk": ("<unk>", "[UNK]", "<UNK>", "<|unk|>"),
    "bos": ("<bos>", "<s>", "[BOS]", "<|startoftext|>", "<|begin_of_text|>"),
    "eos": ("<eos>", "</s>", "[EOS]", "<|endoftext|>", "<|end_of_text|>"),
}


class BPETokenizer(Coding):
    """Byte-pair encoding: trains, encodes and decodes; immutable and usable from any thread.

    Two modes: ``"byte"`` cuts text by a pattern and merges bytes, lossless for any text, as GPT-2
    and tiktoken do; ``"char"`` splits at whitespace, puts a marker before each word and merges
    characters, as the textbooks do.

    The compiled engine remembers the ids of pieces: each thread that encodes at the same time as
    others has a cache of 8 MB, which grows to at most 96 MB on texts of many distinct words.

    Args:
        model: tokens, merges and rules. Use `train`, `load` or a `from_...` method to get one.
        backend: "auto", "cpu" (the compiled engine) or "reference" (Python, the same answers).

    Example:
        >>> from lmfast import BPETokenizer
        >>> t = BPETokenizer.train(["low low lower"], 8, mode="char")
        >>> t.decode(t.encode("low lower"))
        'low lower'
    """

    __slots__ = (
        "_all_specials",
        "_backend",
        "_encode_text",
        "_engine",
        "_framed",
        "_made_decoder",
        "_made_encoder",
        "_model",
        "_no_specials",
        "_scans",
    )

    def __init__(self, model: Model, *, backend: str = "auto") -> None:
        if not isinstance(model, Model):
            raise TypeError(
                f"model must be a Model, got {type(model).__name__}; see train and load"
            )
        self._keep(_model=model, _backend=backend, _engine=engine(backend))
        self._keep(
            _all_specials=self._make_allowed(model.special_tokens),
            _no_specials=self._make_allowed({}),
            _scans=scanner_code(model.pattern) is not None and model.plain_tokens,
            _framed=model.template is not NOTHING,
            _made_encoder=None,
            _made_decoder=None,
            _encode_text=None,
        )

    def _keep(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, *_: Any) -> None:
        raise AttributeError(f"a BPETokenizer is immutable: {name!r} stays as it was made")

    __delattr__ = __setattr__

    # Engines are built when first used. Two threads may build equal ones; one of them is kept.
    @property
    def _encoder(self) -> Any:
        if self._made_encoder is None:
            encoder = self._make_encoder()
            self._keep(_made_encoder=encoder)
            if self._scans and not self._model.normalizer:
                self._keep(_encode_text=encoder.encode_text)
        return self._made_encoder

    def _make_encoder(self, **level: str) -> Any:
        tables = encoder_tables(self._model)
        return self._engine.Encoder(*tables, self._all_specials.matcher, **level)

    @property
    def _decoder(self) -> Any:
        if self._made_decoder is None:
            self._keep(_made_decoder=self._engine.Decoder(*decoder_tables(self._model)))
        return self._made_decoder

    # Making one ------------------------------------------------------------------------------

    @overload
    @classmethod
    def train(
        cls, corpus: training.Corpus, vocab_size: int, **options: Unpack[TrainingOptions]
    ) -> BPETokenizer: ...

    @overload
    @classmethod
    def train(
        cls, corpus: training.Corpus, vocab_size: Sequence[int], **options: Unpack[TrainingOptions]
    ) -> list[BPETokenizer]: ...

    @classmethod
    def train(
        cls,
        corpus: training.Corpus,
        vocab_size: int | Sequence[int],
        *,
        mode: str = "byte",
        pattern: str | None = "default",
        special_tokens: Sequence[str] | None = None,
        min_frequency: int = 0,
        max_token_length: int | None = None,
        tie_break: str = "first",
        marker: str = training.MARKER,
        unk_token: str = "<unk>",
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        backend: str = "auto",
    ) -> BPETokenizer | list[BPETokenizer]:
        """Learn merges: again and again join the most frequent pair of neighbouring symbols.

        Args:
            corpus: a str or bytes (one text), a path (read in blocks of a few MB; whole where the
                pattern is a regular expression or None; unpacked if gzip, bzip2 or xz), an iterable
                of those, or a mapping of words to counts, see `count_words`.
            vocab_size: number of ids to reach. In the byte mode special tokens and the 256 bytes
                count; in the char mode symbols and merges count and special tokens come on top, so
                that the merges are the textbook loop's. A sequence gives a list of tokenizers, one
                per size, from one run.
            mode: "byte" or "char".
            pattern: "gpt2" (the byte mode's default), "cl100k", "o200k", "llama3", "whitespace",
                any regular expression (needs the regex package), or None: no splitting. In the
                char mode "words" (the default) or "lines".
            special_tokens: their ids come first, in this order. The char mode's default is
                "<pad>", "<unk>", "<bos>", "<eos>", the byte mode's is none.
            min_frequency: stop when no pair is as frequent.
            max_token_length: learn only tokens of fewer symbols than this; pairs of two single
                symbols are exempt (the rule of Hugging Face).
            tie_break: among pairs of equal count "first" takes the one met first in the corpus,
                "ids" the smallest (left id, right id), which is Hugging Face's rule,
                "lexicographic" the smallest (left, right) strings.
            marker: the character put before each word (char mode). A text that holds it does not
                survive decoding.
            unk_token: which special token stands for unknown characters (char mode).
            threads: for counting; None takes all CPUs. The result does not depend on it.
            progress: called with (merges done, merges wanted) now and then.
            backend: "auto", "cpu" or "reference".

        Returns:
            A BPETokenizer, or a list of them for several sizes.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or out of range; names it.
            ImportError: the pattern needs the regex package.

        Backends:
            cpu: vectorised counting, incremental merging. reference: the recounting loop.

        Source:
            Gage 1994; Sennrich, Haddow and Birch 2016 (arXiv 1508.07909).

        Example:
            >>> from lmfast import BPETokenizer
            >>> t = BPETokenizer.train(["aaaa aaa aa"], 6, mode="char", marker="_")
            >>> t.merges
            [('a', 'a'), ('_', 'aa'), ('_aa', 'aa'), ('_aa', 'a')]
        """
        models = training.train_models(
            corpus,
            vocab_size,
            mode=mode,
            pattern=pattern,
            special_tokens=special_tokens,
            min_frequency=min_frequency,
            max_token_length=max_token_length,
            tie_break=tie_break,
            marker=marker,
            unk_token=unk_token,
            threads=threads,
            progress=progress,
            backend=backend,
        )
        tokenizers = [cls(model, backend=backend) for model in models]
        return tokenizers[0] if is_one(vocab_size) else tokenizers

    count_words = staticmethod(training.count_words)

    @classmethod
    def load(cls, path: str | os.PathLike, *, backend: str = "auto") -> BPETokenizer:
        """Read a file written by `save`. Raises ValueError naming the entry that is wrong."""
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path must be a str or os.PathLike, got {path!r}")
        return cls(formats.load_json(path), backend=backend)

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer as one JSON file: text only, versioned, the same on every machine."""
        formats.save_json(self._model, path)

    @classmethod
    def from_gpt2(
        cls,
        encoder_json: str | os.PathLike,
        vocab_bpe: str | os.PathLike,
        *,
        pattern: str | None = "gpt2",
        special_tokens: Sequence[str] | None = None,
        backend: str = "auto",
    ) -> BPETokenizer:
        """Read GPT-2's two files: vocabulary (JSON) and merges (one pair per line).

        Args:
            encoder_json: token in stand-in characters -> id. Entries that are neither a byte nor
                made by a merge become special tokens.
            vocab_bpe: merges; lines that begin with "#version" are skipped.
            pattern: how text is split.
            special_tokens: take these entries as special, instead of all that no merge makes.
            backend: as for the class.
        """
        model = formats.read_gpt2(encoder_json, vocab_bpe, pattern, special_tokens)
        return cls(model, backend=backend)

    @classmethod
    def from_tiktoken(
        cls,
        ranks: str | os.PathLike | dict[bytes, int],
        *,
        pattern: str | None,
        special_tokens: dict[str, int] | None = None,
        backend: str = "auto",
    ) -> BPETokenizer:
        """Read a .tiktoken file (base64 token, space, rank) or take ranks from a dict.

        Args:
            ranks: path or dict.
            pattern: "gpt2", "cl100k", "o200k", or the encoding's regular expression.
            special_tokens: text -> id.
            backend: as for the class.
        """
        return cls(formats.read_tiktoken(ranks, pattern, special_tokens), backend=backend)

    @classmethod
    def from_huggingface(cls, source: Any, *, backend: str = "auto") -> BPETokenizer:
        """Take over a ``tokenizer.json`` (path or text), a ``tokenizers.Tokenizer`` or a
        transformers fast tokenizer: byte-level BPE, or one written by `to_huggingface`.

        Normalizers (NFC, NFD, NFKC, NFKD), pre-tokenizers (Split, Digits, Punctuation, ByteLevel),
        added tokens with all their flags and post-processors work as there.

        Raises:
            ValueError: the tokenizer has a part that has no counterpart here; names it.
        """
        return cls(huggingface.read(source), backend=backend)

    def to_huggingface(self) -> Any:
        """A ``tokenizers.Tokenizer`` that encodes the same. Needs the tokenizers package."""
        return huggingface_export.build(self._model)

    @property
    def backend(self) -> str:
        """Which engine works: "cpu" or "reference"."""
        return "reference" if self._engine.__name__.endswith("reference") else "cpu"

    @property
    def mode(self) -> str:
        """How it cuts texts: "byte" or "char"."""
        return self._model.mode

    @property
    def pattern(self) -> Pattern:
        """What cuts a text into pieces: a name, a regular expression, or None."""
        return self._model.pattern

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return self._model.size

    def __len__(self) -> int:
        return self._model.size

    @property
    def merges(self) -> list[tuple[Any, Any]]:
        """The merges in order, as pairs of str (char mode) or bytes (byte mode)."""
        text = [self._model.text_of(id) or b"" for id in range(self._model.size)]
        pairs = [(text[left], text[right]) for left, right, _, _ in self._model.merges.tolist()]
        if self.mode == "char":
            return [(left.decode(), right.decode()) for left, right in pairs]
        return pairs

    def segmentations(self, corpus: training.Corpus) -> dict[tuple[Any, ...], int]:
        """How the merges cut the words of a corpus, and how often each of these occurs.

        Args:
            corpus: as for `train`; words counted with other patterns are refused.

        Returns:
            Tuple of tokens (str in the char mode, marker in front, else bytes) -> count.

        Example:
            >>> words = ["aaaa aaa aa"]
            >>> BPETokenizer.train(words, 5, mode="char", marker="_").segmentations(words)
            {('_aaaa',): 1, ('_aa', 'a'): 1, ('_aa',): 1}
        """
        counts = corpus if isinstance(corpus, Mapping) else None
        if counts is None:
            counts = training.count_words(
                corpus, mode=self.mode, pattern=self.pattern, backend=self._backend
            )
        text = [self._model.text_of(id) or b"" for id in range(self._model.size)]
        names: list[Any] = [t.decode() for t in text] if self.mode == "char" else text
        found: dict[tuple[Any, ...], int] = {}
        for word, count in zip(*checked_counts(counts, self.mode, self.pattern)):
            key = tuple(names[id] for id in self._merge_piece(word))
            found[key] = found.get(key, 0) + count
        return found

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of the special tokens."""
        return dict(self._model.special_tokens)

    def _named(self, name: str) -> int | None:
        specials = self._model.special_tokens
        if name == "unk" and self._model.unk is not None:
            return specials[self._model.unk]
        return next((specials[text] for text in _NAMES[name] if text in specials), None)

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, None if there is none."""
        return self._named("pad")

    @property
    def unk_id(self) -> int | None:
        """Id of the token that stands for unknown characters, None if there is none."""
        return self._named("unk")

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, None if there is none."""
        return self._named("bos")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, None if there is none."""
        return self._named("eos")

    def token_to_id(self, token: str | bytes) -> int | None:
        """Id of a token or special token; None if it is neither."""
        check_text(token, "token")
        if isinstance(token, str) and token in self._model.special_tokens:
            return self._model.special_tokens[token]
        return self._model.ids.get(token.encode() if isinstance(token, str) else token)

    def id_to_token(self, id: int) -> bytes | None:
        """The bytes of an id, as stored (with the marker); None for an unused id."""
        return self._model.text_of(whole("id", id, 0, self._model.size - 1))

    def __repr__(self) -> str:
        return (
            f"BPETokenizer(mode={self.mode!r}, vocab_size={self.vocab_size}, "
            f"pattern={self.pattern!r}, backend={self.backend!r})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BPETokenizer):
            return NotImplemented
        return formats.to_document(self._model) == formats.to_document(other._model)

    def __hash__(self) -> int:
        return hash((self._model.mode, self._model.pattern, self._model.tokens))

    def __reduce__(self):
        return _rebuild, (formats.to_document(self._model), self._backend, type(self))


def _rebuild(document: dict[str, Any], backend: str, kind: Any = BPETokenizer) -> BPETokenizer:
    return kind(formats.from_document(document), backend=backend)
