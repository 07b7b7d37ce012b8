"""The decoding engine: equal to the model it was packed from, whatever the step, batch or level."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lmfast import Generator, KVCache
from lmfast.generation.engine import CannotPack, EngineRunner, make_engine
from lmfast.models import DecoderLanguageModel

pytestmark = pytest.mark.usefixtures("needs_cpu_kernels")

V = 101


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The operators of models this small are faster alone, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What blocks can have, each option at least once; widths that are no multiple of a panel too.
OPTIONS = {
    "plain": {},
    "llama": {
        "final_norm": True,
        "mlp": "swiglu",
        "mlp_dim": 72,
        "rope_interleaved": False,
        "num_kv_heads": 2,
    },
    "gemma": {
        "mlp": "geglu",
        "post_norms": True,
        "softcap": 5.0,
        "logit_softcap": 8.0,
        "embedding_scale": 7.0,
        "tie_weights": True,
        "final_norm": True,
    },
    "norms and biases": {
        "qk_norm": True,
        "qkv_bias": True,
        "o_bias": True,
        "rope_dim": 6,
        "window": 5,
        "output_bias": True,
    },
    "gelu": {"mlp": "gelu", "head_dim": 20, "mlp_bias": False, "scale": 0.3},
    "silu": {"mlp": "silu", "windows": [3, None], "mlp_dim": 40},
}


def model_of(options: dict, width: int = 48) -> DecoderLanguageModel:
    torch.manual_seed(1)
    model = DecoderLanguageModel(V, width, 4, 2, 0, **options)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms away from where they start
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def ids_of(batch: int, steps: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, V, (batch, steps), generator=torch.Generator().manual_seed(seed))


def both(model: DecoderLanguageModel, runner: EngineRunner, prompt: torch.Tensor, new: int):
    """Logits of the model in float64 and of the runner, of the prompt and after, greedily."""
    exact = type(model)(**model.options).double()
    exact.load_state_dict(model.state_dict())
    state, own = exact.new_state(len(prompt)), runner.new_state(len(prompt))
    ids, out = prompt, []
    with torch.no_grad():
        for _ in range(new):
            expected, state = exact.step(ids, state)
            found, own = runner.step(ids, own)
            out.append((expected, found))
            ids = expected.argmax(-1)[:, None]
    return out


@pytest.mark.parametrize("name", OPTIONS)
def test_engine_is_the_model(name: str, cpu_isa: str) -> None:
    model = model_of(OPTIONS[name])
    runner = make_engine(model)
    with torch.no_grad():
        plain, _ = model.step(ids_of(3, 9), model.new_state(3))
    for step, (expected, found) in enumerate(both(model, runner, ids_of(3, 9), 40)):
        error = (found - expected).abs().max()
        # Two layers of sums over 48 to 192 products in float32; the module path has 1e-6 to 5e-6.
        assert error < 1e-5, f"step {step}"
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        if step == 0:
            assert error <= 3 * (plain - expected).abs().max() + 1e-6


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_narrow_weights_cost_what_their_rounding_does(weights: str, cpu_isa: str) -> None:
    model = model_of(OPTIONS["llama"])
    allowed = {"bf16": 0.02, "int8": 0.05, "int4": 0.6}[weights]  # of logits from -3 to 3
    (expected, found), *_ = both(model, make_engine(model, weights), ids_of(2, 7), 1)
    assert (found - expected).square().mean().sqrt() < allowed


def test_batch_ragged_and_pieces_are_the_same_numbers(cpu_isa: str) -> None:
    model = model_of(OPTIONS["llama"])
    runner = make_engine(model)
    ids, lengths = ids_of(4, 11), torch.tensor([11, 3, 1, 8])
    together, _ = runner.step(ids, runner.new_state(4), lengths)
    for row, n in enumerate(lengths.tolist()):
        alone, _ = runner.step(ids[row : row + 1, :n], runner.new_state(1))
        # Attention may take rows one by one or in blocks, by how many there are.
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=2e-6)
    state = runner.new_state(4)
    _, state = runner.step(ids[:, :4], state)
    after, state = runner.step(ids[:, 4:], state)
    whole, _ = runner.step(ids, runner.new_state(4))
    torch.testing.assert_close(after, whole, rtol=0, atol=2e-6)
    everywhere, _ = runner.step(ids, runner.new_state(4), lengths, all_positions=True)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(everywhere[row, n - 1], together[row], rtol=0, atol=2e-6)
        assert not everywhere[row, n:].any()


def test_long_prompts_go_in_pieces() -> None:
    model = model_of({**OPTIONS["llama"], "windows": [24, None]})
    runner = make_engine(model)
    ids, lengths = ids_of(2, 700), torch.tensor([700, 530])
    found, state = runner.step(ids, runner.new_state(2), lengths, all_positions=True)
    with torch.no_grad():
        expected = model(ids)
    assert state.lengths.tolist() == [700, 530]
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[row, :n], expected[row, :n], rtol=0, atol=1e-5)
    last, _ = runner.step(ids, runner.new_state(2), lengths)
    torch.testing.assert_close(last[1], found[1, 529], rtol=0, atol=2e-6)


def test_state_is_an_ordinary_cache() -> None:
    model = model_of(OPTIONS["llama"])
    runner = make_engine(model)
    ids = ids_of(2, 80)
    _, state = runner.step(ids[:, :70], runner.new_state(2))
    state.reorder([1, 1, 0])
    branch = state.fork()
    found, state = runner.step(ids[[0, 1, 0], 70:71], state)
    other, branch = runner.step(ids[[1, 0, 1], 71:72], branch)
    state.truncate([65, 70, 71])
    later, state = runner.step(ids[[0, 0, 1], 72:74], state)
    texts = [
        torch.cat([ids[1, :65], ids[0, 72:74]]),
        torch.cat([ids[1, :70], ids[0, 72:74]]),
        torch.cat([ids[0, :70], ids[0, 70:71], ids[1, 72:74]]),
    ]
    with torch.no_grad():
        for row, text in enumerate(texts):
            torch.testing.assert_close(later[row], model(text[None])[0, -1], rtol=0, atol=1e-5)
        text = torch.cat([ids[1, :70], ids[0, 70:71]])
        torch.testing.assert_close(found[0], model(text[None])[0, -1], rtol=0, atol=1e-5)
        text = torch.cat([ids[0, :70], ids[1, 71:72]])
        torch.testing.assert_close(other[2], model(text[None])[0, -1], rtol=0, atol=1e-5)
        # The module path goes on where the engine was.
        both_ways, _ = model.step(ids[[0, 1, 0], 74:75], state.fork())
    again, _ = runner.step(ids[[0, 1, 0], 74:75], state)
    torch.testing.assert_close(again, both_ways, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_results_do_not_depend_on_threads(weights: str) -> None:
    model = model_of({**OPTIONS["gemma"], "num_kv_heads": 2}, 256)
    runner = make_engine(model, weights)
    ids, found = ids_of(3, 20), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        first, state = runner.step(ids, runner.new_state(3))
        second, _ = runner.step(ids[:, :1], state)
        found.append(torch.stack([first, second]))
    assert all(torch.equal(f, found[0]) for f in found)


@pytest.mark.parametrize("windows", [[None, None], [20, None]])
def test_greedy_runs_are_single_steps(windows: list[int | None], cpu_isa: str) -> None:
    model = model_of({**OPTIONS["llama"], "windows": windows})
    runner = make_engine(model)
    for batch in (1, 3):
        logits, state = runner.step(ids_of(batch, 6), runner.new_state(batch))
        other = state.fork()
        first = logits.argmax(-1)
        expected, now = [], first
        for _ in range(90):
            logits, other = runner.step(now[:, None], other)
            now = logits.argmax(-1)
            expected.append(now)
        found: list[torch.Tensor] = []
        now = first
        while len(found) < 90:
            found += runner.greedy(now, state, min(17, 90 - len(found))).unbind()
            now = found[-1]
        assert torch.equal(torch.stack(found), torch.stack(expected))
        assert torch.equal(state.lengths, other.lengths)
        # The first of the stops that a row meets ends the run, and the state is there.
        stop = int(expected[40][-1])
        until = next(i for i, t in enumerate(expected) if (t == stop).any()) + 1
        state.truncate(6)
        now, count = first, 0
        while True:
            run = runner.greedy(now, state, 50, [stop, V - 1])
            count += len(run)
            now = run[-1]
            if (run == stop).any() or (run == V - 1).any():
                break
        assert count <= until
        assert state.lengths.tolist() == [6 + count] * batch


def test_greedy_takes_the_first_of_equals() -> None:
    model = model_of({"output_bias": True})
    with torch.no_grad():
        model.output.zero_()
        model.output_bias.zero_()
        model.output_bias[[40, 41, 90]] = 1.0
    runner = make_engine(model)
    assert runner.greedy(torch.tensor([5]), runner.new_state(1), 3).tolist() == [[40]] * 3
    with torch.no_grad():
        model.output_bias[70] = torch.nan
    runner.repack()
    assert runner.greedy(torch.tensor([5]), runner.new_state(1), 2).tolist() == [[70]] * 2


def test_the_model_may_go() -> None:
    model = model_of(OPTIONS["plain"])
    runner = make_engine(model, "int8")
    expected, _ = runner.step(ids_of(1, 3), runner.new_state(1))
    del model
    state = runner.new_state(1)
    found, state = runner.step(ids_of(1, 3), state)
    assert torch.equal(found, expected)
    assert runner.greedy(found.argmax(-1), state, 4).shape == (4, 1)
    with pytest.raises(ValueError, match=r"the model this engine was packed from is gone"):
        runner.repack()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_other_cache_types(dtype: torch.dtype) -> None:
    model = model_of(OPTIONS["llama"])
    runner = make_engine(model, cache_dtype=dtype)
    (expected, found), *_ = both(model, runner, ids_of(2, 30), 1)
    assert (found - expected).abs().max() < 0.1  # keys of 8 to 11 bits
    assert runner.new_state(1).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64])
def test_caches_that_the_engine_does_not_read(dtype: torch.dtype) -> None:
    model = model_of(OPTIONS["llama"])
    runner = make_engine(model)
    state = runner.new_state(1)
    other = KVCache(state.num_layers, 1, state.num_kv_heads, state.head_dim, dtype=dtype)
    message = rf"must store float32, bfloat16, float16 or int8 .* got {dtype}: make the cache"
    with pytest.raises(ValueError, match="state " + message):
        runner.step(ids_of(1, 3), other)
    with pytest.raises(ValueError, match="cache_dtype " + message):
        make_engine(model, cache_dtype=dtype)


def test_changed_parameters_are_noticed() -> None:
    model = model_of(OPTIONS["plain"])
    runner = make_engine(model)
    ids = ids_of(1, 4)
    with torch.no_grad():
        model.layers[0].attn.W_O.mul_(2)
    with pytest.raises(ValueError, match=r"changed since they were packed: .* repack"):
        runner.step(ids, runner.new_state(1))
    runner.repack()
    found, _ = runner.step(ids, runner.new_state(1))
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids)[:, -1], rtol=0, atol=1e-5)


def test_what_cannot_be_packed_says_why() -> None:
    with pytest.raises(CannotPack, match=r"float64 parameters"):
        make_engine(model_of({}).double())
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    dynamic = model_of({"rope_scaling": scaling})
    with pytest.raises(CannotPack, match=r"scaled by the length of the text"):
        make_engine(dynamic)
    generator = Generator(dynamic)
    assert "the model's own modules: its rotation is scaled by the length" in generator.explain()
    with pytest.raises(CannotPack, match=r"Linear is not a model the engine knows"):
        make_engine(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"weights must be one of fp32, bf16, int8, int4"):
        make_engine(model_of({}), "fp8")


@pytest.mark.parametrize(
    ("ids", "lengths", "error", "message"),
    [
        (torch.ones(1, 2), None, TypeError, "ids must be an int64 tensor"),
        (torch.ones(2, 2).long(), None, ValueError, r"the 1 rows of the state"),
        (torch.ones(1, 0).long(), None, ValueError, r"T >= 1"),
        (torch.full((1, 2), V), None, ValueError, r"ids must lie in 0..100, got 101"),
        (torch.full((1, 2), -1), None, ValueError, r"ids must lie in 0..100, got -1"),
        (torch.ones(1, 2).long(), torch.tensor([3]), ValueError, r"from 0 to T = 2, got \[3\]"),
        (torch.ones(1, 2).long(), torch.tensor([1.0]), TypeError, r"lengths must be"),
        (torch.ones(1, 9).long(), None, ValueError, r"the cache is full: 9 tokens"),
    ],
)
def test_bad_input(ids, lengths, error: type[Exception], message: str) -> None:
    runner = make_engine(model_of({}))
    with pytest.raises(error, match=message):
        runner.step(ids, runner.new_state(1, 8), lengths)


class StepByStep:
    """A runner without `greedy`."""

    def __init__(self, runner: EngineRunner) -> None:
        self.vocab_size, self.pad_idx = runner.vocab_size, runner.pad_idx
        self.device, self.max_positions = runner.device, runner.max_positions
        self.new_state, self.step = runner.new_state, runner.step


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": [17, 23, 61, 80]},
        {"eos_token_id": [17, 23, 61, 80], "min_new_tokens": 30},
        {"stop_sequences": [[5], [9], [44], [71]]},
        {"suppress_tokens": [3, 4, 90]},
    ],
)
def test_generator_takes_runs_of_tokens(options: dict) -> None:
    runner = make_engine(model_of(OPTIONS["llama"]))
    ids = ids_of(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found, expected = (
        Generator(r).generate(ids, attention_mask=mask, max_new_tokens=60, **options)
        for r in (runner, StepByStep(runner))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 3, 5])])
def test_many_rows_in_pieces(lengths: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_engine(model_of({}))
    ids = ids_of(3, 7)
    expected, _ = runner.step(ids, runner.new_state(3), lengths, all_positions=True)
    monkeypatch.setattr("lmfast.generation.engine.runner.CHUNK", 6)
    found, state = runner.step(ids, runner.new_state(3), lengths, all_positions=True)
    # Products of fewer rows, and the attention, may be divided otherwise.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert state.lengths.tolist() == ([7, 7, 7] if lengths is None else lengths.tolist())
