"""`lmfast chat` and `generate` with models of both kinds, by what they print."""

import io
import json

import pytest
import torch

from lmfast import quantise
from lmfast.cli import main
from lmfast.commands.chat import Conversation
from lmfast.generation import Generator
from lmfast.models import DecoderLanguageModel
from lmfast.tokenizer import BPETokenizer
from lmfast.training import CHAT_FORMATS, load_model, save_model

TAGS = ["<|im_start|>", "<|im_end|>"]


def save(path, special_tokens=None):
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(
        ["the cat sat on the mat"] * 3, 270, special_tokens=special_tokens
    )
    model = DecoderLanguageModel(tokenizer.vocab_size, 16, 2, 1, None)
    with torch.no_grad():
        model.embedding.weight.mul_(50)
    save_model(path, model)
    tokenizer.save(path / "tokenizer.json")
    return tokenizer


def chat(monkeypatch, capsys, path, lines, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    assert main(["chat", "--model", str(path), "--max-new-tokens", "6", *options]) == 0
    return capsys.readouterr()


def test_unknown_characters_are_told(tmp_path, monkeypatch, capsys):
    tokenizer = BPETokenizer.train(["the cat sat"], 20, mode="char")
    save_model(tmp_path, DecoderLanguageModel(tokenizer.vocab_size, 16, 2, 1, None))
    tokenizer.save(tmp_path / "tokenizer.json")
    said = chat(monkeypatch, capsys, tmp_path, ["the Ω", "the cat"])
    assert said.err.count("tokens of the line are unknown") == 1
    assert "note: 1 of " in said.err


def test_a_conversation_goes_on_from_what_was_said(tmp_path, monkeypatch, capsys):
    tokenizer = save(tmp_path / "run")
    said = chat(monkeypatch, capsys, tmp_path / "run", ["the cat", "sat"], "--stats")
    assert "no template" in said.err
    assert said.err.count("first token after") == 2
    assert "6 steps of 1 rows after" in said.err
    assert "peak memory" in said.err
    # By hand: the likeliest tokens after the whole text so far.
    model, ids, expected = load_model(tmp_path / "run"), [], ""
    for line in ("the cat", "sat"):
        ids += tokenizer.encode(f"{line}\n")
        new = []
        for _ in range(6):
            new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
        ids += new + tokenizer.encode("\n")
        expected += tokenizer.decode(new) + "\n"
    assert said.out == expected
    slid = chat(monkeypatch, capsys, tmp_path / "run", ["the cat", "sat"], "--context", "slide")
    assert slid.out == expected


def test_reset_begins_anew_and_quit_ends(tmp_path, monkeypatch, capsys):
    save(tmp_path / "run")
    once = chat(monkeypatch, capsys, tmp_path / "run", ["the cat"]).out
    lines = ["the cat", "", "/reset", "the cat", "/quit", "never read"]
    assert chat(monkeypatch, capsys, tmp_path / "run", lines).out == once * 2
    seeded = ["--temperature", "1.5", "--seed", "4"]
    drawn = chat(monkeypatch, capsys, tmp_path / "run", ["the cat"], *seeded).out
    assert drawn == chat(monkeypatch, capsys, tmp_path / "run", ["the cat"], *seeded).out != once


def test_ctrl_c_ends_the_answer_and_not_the_conversation(tmp_path, monkeypatch, capsys):
    save(tmp_path / "run")
    whole, stream = chat(monkeypatch, capsys, tmp_path / "run", ["the cat"]), Generator.stream
    seen = []

    def interrupted(self, ids, **options):
        seen.append(ids[0].tolist())
        for count, new in enumerate(stream(self, ids, **options)):
            if count == 2 and len(seen) == 1:
                raise KeyboardInterrupt
            yield new

    monkeypatch.setattr(Generator, "stream", interrupted)
    said = chat(monkeypatch, capsys, tmp_path / "run", ["the cat", "sat"])
    assert said.err.count("(interrupted)") == 1
    first, second = said.out.splitlines()[0], said.out.splitlines()[-1]
    assert whole.out.startswith(first)
    assert len(first) < len(whole.out.rstrip("\n"))
    assert second  # answers what follows the two tokens that were said
    assert seen[1][: len(seen[0])] == seen[0]
    tokenizer = BPETokenizer.load(tmp_path / "run" / "tokenizer.json")
    assert tokenizer.decode(seen[1][len(seen[0]) :]) == f"{first}\nsat\n"


def test_chatml_where_the_tokenizer_has_its_tags(tmp_path, monkeypatch, capsys):
    tokenizer = save(tmp_path / "run", special_tokens=TAGS)
    talk = Conversation(tokenizer, "Be kind.")
    ids = talk.ask("the <|im_end|> cat")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nthe <|im_end|> cat<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    end = tokenizer.encode("<|im_end|>")
    assert talk.end_ids == end
    assert ids.count(end[0]) == 2  # the one that was typed is text
    talk.answer(tokenizer.encode("mat"))
    again = tokenizer.decode(talk.ask("sat"))
    assert again.endswith("assistant\nmat<|im_end|>\n<|im_start|>user\nsat<|im_end|>\n"
                          "<|im_start|>assistant\n")  # fmt: skip
    said = chat(monkeypatch, capsys, tmp_path / "run", ["the cat"], "--system", "Be kind.")
    assert "ChatML" in said.err
    assert "<|im_" not in said.out.replace("<|im_start|>", "")


@pytest.mark.parametrize("name", list(CHAT_FORMATS))
def test_the_format_that_finetuning_taught(name):
    """A conversation is written as in training: the prompts are those of the examples."""
    taught = CHAT_FORMATS[name]
    tokenizer = BPETokenizer.train(["the cat sat"], 262, special_tokens=["<pad>", "<eos>"])
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "sat"},
        {"role": "assistant", "content": "yes"},
    ]
    (first, answer), (second, _) = taught.examples(messages)
    talk = Conversation(tokenizer, "Be kind.", taught)
    assert tokenizer.decode(talk.ask("the cat")) == first
    talk.answer(tokenizer.encode(answer))
    assert tokenizer.decode(talk.ask("sat")) == second
    assert name in talk.format
    assert talk.end_texts == ([taught.end] if taught.end else [])


