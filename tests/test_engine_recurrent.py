"""Recurrent models in the engine: equal to the model they were packed from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmfast import Generator, QuantisedWeights, quantise
from lmfast.generation.engine import CannotPack, make_engine
from lmfast.generation.engine.cell_forward import CellForward
from lmfast.generation.engine.cells import recurrent_plan
from lmfast.generation.module_runner import ModuleRunner
from lmfast.models import RecurrentLanguageModel
from lmfast.nn.stack import CELLS
from lmfast.ops._rounding import quantise_groups, quantise_rows

pytestmark = pytest.mark.usefixtures("needs_cpu_kernels")

V = 101


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The operators of models this small are faster alone, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(cell: str, width: int = 44, **options) -> RecurrentLanguageModel:
    torch.manual_seed(2)
    model = RecurrentLanguageModel(V, width, 2, 0, cell=cell, **options)
    with torch.no_grad():
        for p in model.parameters():  # gates and biases away from where they start
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def ids_of(batch: int, steps: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, V, (batch, steps), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tied", [False, True])
def test_engine_is_the_model(cell: str, tied: bool, cpu_isa: str) -> None:
    model = model_of(cell, tie_weights=tied)
    runner = make_engine(model)
    exact = RecurrentLanguageModel(**model.options).double()
    exact.load_state_dict(model.state_dict())
    state, own, plain = exact.new_state(3), runner.new_state(3), model.new_state(3)
    ids = ids_of(3, 9)
    for step in range(25):
        with torch.no_grad():
            expected, state = exact.step(ids, state)
            theirs, plain = model.step(ids, plain)
        found, own = runner.step(ids, own)
        error = (found - expected).abs().max()
        # Two layers of sums over 44 products, tanh and sigmoid within 2 ulp, through up to 34
        # steps; the modules have 1e-6 to 4e-6.
        assert error < 1e-5, f"step {step}"
        assert error <= 4 * (theirs - expected).abs().max() + 1e-6
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(own.tensor.double(), state, rtol=0, atol=1e-5)
        ids = expected.argmax(-1)[:, None]


@pytest.mark.parametrize("cell", CELLS)
def test_ragged_rows_pieces_and_all_positions(cell: str, cpu_isa: str) -> None:
    model = model_of(cell)
    runner = make_engine(model)
    ids, lengths = ids_of(12, 11), torch.tensor([11, 3, 0, 8, 1, 2, 11, 7, 5, 4, 10, 9])
    start = torch.randn(runner.new_state(12).tensor.shape) * 0.3
    together = runner.new_state(12)
    together.tensor.copy_(start)
    everywhere, _ = runner.step(ids, together, lengths, all_positions=True)
    again = runner.new_state(12)
    again.tensor.copy_(start)
    last, _ = runner.step(ids, again, lengths)
    assert torch.equal(again.tensor, together.tensor)
    for row, n in enumerate(lengths.tolist()):
        assert not everywhere[row, n:].any()
        alone = runner.new_state(1)
        alone.tensor.copy_(start[:, row : row + 1])
        for t in range(n):
            logits, alone = runner.step(ids[row : row + 1, t : t + 1], alone)
            torch.testing.assert_close(everywhere[row, t], logits[0], rtol=0, atol=3e-6)
        torch.testing.assert_close(together.tensor[:, row], alone.tensor[:, 0], rtol=0, atol=3e-6)
        if n:
            assert torch.equal(last[row], everywhere[row, n - 1])
        else:
            assert torch.equal(together.tensor[:, row], start[:, row])


@pytest.mark.parametrize("cell", CELLS)
def test_greedy_runs_are_single_steps(cell: str) -> None:
    runner = make_engine(model_of(cell))
    for batch in (1, 10):
        logits, state = runner.step(ids_of(batch, 6), runner.new_state(batch))
        other = state.fork()
        first = now = logits.argmax(-1)
        start = state.fork()
        expected = []
        for _ in range(40):
            logits, other = runner.step(now[:, None], other)
            now = logits.argmax(-1)
            expected.append(now)
        found: list[torch.Tensor] = []
        now = first
        while len(found) < 40:
            found += runner.greedy(now, state, min(17, 40 - len(found))).unbind()
            now = found[-1]
        assert torch.equal(torch.stack(found), torch.stack(expected))
        assert torch.equal(state.tensor, other.tensor)
        stop = int(expected[20][-1])
        until = next(i for i, t in enumerate(expected) if (t == stop).any()) + 1
        run = runner.greedy(first, start, 40, [stop])
        assert len(run) == until
        assert torch.equal(run, torch.stack(expected[:until]))


@pytest.mark.parametrize(
    ("weights", "group"), [("bf16", None), ("int8", None), ("int8", 32), ("int4", None)]
)
@pytest.mark.parametrize("cell", CELLS)
def test_narrow_weights_are_the_rounded_model(
    cell: str, weights: str, group: int | None, cpu_isa: str
) -> None:
    model = model_of(cell, 64)
    exact = RecurrentLanguageModel(**model.options).double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, p in exact.named_parameters():
            if p.ndim == 1:
                continue
            turned = name.endswith((".Wh", ".Uh"))
            w = (p.t() if turned else p).float()
            last = name.startswith(("fc", "embedding"))
            if weights == "bf16":
                whole = w.bfloat16()
            elif weights == "int4" and not last:
                whole = quantise_groups(w, 32).dequantised()
            elif group is not None and not name.startswith("embedding"):
                whole = quantise_groups(w, group, 8).dequantised()
            else:
                whole = quantise_rows(w).dequantised()
            p.copy_(whole.t() if turned else whole)
        expected = exact(ids_of(2, 9))
    runner = make_engine(model, weights, group=group)
    found, _ = runner.step(ids_of(2, 9), runner.new_state(2), all_positions=True)
    # Rows are rounded to 16 bits at most (tests/test_engine_quantised.py), and states go on.
    assert (found - expected).square().mean().sqrt() < 3e-4
    # 44 tokens at once, which may be multiplied as bf16.
    with torch.no_grad():
        expected = exact(ids_of(2, 22))
    found, _ = runner.step(ids_of(2, 22), runner.new_state(2), all_positions=True)
    assert (found - expected).square().mean().sqrt() < 0.012 * expected.std()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tied", [False, True])
def test_what_calibration_sees_is_the_model(cell: str, tied: bool) -> None:
    model = model_of(cell, tie_weights=tied)
    texts = [ids_of(1, 17)[0], ids_of(1, 30, 1)[0], ids_of(1, 1, 2)[0]]
    forward = CellForward(recurrent_plan(model), texts)
    with torch.no_grad():
        expected = torch.cat([model(t[None])[0] for t in texts])
    # Two layers of float32 on both sides, through up to 30 steps.
    torch.testing.assert_close(forward.logits(), expected, rtol=0, atol=1e-5)
    layer = recurrent_plan(model).layers[0]
    x = forward.embed()
    before, kept = forward.operands(x, layer)
    assert not before[[0, 17, 47]].any()
    torch.testing.assert_close(before[1:17], forward.layer(x, layer)[:16], rtol=0, atol=0)
    assert (kept is before) == (layer.candidate is None)


@pytest.mark.parametrize(("weights", "group"), [("int8", None), ("int8", 32), ("int4", None)])
@pytest.mark.parametrize("cell", CELLS)
def test_quantised_weights_are_what_the_engine_rounds(
    cell: str, weights: str, group: int | None, tmp_path: Path
) -> None:
    model = model_of(cell, tie_weights=cell == "lstm")
    made = quantise(model, weights, group=group)
    made.save(tmp_path / "weights.safetensors")
    loaded = QuantisedWeights.load(tmp_path / "weights.safetensors")
    plain = Generator(model, weights=weights, group=group)
    given = Generator(model, weights=loaded)
    ids = ids_of(2, 9)
    expected = plain.generate(ids, max_new_tokens=20)
    assert torch.equal(given.generate(ids, max_new_tokens=20), expected)
    assert given.memory() == plain.memory()
    assert given.weights == weights
    other = model_of("gru_textbook" if cell != "gru_textbook" else "lstm")
    with pytest.raises(CannotPack, match="quantised weights"):
        make_engine(other, loaded)


@pytest.mark.parametrize("cell", CELLS)
def test_calibration_changes_products_less(cell: str) -> None:
    """On other texts of the same kind, of few kinds of token, whose rows have much in common."""
    model = model_of(cell, 64)
    kinds = torch.tensor([3, 8, 20, 33, 47, 60, 71, 90])
    torch.manual_seed(5)
    texts = [kinds[torch.randint(0, 8, (200,))] for _ in range(6)]
    plan, errors = recurrent_plan(model), {}
    expected = CellForward(plan, texts[4:]).logits()
    for how, given in (("nearest", None), ("calibrated", texts[:4])):
        weighed = quantise(model, "int4", texts=given).into(plan)
        exact = replace(weighed, head=plan.head, embedding=plan.embedding)
        errors[how] = float((CellForward(exact, texts[4:]).logits() - expected).square().mean())
    assert errors["calibrated"] < 0.8 * errors["nearest"], errors  # in squares


def test_results_do_not_depend_on_threads() -> None:
    for cell in ("lstm", "gru_textbook"):
        runner = make_engine(model_of(cell, 256), "int8")
        ids, found = ids_of(3, 20), []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            first, state = runner.step(ids, runner.new_state(3))
            second, state = runner.step(ids[:, :1], state)
            found.append(torch.stack([first, second]))
        assert all(torch.equal(f, found[0]) for f in found)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"eos_token_id": [3, 9, 40]}])
def test_generator_takes_it(options: dict) -> None:
    model = model_of("lstm")
    ids = ids_of(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, 7:] = 0
    generator, modules = Generator(model), Generator(model)
    modules.runner = ModuleRunner(model)
    assert "the compiled engine" in generator.explain()
    arguments = {"attention_mask": mask, "max_new_tokens": 20, **options}
    found = generator.generate(ids, **arguments)
    assert torch.equal(found, modules.generate(ids, **arguments))
    assert Generator(model, weights="int8").memory() < 0.35 * generator.memory()


def test_changes_and_what_cannot_be_packed() -> None:
    model = model_of("gru")
    runner = make_engine(model)
    with torch.no_grad():
        model.fc.weight.mul_(2)
    with pytest.raises(ValueError, match=r"changed since they were packed: .* repack"):
        runner.step(ids_of(1, 2), runner.new_state(1))
    runner.repack()
    found, _ = runner.step(ids_of(1, 2), runner.new_state(1))
    torch.testing.assert_close(found, model(ids_of(1, 2))[:, -1].detach(), rtol=0, atol=1e-5)
    with pytest.raises(CannotPack, match=r"float64 parameters"):
        make_engine(model_of("lstm").double())
    with pytest.raises(CannotPack, match=r"training mode and has dropout"):
        make_engine(model_of("lstm", dropout=0.5).train())


@pytest.mark.parametrize(
    ("ids", "lengths", "error", "message"),
    [
        (torch.ones(1, 2), None, TypeError, "ids must be an int64 tensor"),
        (torch.ones(2, 2).long(), None, ValueError, r"the 1 rows of the state"),
        (torch.full((1, 2), V), None, ValueError, r"ids must lie in 0..100, got 101"),
        (torch.ones(1, 2).long(), torch.tensor([3]), ValueError, r"from 0 to T = 2, got \[3\]"),
        (torch.ones(1, 2).long(), torch.tensor([1.0]), TypeError, r"lengths must be"),
    ],
)
def test_bad_input(ids, lengths, error: type[Exception], message: str) -> None:
    runner = make_engine(model_of("elman"))
    with pytest.raises(error, match=message):
        runner.step(ids, runner.new_state(1), lengths)
