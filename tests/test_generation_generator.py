"""Generator: every faster way gives the same tokens, and every option does its work."""

import pytest
import torch

import lmfast
from lmfast.generation import Generator
from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel

V = 37
KINDS = ("decoder", "window", "elman", "lstm")
every = pytest.mark.parametrize("kind", KINDS)


def make(kind, seed=0):
    torch.manual_seed(seed)
    if kind in ("decoder", "window"):
        window = {"windows": [8, None]} if kind == "window" else {}
        model = DecoderLanguageModel(V, 16, 4, 2, 0, num_kv_heads=2, final_norm=True, **window)
    else:
        model = RecurrentLanguageModel(V, 16, 2, 0, cell=kind)
    # Weights as they are drawn give nearly equal logits; larger ones make choices clear-cut.
    with torch.no_grad():
        model.embedding.weight.mul_(50)
    return model.double().eval()


def by_hand(model, ids, count, window=None):
    """The definition: the text so far through the model, likeliest token, append."""
    context = ids
    for _ in range(count):
        new = model(context)[:, -1:].argmax(-1)
        ids, context = torch.cat((ids, new), 1), torch.cat((context, new), 1)
        if window is not None and context.shape[1] > window:
            context = context[:, -(window // 2) :]
    return ids


def prompts(side="left"):
    """Three prompts of 10, 45 and 50 tokens, padded; and each by itself."""
    ids = torch.randint(1, V, (3, 50))
    alone = [ids[0:1, 40:], ids[1:2, :45], ids[2:]]
    padded, mask = torch.full((3, 50), 2), torch.zeros(3, 50)
    for row, text in enumerate(alone):
        n = text.shape[1]
        where = slice(50 - n, 50) if side == "left" else slice(0, n)
        padded[row, where], mask[row, where] = text[0], 1
    return padded, mask, alone


@every
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_chunk_size": 7},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": "itself"},
        {"assistant_model": "another", "num_assistant_tokens": 3},
    ],
    ids=lambda options: " ".join(map(str, options)) or "plain",
)
def test_ragged_batch_equals_single_prompts_by_definition(kind, side, options):
    model = make(kind)
    if "assistant_model" in options:
        itself = options["assistant_model"] == "itself"
        options = {**options, "assistant_model": model if itself else make("elman", 3)}
    ids, mask, alone = prompts(side)
    out = lmfast.generate(model, ids, 30, attention_mask=mask, **options)
    assert torch.equal(out[:, :50], ids)
    for row, text in enumerate(alone):
        assert torch.equal(out[row, 50:], by_hand(model, text, 30)[0, text.shape[1] :])


@every
def test_what_prompts_have_in_common_is_computed_once(kind, monkeypatch):
    model = make(kind)
    generator = Generator(model)
    ids = torch.randint(1, V, (3, 45))
    ids[:, :40] = ids[:1, :40]
    expected = by_hand(model, ids, 9)
    fed = []
    step = generator.runner.step

    def counting(ids, *args, **options):
        fed.append(ids.numel())
        return step(ids, *args, **options)

    monkeypatch.setattr(generator.runner, "step", counting)
    assert torch.equal(generator.generate(ids, max_new_tokens=9), expected)
    assert fed[:2] == [40, 15]
    prefix = generator.prefill(ids[:1, :40])
    fed.clear()
    for _ in range(2):  # it stays as it was
        assert torch.equal(generator.generate(ids, max_new_tokens=9, prefix=prefix), expected)
    assert fed[0] == 15
    other = torch.cat((ids[:1], ids[:1].roll(1, 1)))
    with pytest.raises(ValueError, match="prompt 1 must begin with the 40 tokens of prefix"):
        generator.generate(other, max_new_tokens=1, prefix=prefix)