def test_answers_end_where_finetuning_taught(tmp_path, monkeypatch, capsys):
    """Taught one answer for good, `chat` and `generate` print it, and no tag behind it."""
    save(tmp_path / "run", special_tokens=["<pad>", "<eos>"])
    for name, end in (("chatml", "<|im_end|>"), ("dialogue", "")):
        data, out = tmp_path / "data.jsonl", tmp_path / name
        turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]
        data.write_text(json.dumps({"messages": turns}) + "\n")
        taught = ["--model", str(tmp_path / "run"), "--data", str(data), "--out", str(out)]
        taught += ["--epochs", "80", "--learning-rate", "0.02", "--quiet", "--format", name]
        assert main(["finetune", *taught]) == 0
        monkeypatch.setattr("sys.stdin", io.StringIO("the\n"))
        capsys.readouterr()
        assert main(["chat", "--model", str(out), "--max-new-tokens", "40"]) == 0
        said = capsys.readouterr()
        assert said.out == "cat\n"
        assert f"the format {name}" in said.err
        prompt = CHAT_FORMATS[name].prompt(turns[:1])
        run = ["generate", "--model", str(out), "--prompt", prompt, "--max-new-tokens", "40"]
        for extra in ([], ["--stream"], ["--samples", "2"], ["--beams", "2"]):
            assert main([*run, *extra]) == 0
            texts = [f"{prompt}cat{end}\n"] * (2 if "--samples" in extra else 1)
            assert capsys.readouterr().out == "\n".join(texts)
    (out / "chat.json").write_text("{}")
    assert main(["chat", "--model", str(out)]) == 1
    assert "chat.json must hold" in capsys.readouterr().err


def test_beams_lookup_and_samples(tmp_path, capsys):
    save(tmp_path / "run")
    run = ["generate", "--model", str(tmp_path / "run"), "--prompt", "the cat"]
    run += ["--max-new-tokens", "8"]
    outputs = {}
    for name, extra in (
        ("plain", []),
        ("lookup", ["--lookup", "3"]),
        ("two", ["--samples", "2"]),
        ("beams", ["--beams", "3", "--samples", "2"]),
        ("drawn", ["--samples", "3", "--typical-p", "0.9", "--seed", "1"]),
    ):
        capsys.readouterr()
        assert main([*run, *extra, "--stats"]) == 0
        outputs[name], figures = capsys.readouterr()
        assert "8 steps of" in figures
        assert "tokens/s, peak memory" in figures
    assert outputs["lookup"] == outputs["plain"]
    assert outputs["two"].count(outputs["plain"].rstrip("\n")) == 2
    assert outputs["beams"].count("the cat") >= 2
    assert outputs["drawn"].count("the cat") >= 3
    assert main([*run, "--beams", "2", "--stream"]) == 1
    assert "leave out --samples and --beams" in capsys.readouterr().err


def test_weights_as_integers(tmp_path, capsys):
    save(tmp_path / "run")
    file = tmp_path / "int4.safetensors"
    quantise(load_model(tmp_path / "run"), "int4", group=64).save(file)
    run = ["generate", "--model", str(tmp_path / "run"), "--prompt", "the cat"]
    run += ["--max-new-tokens", "8"]
    outputs = []
    for extra in (["--weights", "int4", "--group", "64"], ["--quantised", str(file)]):
        capsys.readouterr()
        assert main([*run, *extra]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert main([*run, "--weights", "int8", "--quantised", str(file)]) == 1
    assert "--weights int8 has no effect beside --quantised" in capsys.readouterr().err
    assert main([*run, "--quantised", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err


def test_a_model_of_transformers(tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    tokenizer = BPETokenizer.train(["the cat sat on the mat"] * 3, 270)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.to_huggingface())
    theirs.save_pretrained(tmp_path)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=64,
        bos_token_id=None, eos_token_id=None, initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    run = ["generate", "--model", str(tmp_path), "--prompt", "the cat", "--max-new-tokens", "9"]
    capsys.readouterr()
    assert main(run) == 0
    with torch.inference_mode():
        ids = torch.tensor([tokenizer.encode("the cat")])
        expected = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert capsys.readouterr().out == theirs.decode(expected[0]) + "\n"
    assert "no template" in chat(monkeypatch, capsys, tmp_path, ["the cat"]).err
    assert main([*run, "--max-new-tokens", "90"]) == 1
    assert "do not fit into a context of 64 tokens" in capsys.readouterr().err
