"""``shira-moments`` as people call it, and its file in ``shira-measure``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

from shira_cli import convert, measure, moments
from shira_format.calibration.moments import Moments
from shira_format.calibration.texts import batches, read_texts
from shira_format.errors import SourceError
from tests import models

Capture = pytest.CaptureFixture[str]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "four"]
TEXTS = ["one two", "three", "four three two one two three", "two two two"]


def run(*arguments: str | Path) -> int:
    return moments.main([str(argument) for argument in arguments])


def tokenizer(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT with its tokenizer, and texts."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, max_position_embeddings=16)  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "model")
    tokenizer(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return tmp_path


def by_hand(folder: Path, module: str) -> np.ndarray:
    """The mean of x x^T over all tokens of all texts, each text alone and without padding."""
    model, rows = BertModel.from_pretrained(folder / "model").eval(), []
    model.get_submodule(module).register_forward_pre_hook(lambda _, args: rows.append(args[0][0].double()))
    words = BertTokenizerFast.from_pretrained(folder / "model")
    with torch.no_grad():
        for text in TEXTS:
            model(**words(text, return_tensors="pt"))
    x = torch.cat(rows).numpy()
    return x.T @ x / len(x)


def test_the_file_holds_the_moments_of_the_texts(folder: Path, capsys: Capture) -> None:
    out = folder / "m.safetensors"
    assert 0 == run(folder / "model", "--texts", folder / "texts.txt", "-o", out, "--batch", "3")
    text, err = capsys.readouterr()
    assert "note: texts are cut after 16 tokens, the most that the model takes\n" == err
    assert f"{out}: 16 weights, 4 texts, " in text
    found = Moments.read(out)
    for module in ("encoder.layer.1.attention.self.query", "encoder.layer.0.output.dense"):
        one = found[f"{module}.weight"]
        np.testing.assert_allclose(one.blocks[0, 0], by_hand(folder, module), rtol=1e-5, atol=1e-6)
        assert 20 == one.samples  # 12 words, and two marks for each text: padding does not count
    assert found["embeddings.word_embeddings.weight"].inputs_first


def test_options(folder: Path, capsys: Capture) -> None:
    out, texts = folder / "m.safetensors", folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"line": text}) + "\n\n" for text in TEXTS))
    wanted = ("--field", "line", "--limit", "2", "--include", "layer", "--exclude", "attention", "--block", "5", "--dtype", "float32")  # fmt: skip
    arguments = (folder / "model", "--texts", texts, "-o", out, *wanted, "--json")
    assert 0 == run(*arguments, "--dry-run", "--quiet")
    dry, err = capsys.readouterr()
    assert "" == err
    assert not out.exists()
    assert 0 == run(*arguments)
    wet, err = capsys.readouterr()
    assert "note: 1 empty lines are left out" in err
    planned, made = json.loads(dry), json.loads(wet)
    assert [2, 4] == [made["texts"], len(made["weights"])]
    assert [None, str(out)] == [planned["file"], made["file"]]
    for one, other in zip(planned["weights"], made["weights"], strict=True):
        assert one | {"samples": 7} == other
        assert [5, 4 * -(-one["width"] // 5) * 25] == [one["block"], one["nbytes"]]
    assert {np.dtype(np.float32)} == {one.blocks.dtype for one in Moments.read(out).values()}
    assert 1 == run(*arguments)
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert 0 == run(*arguments, "--force")


def test_names_are_those_of_the_files(folder: Path, capsys: Capture) -> None:
    """A file without the model's prefix, and a causal model whose head is tied to its embedding."""
    out = folder / "m.safetensors"
    config = LlamaConfig(vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=12, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer(folder / "llama")
    path = folder / "llama" / "model.safetensors"
    stripped = {name.removeprefix("model."): value for name, value in load_file(path).items()}
    save_file(stripped, path, {"format": "pt"})
    for options in ((), ("--causal",)):
        assert 0 == run(folder / "llama", "--texts", folder / "texts.txt", "-o", out, "--force", *options)
        assert (
            "not watched, because no tensor in the files has the name: lm_head.weight" in capsys.readouterr().err
        )
        assert {name for name in stripped if "norm" not in name} == set(Moments.read(out))


def test_the_real_model_and_real_adapters(tmp_path: Path, capsys: Capture) -> None:
    base, loras = models.minilm(), models.LORAS
    for task in ("spam", "genre"):
        assert 0 == convert.main(["lora_to_shira", str(loras / task), "--base", str(base), "-o", str(tmp_path / f"{task}.st"), "--self-contained", "--quiet"])  # fmt: skip
    texts, out = loras.parent / "text" / "spam.jsonl", tmp_path / "m.safetensors"
    arguments = (
        base,
        "--texts",
        texts,
        "--limit",
        "6",
        "--include",
        "encoder",
        "-o",
        out,
        "--quiet",
        "--inputs",
        "50",
    )
    assert 0 == run(*arguments)
    capsys.readouterr()
    assert 0 == measure.main(
        [str(tmp_path / "spam.st"), str(tmp_path / "genre.st"), "--moments", str(out), "--json"]
    )
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    assert 36 == pair["whole"]["fed"]
    assert -1 < pair["whole"]["interference"]["cosine"] < 1
    assert 0 < pair["whole"]["interference"]["energy_first"]
    for tensor in pair["tensors"]:  # but for the choice of the inputs: at each by itself nothing cancels
        met = tensor["interference"]
        assert met["disturbed_first"] < 3 * met["disturbed_first_each"]
    assert 0 == measure.main([str(tmp_path / "spam.st"), str(tmp_path / "genre.st"), "--moments", str(out)])
    shown = capsys.readouterr().out
    assert "disturbed 1, 2" in shown
    assert "at each 1, 2" in shown
    assert "projected at each input by itself" in shown
    before = out.read_bytes()
    assert 0 == run(*arguments, "--force", "--seed", "0")
    assert before == out.read_bytes()
    assert 0 == run(*arguments, "--force", "--seed", "1")
    assert before != out.read_bytes()


def test_errors_are_one_line_and_leave_nothing(folder: Path, capsys: Capture) -> None:
    texts, out, model = folder / "texts.txt", folder / "m.safetensors", folder / "model"
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"other": "b"}\n')
    (folder / "empty.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "nothing").mkdir()
    before = set(folder.iterdir())
    for arguments, reason in (
        (
            (model, "--texts", folder / "bad.jsonl", "-o", out),
            "bad.jsonl: line 2 is no object with a text in 'text'",
        ),
        ((model, "--texts", folder / "empty.txt", "-o", out), "holds no text"),
        ((model, "--texts", folder / "latin.txt", "-o", out), "not UTF-8"),
        ((model, "--texts", folder / "none.txt", "-o", out), "none.txt"),
        ((folder / "none", "--texts", texts, "-o", out), "no such folder"),
        ((folder / "nothing", "--texts", texts, "-o", out), "transformers cannot load it"),
        (
            (model, "--texts", texts, "-o", out, "--include", "nowhere"),
            "no layer of the model is left by include and exclude",
        ),
        ((model, "--texts", texts, "-o", model / "m.safetensors"), "is in the folder of the model"),
        ((model, "--texts", texts, "-o", texts, "--force"), "is the file of texts"),
    ):
        assert 1 == run(*arguments, "--quiet")
        told, err = capsys.readouterr()
        assert ("", 1) == (told, err.count("\n")), err
        assert reason in err
    assert before == set(folder.iterdir())
    with pytest.raises(SystemExit, match="2"):
        run(model, "--texts", texts, "-o", out, "--batch", "0")


def test_weights_of_a_block_must_be_there(folder: Path, capsys: Capture) -> None:
    path, texts, out = folder / "model" / "model.safetensors", folder / "texts.txt", folder / "m.safetensors"
    weights = load_file(path)
    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(kept, path, {"format": "pt"})
    assert 0 == run(folder / "model", "--texts", texts, "-o", out)
    assert "warning: 2 weights are not in the folder and are random: pooler.dense.bias" in capsys.readouterr().err
    assert "pooler.dense.weight" not in Moments.read(out)
    del kept["encoder.layer.0.output.dense.weight"]
    save_file(kept, path, {"format": "pt"})
    assert 1 == run(folder / "model", "--texts", texts, "-o", out, "--force")
    assert "1 weights of BertModel are missing, such as 'encoder.layer.0.output" in capsys.readouterr().err


def test_without_transformers(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 1 == run(folder / "model", "--texts", folder / "texts.txt", "-o", folder / "m.safetensors")
    assert "pip install 'shira-format[demo]'" in capsys.readouterr().err


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nbroken\n')
    assert ["a"] == read_texts(tmp_path / "a.jsonl", limit=1).texts
    with pytest.raises(SourceError, match="line 2 is not JSON"):
        read_texts(tmp_path / "a.jsonl", limit=2)


def test_padding_needs_a_token(folder: Path) -> None:
    words = BertTokenizerFast.from_pretrained(folder / "model")
    words.pad_token = None
    assert 4 == len(list(batches(words, TEXTS, batch=1, length=8)))
    with pytest.raises(SourceError, match="use a batch size of 1"):
        list(batches(words, TEXTS, batch=2, length=8))
    words.eos_token = "[SEP]"
    masks = [batch["attention_mask"].sum(1).tolist() for batch in batches(words, TEXTS, batch=2, length=5)]
    assert [[3, 4], [5, 5]] == masks  # the shortest texts first, cut after five tokens


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_leaves_nothing(folder: Path) -> None:
    texts = folder / "many.txt"
    texts.write_text("one two three\n" * 200_000)
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "shira_cli.moments", str(folder / "model"), "--texts", str(texts), "-o", str(folder / "m.safetensors"), "--batch", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # the note on the length: the model is loaded, and the texts are next
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (130, "") == (process.returncode, out)
    assert "shira-moments: error: interrupted; nothing was written\n" in err
    assert before == set(folder.iterdir())