def test_a_prefix_is_extended_from_what_it_shares(monkeypatch):
    model = make("decoder")
    generator = Generator(model)
    first = torch.randint(1, V, (1, 20))
    second = torch.cat((first[:, :15], torch.randint(1, V, (1, 10))), 1)
    prefix = generator.prefill(first)
    fed = []
    step = generator.runner.step
    monkeypatch.setattr(
        generator.runner,
        "step",
        lambda ids, *a, **o: (fed.append(ids.shape[1]), step(ids, *a, **o))[1],
    )
    longer = generator.prefill(second, prefix=prefix)
    assert fed[0] <= 10
    torch.testing.assert_close(longer.logits, model(second)[:, -1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prefix.logits, model(first)[:, -1], rtol=1e-9, atol=1e-9)
    out = generator.generate(second, max_new_tokens=12, prefix=longer)
    assert torch.equal(out, by_hand(model, second, 12))


@every
def test_prefill_and_step_are_the_models_logits(kind):
    model = make(kind)
    generator = Generator(model)
    ids, mask, alone = prompts()
    prefix = generator.prefill(ids, attention_mask=mask, prefill_chunk_size=16)
    new = torch.tensor([3, 4, 5])
    logits, state = generator.step(new, prefix.state)
    more, _ = generator.step(torch.tensor([[6, 0], [7, 8], [9, 0]]), state, torch.tensor([1, 2, 1]))
    last = ([6], [7, 8], [9])
    for row, text in enumerate(alone):
        text = torch.cat((text, new[None, row : row + 1]), 1)
        torch.testing.assert_close(prefix.logits[row], model(text[:, :-1])[0, -1])
        torch.testing.assert_close(logits[row], model(text)[0, -1])
        text = torch.cat((text, torch.tensor([last[row]])), 1)
        torch.testing.assert_close(more[row], model(text)[0, -1])


@every
def test_a_context_slides_row_by_row(kind):
    model = make(kind)
    ids, mask, alone = prompts()
    out = lmfast.generate(
        model, ids, 60, attention_mask=mask, context_window=52, context_policy="slide"
    )
    for row, text in enumerate(alone):
        assert torch.equal(out[row, 50:], by_hand(model, text, 60, 52)[0, text.shape[1] :])
    out = lmfast.generate(model, ids, 60, context_window=20, context_policy="slide")
    assert torch.equal(out[:, 50:], by_hand(model, ids[:, -10:], 60, 20)[:, 10:])


@every
def test_a_prompt_too_long_for_a_sliding_context_cuts_no_other(kind):
    model, window = make(kind), 20
    ids = torch.randint(1, V, (3, 30))
    mask = (torch.arange(30) >= torch.tensor([0, 10, 13])[:, None]).long()  # 30, 20 and 17 tokens
    options = {"context_window": window, "context_policy": "slide"}
    out = lmfast.generate(model, ids, 12, attention_mask=mask, **options)
    for row, begin in enumerate((0, 10, 13)):
        alone = lmfast.generate(model, ids[row : row + 1, begin:], 12, **options)
        assert torch.equal(out[row, 30:], alone[0, 30 - begin :])


def test_a_context_is_an_error_or_cuts_the_prompt():
    model = make("decoder")
    ids = torch.randint(1, V, (2, 30))
    with pytest.raises(
        ValueError, match="30 tokens and max_new_tokens=12 do not fit into a contex"
    ):
        lmfast.generate(model, ids, 12, context_window=40)
    assert lmfast.generate(model, ids, 11, context_window=40).shape == (2, 41)
    out = lmfast.generate(model, ids, 20, context_window=40, context_policy="truncate")
    assert torch.equal(out[:, 30:], by_hand(model, ids[:, -21:], 20)[:, 21:])
    with pytest.raises(ValueError, match='set context_policy to "slide"'):
        lmfast.generate(model, ids, 50, context_window=40, context_policy="truncate")


@pytest.mark.parametrize("how", ["greedy", "drawn", "looked up"])
def test_complete_returns_the_models_log_probabilities(how):
    model = make("decoder")
    ids, mask, alone = prompts()
    options = {
        "greedy": {},
        "drawn": {"do_sample": True, "temperature": 0.5, "top_k": 3},
        "looked up": {"prompt_lookup_num_tokens": 3},
    }[how]
    free = lmfast.generate(model, ids, 9, attention_mask=mask)[0, 50:].tolist()
    found = Generator(model).complete(
        ids, attention_mask=mask, max_new_tokens=9, eos_token_id=free[4], **options
    )
    for row, text in enumerate(alone):
        n = int(found.lengths[row])
        new = found.ids[row, 50 : 50 + n]
        assert (new[:-1] != free[4]).all()
        assert n == found.ids.shape[1] - 50 or new[-1] == free[4]
        whole = torch.cat((text[0], new))[None]
        log_p = model(whole)[0, text.shape[1] - 1 : -1].log_softmax(-1)
        expected = log_p.gather(1, new[:, None])[:, 0].float()
        torch.testing.assert_close(found.log_probs[row, :n], expected, rtol=1e-5, atol=1e-5)
        assert (found.log_probs[row, n:] == 0).all()
        torch.testing.assert_close(found.scores[row], expected.mean(), rtol=1e-5, atol=1e-5)


def test_best_of_returns_the_likeliest_of_those_drawn():
    model = make("decoder")
    ids = torch.randint(1, V, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 0}
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    all_six = Generator(model).complete(
        ids, num_return_sequences=6, generator=generators[0], **options
    )
    best = Generator(model).complete(
        ids, num_return_sequences=2, best_of=6, generator=generators[1], **options
    )
    assert all_six.ids.shape == (12, 11)
    for row in range(2):
        order = all_six.scores[6 * row : 6 * row + 6].argsort(descending=True)[:2] + 6 * row
        assert torch.equal(best.ids[2 * row : 2 * row + 2], all_six.ids[order])
        torch.testing.assert_close(best.scores[2 * row : 2 * row + 2], all_six.scores[order])


def test_choices_are_said_whole_and_end_the_row():
    model = make("decoder")
    ids = torch.randint(1, V, (40, 4))
    choices = [[1, 2, 3], [4], [5, 6], [5, 7]]
    out = lmfast.generate(model, ids, 8, choices=choices, pad_token_id=0)[:, 4:]
    allowed = {tuple(c + [0] * (3 - len(c))) for c in choices}
    said = {tuple(row + [0] * (3 - len(row))) for row in out.tolist()}
    assert said <= allowed
    assert len(said) > 1
    for row, text in zip(out.tolist(), ids, strict=True):  # the likeliest first id of the allowed
        first = model(text[None])[0, -1].detach()
        assert row[0] == max((1, 4, 5), key=lambda i: float(first[i]))
    with pytest.raises(ValueError, match="choices must not begin with one another"):
        lmfast.generate(model, ids, 8, choices=[[1], [1, 2]])
    out = lmfast.generate(model, ids, 8, choices=[[1], [1, 2]], eos_token_id=9, pad_token_id=0)[
        :, 4:
    ]
    assert {tuple(row) for row in out.tolist()} <= {(1, 9), (1, 2)}


def test_choices_in_a_beam_search_find_the_likeliest():
    model = make("decoder")
    ids = torch.randint(1, V, (5, 4))
    choices = [[1, 2], [4, 8], [5, 6], [5, 7], [9, 9]]
    out = lmfast.generate(model, ids, 2, choices=choices, num_beams=8, length_penalty=0.0)[:, 4:]
    for row, text in zip(out.tolist(), ids, strict=True):

        def log_p(choice, text=text):
            whole = torch.cat((text, torch.tensor(choice)))[None]
            shares = model(whole)[0, 3:5].detach().log_softmax(-1)
            return float(shares[0, choice[0]] + shares[1, choice[1]])

        assert row == max(choices, key=log_p)


@pytest.mark.parametrize("drafted", [False, True])
def test_speculative_draws_have_the_models_distribution(drafted):
    """Chi-square of pairs of tokens: what is accepted, replaced and added."""
    torch.manual_seed(0)
    model = DecoderLanguageModel(5, 8, 2, 1, None).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(60)
    rows = 800
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1]]).repeat(rows, 1)
    options = (
        {"assistant_model": DecoderLanguageModel(5, 8, 2, 1, None)}
        if drafted
        else ({"prompt_lookup_num_tokens": 2})
    )
    settings = {"do_sample": True, "temperature": 1.3, "top_k": 4}
    generator = torch.Generator().manual_seed(1)
    out = lmfast.generate(model, ids, 3, generator=generator, **settings, **options)[:, 7:]
    exact = torch.zeros(5, 5, 5, dtype=torch.float64)
    for a in range(5):
        for b in range(5):
            text = torch.cat((ids[:1], torch.tensor([[a, b]])), 1)
            shares = lmfast.generation.sampling_probabilities(
                model(text)[0, 6:].double(), temperature=1.3, top_k=4
            )
            exact[a, b] = shares[0, a] * shares[1, b] * shares[2]
    observed = torch.bincount((out * torch.tensor([25, 5, 1])).sum(1), minlength=125).double()
    expected = rows * exact.flatten()
    assert observed[expected == 0].sum() == 0
    # Cells with few expected draws together, so that the statistic has its distribution.
    small = expected < 8
    observed = torch.cat((observed[~small], observed[small].sum()[None]))
    expected = torch.cat((expected[~small], expected[small].sum()[None]))
    chi_square = ((observed - expected) ** 2 / expected.clamp_min(1e-9)).sum()
    freedom = len(expected) - 1
    # 99.9 % point of chi-square by Wilson and Hilferty; the seed makes the draw reproducible.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < limit


