"""Calls everything that the _bpe module binds: what the tokenizer does with it, and what it never
does, from argument lists drawn at random.

As a program: with a JSON list of import paths, the first of which has a _bpe built with sanitizers,
the second the lmfast folder. Nothing of torch is imported: the process starts in a second, and no
other library is instrumented.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import types

if __name__ == "__main__":
    sys.path[:0] = json.loads(sys.argv[1])
    import _bpe

    package = types.ModuleType("lmfast")
    package.__path__ = [f"{sys.path[1]}/lmfast"]
    package._extension = types.ModuleType("lmfast._extension")
    package._extension.bpe = types.SimpleNamespace(module=_bpe, reason=None)
    sys.modules["lmfast"], sys.modules["lmfast._extension"] = package, package._extension

import numpy as np
from tokenizer_support import ODD_TEXTS, every_category

from lmfast.tokenizer import BPETokenizer, count_words
from lmfast.tokenizer.backend import engine
from lmfast.tokenizer.patterns import SCANNERS

module = engine("cpu")
TEXTS = [*ODD_TEXTS, every_category(2), "a\ud83d\ude00\udc00 b\ud83d", "é\xff" * 3000]
RAW = [b"", b"\xff", b"ab \xe2\x82", b"\xf0\x9f\x98 \xc0\xaf", bytes(range(256)) * 3]


def answers() -> str:
    """A digest of what the module gives for every kind of tokenizer."""
    digest = hashlib.sha256()
    for mode, pattern in (
        ("byte", "gpt2"),
        ("byte", "o200k"),
        ("byte", None),
        ("byte", r"\w+|\s"),
        ("char", "words"),
        ("char", "lines"),
    ):
        options = {"mode": mode, "pattern": pattern, "special_tokens": ["<unk>", "<|end|>"]}
        for tie_break in ("first", "ids", "lexicographic"):
            tokenizer = BPETokenizer.train(TEXTS, 330, tie_break=tie_break, **options)
            digest.update(repr(tokenizer.merges).encode())
        for answer in calls(tokenizer):
            digest.update(repr(answer).encode())
    return digest.hexdigest()


def calls(tokenizer: BPETokenizer):
    for text in [*TEXTS, "a<|end|> b <unk>"]:
        ids = tokenizer.encode(text)
        yield ids
        yield tokenizer.encode_numpy(text).tolist()
        yield tokenizer.count(text)
        yield tokenizer.offsets(text)
        yield tokenizer.encode(text[:200], dropout=0.5, seed=1)
        yield tokenizer.decode(ids), tokenizer.decode_bytes(np.array(ids, dtype=np.uint32))
    for raw in RAW:
        yield tokenizer.encode(raw)
        if tokenizer.mode == "byte":
            yield [tokenizer.decode(tokenizer.encode(raw), errors=e) for e in ("replace", "ignore")]
    yield [row.tolist() for row in tokenizer.encode_batch([*TEXTS, *RAW], threads=3)]
    yield [row.tolist() for row in tokenizer.encode_batch([])]
    yield sorted(tokenizer.segmentations(TEXTS[:9]).items())


def compare_levels() -> None:
    """Every instruction set cuts and encodes alike."""
    tokenizer = BPETokenizer.train(TEXTS, 400, pattern="cl100k")
    specials = tokenizer._all_specials.matcher
    for level in module.levels():
        encoder = tokenizer._make_encoder(level=level)
        for text in TEXTS:
            assert encoder.encode(text, specials) == tokenizer.encode(text)
            for code in range(len(SCANNERS)):
                assert module.pieces(text, code, level) == module.pieces(text, code, "scalar")


def count_and_stop() -> None:
    """Counting on threads, sums of counts, and a callback that raises."""
    many = [text + "\n" for text in TEXTS] * 200
    whole = count_words(many, threads=3)
    assert dict(whole) == dict(count_words(many, threads=1))
    assert dict(whole) == dict(count_words(many[:99]) + count_words(many[99:]))

    class Stop(Exception):
        pass

    def stop(done: int, wanted: int) -> None:
        raise Stop

    try:
        BPETokenizer.train(whole, 3000, progress=stop)
    except Stop:
        return
    raise AssertionError("the exception of a callback got lost")


def random_calls(runs: int) -> int:
    """Every bound function with arguments of any type and value: it answers or raises."""
    draw = random.Random(1)
    specials = module.Specials([("<s>", 0), ("ab<", 1)])
    tokens = [bytes([b]) for b in range(256)] + [b"ab"]
    merge = np.array([[97, 98, 256, 0]], dtype=np.int32)
    symbols = np.arange(256, dtype=np.int32)
    encoder = module.Encoder(4, False, False, -1, -1, tokens, symbols, merge, specials)
    decoder = module.Decoder(tokens, [False] * 257)
    right = {
        module.set_character_classes: (b"\x08",),
        module.valid_prefix: (b"ab\xff",),
        module.pieces: ("a b", 4, "default"),
        module.level: (),
        module.levels: (),
        module.Specials: ([("<s>", 0)],),
        module.Decoder: (tokens, [False] * 257),
        decoder.decode: ([97, 256], "strict"),
        decoder.decode_bytes: (np.array([97, 256], dtype=np.int32),),
        decoder.first_unknown: ([97, 256],),
        module.Encoder: (4, False, False, -1, -1, tokens, symbols, merge, specials, None),
        encoder.encode_text: ("abab <s>",),
        encoder.encode: ("abab <s>", specials, None),
        encoder.encode_array: ("abab <s>", specials, None),
        encoder.count: ("abab <s>", specials),
        encoder.encode_dropout: ("abab <s>", specials, None, 0.5, 7),
        encoder.encode_batch: (["abab", b"<s>"], specials, 2),
        module.Counter: (4,),
    }
    learn = (list(range(256)), "_", 256, 1, 9, 0, 0, 256, {b"ab": 3}, None)
    odd = [None, True, -1, 0, 3, 255, 256, 10**30, 0.5, float("nan"), "", "ab \ud800", b"", b"\xff"]
    odd += [[], [None], [b"ab"], ["ab"], [1, 2], [-1], [2**40], {}, {b"a": 1}, (), object()]
    odd += [np.zeros((2, 4), np.int32), np.arange(3), np.arange(3.0), np.array(["a"]), specials]
    odd += [np.array([1, 2, 9**9], np.int64), np.arange(6, dtype=np.int32)[::2], encoder, tokens]
    seen = 0
    for _ in range(runs):
        counter = module.Counter(draw.randrange(len(SCANNERS)))
        counter.add_texts(["ab ab", b"abc", "é"], 2)
        every = {
            **right,
            counter.add_texts: (["ab abc", b"x"], 2, 0),
            counter.add_words: ([b"ab"], [3]),
            counter.items: (),
            counter.__len__: (),
            module.learn: (counter, *learn),
        }
        for function, arguments in every.items():
            given = list(arguments)
            for _ in range(draw.randrange(3)):
                if given:
                    given[draw.randrange(len(given))] = draw.choice(odd)
            if draw.random() < 0.05:
                given = draw.choices(odd, k=draw.randrange(4))
            try:
                function(*given)
            except (TypeError, ValueError, OverflowError, MemoryError, RuntimeError):
                seen += 1
        # Whatever was asked for, what is right still works.
        assert encoder.encode("abab <s>", specials) == [256, 256, 32, 0]
        assert decoder.decode([97, 256], "strict") == "aab"
    kinds = (module, module.Encoder, module.Decoder, module.Counter)
    bound = {name for kind in kinds for name in dir(kind) if not name.startswith("_")}
    called = {function.__name__ for function in every}
    assert bound <= called, f"not called: {sorted(bound - called)}"
    return seen


if __name__ == "__main__":
    assert module is _bpe
    compare_levels()
    count_and_stop()
    refused = random_calls(int(sys.argv[2]) if len(sys.argv) > 2 else 300)
    print(f"{refused} calls refused")
    print(f"the answers of {module.__file__}: {answers()}")
