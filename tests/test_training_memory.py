"""Peak memory of training the reference models: a fifth of the textbook's or less."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

STEP = """
import sys, torch
from training_peers import reference_models
from lmfast.models.textbook import textbook_loss
from lmfast.training.memory import peak_bytes, resident_bytes

kind, whose = sys.argv[1:]
ids = torch.randint(1, 32011, (128, 30))
x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

def learn(vocab_size, x, y):
    ours, textbook, _ = reference_models(kind, vocab_size, 29)
    model = ours if whose == "lmfast" else textbook
    del ours, textbook, _
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=whose == "lmfast")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the optimiser's state, as all steps but the first find it
    optimizer.zero_grad(set_to_none=True)
    loss = model.loss(x, y) if whose == "lmfast" else textbook_loss(model, x, y, -100)
    loss.backward()
    optimizer.step()

learn(64, x[:2] % 64, y[:2] % 64)  # what the libraries themselves take
before = resident_bytes()
learn(32011, x, y)
print((peak_bytes() - before) >> 20)
"""


def megabytes(kind: str, whose: str) -> int:
    path = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    # Without glibc's caching of large blocks the peak is what is in use.
    settings = {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", STEP, kind, whose],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.parametrize("kind", ["decoder", "recurrent"])
def test_a_fifth_of_the_textbook(kind):
    """Everything counts: parameters, gradients, the optimiser's state, activations."""
    ours, textbook = megabytes(kind, "lmfast"), megabytes(kind, "textbook")
    assert 5 * ours <= textbook, (ours, textbook)