def test_streams_give_the_same_tokens_step_by_step():
    model = make("decoder")
    generator = Generator(model)
    ids, mask, _ = prompts()
    expected = generator.generate(ids, attention_mask=mask, max_new_tokens=15)[:, 50:]
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        steps = list(generator.stream(ids, attention_mask=mask, max_new_tokens=15, **options))
        assert torch.equal(torch.stack(steps, 1), expected)
    assert not torch.is_inference_mode_enabled()
    stream = generator.stream(ids, max_new_tokens=15)
    next(stream)
    assert not torch.is_inference_mode_enabled()  # not between the steps either
    with pytest.raises(ValueError, match="leave out num_beams"):
        generator.stream(ids, max_new_tokens=3, num_beams=2)


def test_penalties_look_at_the_prompt_as_well_unless_told_not_to():
    model = make("decoder")
    ids = torch.randint(1, V, (2, 6))
    for prompt_too in (True, False):
        text = ids
        for _ in range(12):
            seen = torch.zeros(2, V, dtype=torch.bool)
            seen.scatter_(1, text if prompt_too else text[:, 6:], True)
            logits = model(text)[:, -1]
            changed = torch.where(logits > 0, logits / 3, logits * 3)
            new = torch.where(seen, changed, logits).argmax(-1)
            text = torch.cat((text, new[:, None]), 1)
        for options in ({}, {"prompt_lookup_num_tokens": 3}):
            out = lmfast.generate(
                model, ids, 12, repetition_penalty=3.0, penalize_prompt=prompt_too, **options
            )
            assert torch.equal(out, text)


