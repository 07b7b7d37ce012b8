"""Fine-tuning: labels, chat formats, the classifier, and the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lmfast
from lmfast.cli import main
from lmfast.models import DecoderLanguageModel, RecurrentLanguageModel, SequenceClassifier
from lmfast.training import (
    CHAT_FORMATS,
    CompletionBatches,
    LoRA,
    completion_example,
    load_model,
    pad_examples,
    save_model,
)


def test_golden_batch() -> None:
    prompts = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 8, 9, 10, 7]]
    rows = [completion_example(p, c, 0) for p, c in zip(prompts, [[11], [12]])]
    ids, labels, mask = pad_examples(rows, -1)
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 11, 0], [1, 2, 8, 9, 10, 7, 12, 0, -1]]
    assert labels.tolist() == [[-100] * 7 + [11, 0], [-100] * 6 + [12, 0, -100]]
    assert mask.tolist() == [[1] * 9, [1] * 8 + [0]]
    inputs, targets = CompletionBatches(rows, 2, shuffle=False).next_batch()
    assert inputs.tolist() == [[1, 2, 3, 4, 5, 6, 7, 11], [1, 2, 8, 9, 10, 7, 12, 0]]
    assert targets.tolist() == [[-100] * 6 + [11, 0], [-100] * 5 + [12, 0, -100]]


def test_loss_is_that_of_a_model_that_shifts_itself() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    rows = [completion_example([3, 4, 5], [6, 7], 1), completion_example([8], [9], 1)]
    ids, labels, mask = pad_examples(rows, 0)
    theirs = model(ids, labels=labels, attention_mask=mask).loss
    inputs, targets = CompletionBatches(rows, 2, shuffle=False).next_batch()
    logits = model(inputs).logits
    ours = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours, theirs)


def test_long_prompts_lose_their_start() -> None:
    example = completion_example(range(1, 9), [20, 21], 0, max_length=6)
    assert example == ([6, 7, 8, 20, 21, 0], [-100] * 3 + [20, 21, 0])
    with pytest.raises(ValueError, match="a completion of 3 tokens leaves no room"):
        completion_example([1], [20, 21], 0, max_length=3)
    with pytest.raises(ValueError, match="needs a prompt and a completion, got 0 and 1"):
        completion_example([], [20], None)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes"},
]


def test_chatml() -> None:
    chat = CHAT_FORMATS["chatml"]
    whole = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert chat.prompt(CONVERSATION[:2]) == whole
    first, second = chat.examples(CONVERSATION)
    assert first == (whole, "4<|im_end|>")
    assert second[0].startswith(whole + "4<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n")
    assert second[1] == "Yes<|im_end|>"


@pytest.mark.parametrize("name", list(CHAT_FORMATS))
def test_training_and_generation_see_the_same_prompt(name: str) -> None:
    chat = CHAT_FORMATS[name]
    for place, (prompt, _) in zip((2, 4), chat.examples(CONVERSATION), strict=True):
        assert prompt == chat.prompt(CONVERSATION[:place])
    texts = [m["content"] for m in CONVERSATION[:-1]]
    assert all(text in chat.prompt(CONVERSATION[:-1]) for text in texts)


def test_chat_messages_errors() -> None:
    chat = CHAT_FORMATS["dialogue"]
    assert chat.prompt(CONVERSATION[1:2]) == "USER: 2+2?\nASSISTANT: "
    with pytest.raises(ValueError, match="role must be one of system, user, assistant, got 'me'"):
        chat.prompt([{"role": "me", "content": "x"}])
    with pytest.raises(ValueError, match="the first message must not be the assistant's"):
        chat.examples(CONVERSATION[2:])
    with pytest.raises(ValueError, match="must have a turn of the assistant"):
        chat.examples(CONVERSATION[:2])
    with pytest.raises(ValueError, match="must have a role and content"):
        chat.prompt([{"role": "user"}])


@pytest.mark.parametrize("kind", ["decoder", "recurrent", "transformers"])
def test_classifier_ignores_padding_on_either_side(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "decoder":
        model: nn.Module = DecoderLanguageModel(50, 32, 4, 2, 0)
    elif kind == "recurrent":
        model = RecurrentLanguageModel(50, 16, 2, 0)
    else:
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    classifier = SequenceClassifier(model, 3)
    text = torch.tensor([[7, 0, 9, 4]])  # the padding id inside a text is a token like others
    alone = classifier(text)
    right = classifier(torch.tensor([[7, 0, 9, 4, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]]))
    left = classifier(torch.tensor([[0, 0, 7, 0, 9, 4]]), torch.tensor([[0, 0, 1, 1, 1, 1]]))
    # Sums over other numbers of keys round differently in fp32.
    torch.testing.assert_close(right, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left, alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="text 0 is empty"):
        classifier(text, torch.zeros(1, 4))


def test_classifier_learns_with_updates_only() -> None:
    torch.manual_seed(0)
    model = DecoderLanguageModel(20, 16, 2, 1, 0)
    adapter = lmfast.training.lora(model, 4)
    classifier = SequenceClassifier(model, 2)
    ids = torch.randint(1, 20, (64, 6))
    labels = (ids[:, -1] > 9).long()
    trained = [*adapter.parameters(), *classifier.head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        classifier.loss(ids, labels).backward()
        optimizer.step()
    assert (classifier(ids).argmax(1) == labels).float().mean() > 0.95


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = lmfast.BPETokenizer.train(
        ["ask red answer blue"] * 3, 270, special_tokens=["<pad>", "<eos>"]
    )
    model = DecoderLanguageModel(tokenizer.vocab_size, 32, 4, 2, tokenizer.pad_id)
    save_model(tmp_path / "base", model)
    tokenizer.save(tmp_path / "base" / "tokenizer.json")
    return tmp_path


@pytest.mark.parametrize("options", [["--lora", "4"], []], ids=["lora", "whole"])
def test_command(trained: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": "ask red", "completion": " blue"}] * 8
    lines += [{"messages": CONVERSATION[1:3]}] * 8
    data = trained / "data.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    out = trained / "out"
    command = ["finetune", "--model", str(trained / "base"), "--data", str(data)]
    command += ["--out", str(out), "--epochs", "40", "--learning-rate", "0.02", "--quiet"]
    assert main([*command, *options]) == 0
    assert "16 examples, 40 steps" in capsys.readouterr().out
    with open(out / "log.csv", encoding="utf-8") as log:
        losses = [float(row["loss"]) for row in csv.DictReader(log) if row["loss"]]
    assert losses[-1] < losses[0] / 4
    assert main(["generate", "--model", str(out), "--prompt", "ask red"]) == 0
    assert "ask red blue" in capsys.readouterr().out
    if options:
        merged, base = load_model(out), load_model(trained / "base")
        LoRA.load(out / "adapter", base)
        ids = torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(base(ids), merged(ids), rtol=1e-4, atol=1e-4)
    assert main([*command, *options]) == 1
    assert "holds a model already" in capsys.readouterr().err


def test_command_names_bad_lines(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = trained / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', encoding="utf-8")
    out = trained / "out"
    command = ["finetune", "--model", str(trained / "base"), "--data", str(data), "--out", str(out)]
    assert main(command) == 1
    assert "data.jsonl:2: the line must have texts prompt and completion" in capsys.readouterr().err
    data.write_text("\n", encoding="utf-8")
    assert main(command) == 1
    assert "data.jsonl has no example" in capsys.readouterr().err
    assert not out.exists()
    data.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    for typed, told in (
        (["--dropout", "0.1"], "--dropout 0.1 is of --lora RANK"),
        (["--alpha", "16"], "--alpha 16.0 is of --lora RANK"),  # its default, typed all the same
        (["--format", "chatml"], "--format chatml is of messages, and"),
    ):
        assert main([*command, *typed]) == 1
        assert told in capsys.readouterr().err
