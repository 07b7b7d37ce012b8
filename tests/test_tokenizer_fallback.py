"""A process that cannot load the compiled engine gives the same answers."""

from __future__ import annotations

import json
import subprocess
import sys

from tokenizer_support import ODD_TEXTS, needs_engine

from lmfast.tokenizer import BPETokenizer

CODE = """
import json, sys
sys.modules["lmfast._bpe"] = None
sys.path[:0] = json.loads(sys.argv[1])
from test_tokenizer_fallback import answers
from lmfast.tokenizer import BPETokenizer
from lmfast.tokenizer.backend import engine
try:
    engine("cpu")
except ImportError as error:
    print(json.dumps({"reason": str(error), "answers": answers()}))
"""


def answers() -> list:
    """What training, encoding and decoding give, by whatever engine there is."""
    found = []
    texts = [text[:150] for text in ODD_TEXTS]
    for mode, pattern in (("byte", "gpt2"), ("byte", "o200k"), ("byte", None), ("char", "words")):
        options = {"mode": mode, "pattern": pattern, "tie_break": "ids"}
        tokenizer = BPETokenizer.train(
            texts, 330, special_tokens=["<unk>", "<|end|>"], unk_token="<unk>", **options
        )
        found.append([list(map(repr, pair)) for pair in tokenizer.merges])
        for text in [*texts, "a<|end|> b", "\ud83d x"]:
            ids, spans = tokenizer.offsets(text)
            assert tokenizer.count(text) == len(ids)
            found.append([ids, [list(span) for span in spans], tokenizer.decode(ids)])
            found.append(tokenizer.encode(text, dropout=0.4, seed=3))
        found.append([row.tolist() for row in tokenizer.encode_batch(texts)])
        found.append(tokenizer.encode(b"ab \xff\xfe cd"))
    return found


@needs_engine
def test_without_the_compiled_engine():
    path = json.dumps([p for p in (*sys.path, __file__.rpartition("/")[0]) if p])
    result = subprocess.run(
        [sys.executable, "-c", CODE, path], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    got = json.loads(result.stdout)
    assert "the compiled tokenizer engine is absent" in got["reason"]
    assert got["answers"] == json.loads(json.dumps(answers()))