def test_logit_bias_and_per_row_numbers():
    model = make("decoder")
    ids = torch.randint(1, V, (2, 6))
    out = lmfast.generate(model, ids, 5, logit_bias={7: 1e4})
    assert (out[:, 6:] == 7).all()
    out = lmfast.generate(
        model, ids, 30, presence_penalty=torch.tensor([0.0, 1e6]), prompt_lookup_num_tokens=None
    )[:, 6:]
    assert len(out[1].unique()) == 30
    assert torch.equal(out[0], by_hand(model, ids[:1], 30)[0, 6:])


class Words:
    """A tokenizer of transformers' kind: id i is a letter, ids below 3 are spaces."""

    def decode(self, ids):
        return "".join(" " if i < 3 else chr(94 + i) for i in ids)

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [2 if c == " " else ord(c) - 94 for c in text]


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 1}])
def test_stop_strings_end_rows_with_the_token_that_completes_them(options):
    model = make("decoder")
    ids = torch.randint(3, 29, (3, 4))
    free = lmfast.generate(model, ids, 30)[:, 4:]
    words = Words()
    stop = words.decode(free[0, 5:8].tolist())
    out = lmfast.generate(
        model, ids, 30, stop_strings=stop, tokenizer=words, pad_token_id=0, **options
    )[:, 4:]
    for row in range(3):
        text = words.decode(free[row].tolist())
        end = text.find(stop) + 3 if stop in text else 30
        assert torch.equal(out[row, :end], free[row, :end])
        assert (out[row, end:] == 0).all()
    assert (out[0] == 0).any()
    # One that was whole before the row could end does not end it later.
    late = lmfast.generate(
        model,
        ids[:1],
        30,
        stop_strings=[stop, "#" * 9],
        tokenizer=words,
        min_new_tokens=12,
        **options,
    )
    assert stop not in words.decode(free[0, 9:].tolist())
    assert late.shape[1] == 34
    chosen = lmfast.generate(model, ids, 9, choices=["ab", "cde"], tokenizer=words)[:, 4:]
    assert {words.decode(row).strip() for row in chosen.tolist()} <= {"ab", "cde"}


def test_a_forward_that_generation_would_not_call_is_named():
    """And a subclass without a kind of its own is not what its parent's files become."""

    class Scaled(DecoderLanguageModel):
        def forward(self, ids):
            return 2 * super().forward(ids)

    with pytest.warns(UserWarning, match="Scaled overrides forward"):
        Generator(Scaled(50, 16, 2, 1, 0))
    config = DecoderLanguageModel(50, 16, 2, 1, 0).config
    assert type(lmfast.models.build_model(config)) is DecoderLanguageModel
