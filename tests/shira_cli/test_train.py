"""``shira-train`` as people call it, on tiny models, and once on a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
)

from shira_cli import mask, train
from shira_cli.train_picture import draw, running_mean
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.live import Switcher
from shira_format.training.report import Quality, Run, TrainingReport
from shira_format.training.sparse import sparse_parameters

Capture = pytest.CaptureFixture[str]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "four", "five", "six"]


def run(*arguments: object) -> int:
    return train.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and a tiny Llama with a tokenizer, and texts whose labels are their first words."""
    found = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16)).save_pretrained(found / "bert")  # fmt: skip
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, max_position_embeddings=16)).bfloat16().save_pretrained(found / "llama")  # fmt: skip
    for name in ("bert", "llama"):
        (found / name / "vocab.txt").write_text("\n".join(WORDS))
        BertTokenizerFast(str(found / name / "vocab.txt")).save_pretrained(found / name)
    draw = np.random.default_rng(0)
    lines = []
    for number in range(40):
        rest = " ".join(draw.choice(WORDS[7:], 3))
        lines.append({"text": f"{'one' if number % 2 else 'two'} {rest}", "label": number % 2})
    (found / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:7]))
    return found


def classify(folder: Path, out: Path) -> list[object]:
    return ["--base", folder / "bert", "--data", folder / "texts.jsonl", "--task", "classify", "-o", out]


def test_a_classifier(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out, picture = tmp_path / "a.st", tmp_path / "a.png"
    options = (
        "--density",
        "0.1",
        "--steps",
        "30",
        "--lr",
        "0.05",
        "--test",
        folder / "test.jsonl",
        "--compare",
        "lora",
    )
    assert 0 == run(*classify(folder, out), *options, "--picture", picture)
    text, err = capsys.readouterr()
    assert "are trained on 32 texts; 8 are held out" in err
    assert "accuracy on test" in text
    assert {"base", "sparse adapter", "LoRA"} <= {line.split("  ")[0] for line in text.splitlines()}
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = load(out)
    assert "training" == found.manifest["source"]["kind"]
    assert ["0", "1"] == found.manifest["source"]["labels"]
    assert "wm" == found.manifest["mask"]["rule"]
    assert {"classifier.weight", "classifier.bias"} == set(found.dense)
    assert all(name.startswith("encoder.layer.") for name in found)
    # The file alone makes of the base what was measured.
    model = AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=2).eval()
    Switcher(model).load(out)
    tokenizer = BertTokenizerFast.from_pretrained(folder / "bert")
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = model(**tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")).logits
    accuracy = float((logits.argmax(-1) == torch.tensor([row["label"] for row in rows])).float().mean())
    (line,) = [line for line in text.splitlines() if line.startswith("sparse adapter")]
    assert f"{100 * accuracy:.2f} %" == " ".join(line.split()[-2:])


def test_a_causal_model_with_a_mask_file(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    masked, out = tmp_path / "mask.st", tmp_path / "a.st"
    assert 0 == mask.main(["--base", str(folder / "llama"), "--rule", "rand", "--density", "0.2", "--include", "layers", "-o", str(masked), "--quiet"])  # fmt: skip
    capsys.readouterr()
    arguments = ("--base", folder / "llama", "--data", folder / "texts.jsonl", "--task", "causal", "--steps", "20", "--lr", "0.02", "-o", out)  # fmt: skip
    assert 0 == run(*arguments, "--mask", masked, "--json", "--quiet")
    told, err = capsys.readouterr()
    found = json.loads(told)
    assert "" == err
    (one,) = found["runs"]
    assert one["validation"]["perplexity"] < found["base"]["validation"]["perplexity"]
    assert one["validation"]["loss"] == pytest.approx(min(v["loss"] for v in one["validations"]), rel=0.05)
    adapter, entries = load(out), load(masked)
    assert adapter.keys() == entries.keys()
    assert all(np.array_equal(adapter[name].indices, entries[name].indices) for name in adapter)
    assert {"bfloat16"} == {str(tensor.dtype) for tensor in adapter.values()}
    assert found["nnz"] == sum(tensor.nnz for tensor in adapter.values())


@pytest.mark.parametrize("rule", ["grad", "struct", "neuroada"])
def test_other_masks_dora_and_the_learning_rate_search(
    rule: str, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "a.st"
    extra = {"grad": ("--scope", "global"), "struct": ("--dora",), "neuroada": ("--lr", "auto")}[rule]
    assert 0 == run(*classify(folder, out), "--mask", rule, "--density", "0.2", "--steps", "6", *extra, "--json", "--quiet")  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert rule == found["mask"]["rule"] == load(out).manifest["mask"]["rule"]
    assert (5 if rule == "neuroada" else 0) == len(found["runs"][0]["tried"])
    if rule == "neuroada":
        best = min(found["runs"][0]["tried"], key=lambda one: one["loss"])
        assert best["learning_rate"] == found["runs"][0]["learning_rate"]


@pytest.mark.parametrize(("model", "task"), [("bert", "classify"), ("llama", "causal")])
def test_the_lowest_fisher_information(
    model: str, task: str, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Of single texts, with labels or next tokens that the model draws: the same file each time, another for another seed."""
    arguments = ("--base", folder / model, "--data", folder / "texts.jsonl", "--task", task, "--mask", "talos", "--scope", "global", "--density", "0.2", "--steps", "1", "--quiet")  # fmt: skip
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert 0 == run(*arguments, "--seed", seed, "-o", tmp_path / f"{name}.st")
    capsys.readouterr()
    a, b, c = (load(tmp_path / f"{name}.st") for name in "abc")
    assert a == b
    assert "talos" == a.manifest["mask"]["rule"]
    assert sum(tensor.nnz for tensor in a.values()) == sum(tensor.nnz for tensor in c.values())
    assert any(name not in c or not np.array_equal(a[name].indices, c[name].indices) for name in a)


def test_entries_that_change(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "a.st"
    common = ("--mask", "spiel", "--density", "0.2", "--steps", "8", "--evaluations", "2", "--patience", "9", "--json", "--quiet")  # fmt: skip
    assert 0 == run(*classify(folder, out), *common, "--regrow-every", "3", "--lr", "auto")
    found = json.loads(capsys.readouterr().out)
    assert {"rule": "spiel", "start": "rand", "seed": 0, "every": 3, "summed": 3, "rate": 0.2} == found["mask"] == load(out).manifest["mask"]  # fmt: skip
    assert 5 == len(found["runs"][0]["tried"])
    assert 0 == run(*classify(folder, tmp_path / "rand.st"), "--mask", "rand", "--density", "0.2", "--steps", "1")
    capsys.readouterr()
    regrown, rand = load(out), load(tmp_path / "rand.st")
    assert {name: tensor.nnz for name, tensor in regrown.items()} == {name: tensor.nnz for name, tensor in rand.items()}  # fmt: skip
    shared = sum(np.isin(regrown[name].indices, rand[name].indices).sum() for name in rand)
    assert shared < 0.5 * sum(tensor.nnz for tensor in rand.values())
    assert 0 == run(*classify(folder, tmp_path / "b.st"), *common)
    assert 1 == json.loads(capsys.readouterr().out)["mask"]["every"]


@pytest.mark.parametrize("mask", ["wm", "spiel"])
def test_a_run_goes_on_from_its_checkpoints(
    mask: str, folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: tuple[Any, ...] = ("--mask", mask, "--density", "0.1", "--lr", "0.02", "--evaluations", "2", "--steps", "8", "--quiet")  # fmt: skip
    common += ("--regrow-every", "3") if mask == "spiel" else ()
    kept = ("--checkpoints", tmp_path / "run")
    assert 0 == run(*classify(folder, tmp_path / "whole.st"), *common)
    with monkeypatch.context() as patched:
        log = Trainer.log

        def stopped(self: Any, *given: Any, **named: Any) -> None:
            if self.state.global_step == 6:
                raise KeyboardInterrupt
            log(self, *given, **named)

        patched.setattr(Trainer, "log", stopped)
        assert 0 != run(*classify(folder, tmp_path / "again.st"), *common, *kept)
    assert ["checkpoint-4"] == [path.name for path in (tmp_path / "run").iterdir()]
    assert not (tmp_path / "again.st").exists()
    assert 0 == run(*classify(folder, tmp_path / "again.st"), *common, *kept)
    assert load(tmp_path / "whole.st") == load(tmp_path / "again.st")


def test_nothing_that_is_read_or_not_its_own_is_removed(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """The state beside the adapter, and checkpoints: old ones are removed."""
    out, state, kept = tmp_path / "a.st", tmp_path / "a.st.state", tmp_path / "kept"
    texts = (folder / "texts.jsonl").read_bytes()
    state.write_bytes(texts)
    data = ["--base", folder / "bert", "--data", state, "--task", "classify", "-o", out, "--steps", "1"]
    model = BertModel(BertConfig.from_pretrained(folder / "bert"))
    sparse_parameters(model, {"encoder.layer.0.output.dense.weight": np.arange(3)}).save_state(tmp_path / "b.st")
    own = (tmp_path / "b.st.state").read_bytes()
    short = [*classify(folder, out), "--steps", "1"]
    for content, arguments, reason in (
        (texts, data, "a.st.state: exists; --force replaces it"),
        (texts, [*data, "--force"], "a.st.state: is one of the inputs"),
        (texts, [*short, "--force"], "a.st.state: not a training state, and so not removed"),
        (own, short, "a.st.state: exists; --force replaces it"),
    ):
        state.write_bytes(content)
        assert 1 == run(*arguments)
        assert reason in capsys.readouterr().err
        assert content == state.read_bytes()
        assert not out.exists()
    state.unlink()
    (kept / "checkpoint-3").mkdir(parents=True)
    (kept / "checkpoint-9").mkdir()
    (kept / "checkpoint-9" / "adapter.st").write_bytes(b"")
    assert 1 == run(*short, "--checkpoints", kept)
    assert "checkpoint-3: has no adapter.st" in capsys.readouterr().err
    (kept / "checkpoint-3" / "adapter.st").write_bytes(b"")
    test = kept / "checkpoint-3" / "test.jsonl"
    test.write_bytes((folder / "test.jsonl").read_bytes())
    assert 1 == run(*short, "--checkpoints", kept, "--test", test)
    assert "checkpoint-3: holds " in capsys.readouterr().err
    assert test.exists()
    state.write_bytes(own)
    assert 0 == run(*short, "--force")
    assert out.exists()
    assert not state.exists()


def test_errors_are_one_line_and_leave_nothing(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 1}\n')
    (tmp_path / "none.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "few.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    (tmp_path / "other.jsonl").write_text('{"text": "a", "label": 5}\n{"text": "b", "label": 6}\n')
    (tmp_path / "empty").mkdir()
    before, out = set(tmp_path.iterdir()), tmp_path / "a.st"
    for changes, reason in (
        ({"--data": tmp_path / "one.jsonl"}, "a classifier needs two or more"),
        ({"--data": tmp_path / "none.jsonl"}, "line 1 has no 'label'"),
        ({"--data": tmp_path / "few.jsonl"}, "nothing can be held out"),
        ({"--base": tmp_path / "empty"}, "has neither config.json nor a GGUF file"),
        ({"--base": tmp_path / "nothing"}, "no such folder"),
        ({"--test": tmp_path / "other.jsonl"}, "is not among those to train"),
        ({"--include": "nothing"}, "no weight of two dimensions or more is left"),
        ({"--task": "causal"}, "weights are missing"),
        ({"-o": folder / "bert" / "a.st"}, "is in the folder of the model"),
    ):
        arguments = dict(zip(*[iter(classify(folder, out))] * 2, strict=True)) | changes  # type: ignore[call-overload]
        assert 1 == run(*(word for pair in arguments.items() for word in pair), "--steps", "1"), reason
        told, err = capsys.readouterr()
        assert "" == told
        assert reason in err.splitlines()[-1]
    assert before == set(tmp_path.iterdir())
    for extra, reason in (
        (("--lr", "fast"), "neither a positive number nor auto"),
        (("--mask", "best"), "neither a file nor one of"),
        (("--regrow-every", "5"), "has no meaning without --mask spiel"),
        (("--mask", "spiel", "--dora"), "goes without --dora, --runs and --scope row"),
        (("--mask", "spiel", "--runs", "8"), "goes without --dora, --runs and --scope row"),
        (("--steps", "1", "--epochs", "1"), "exclude each other"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*classify(folder, out), *extra)
        assert reason in capsys.readouterr().err


def test_the_picture(tmp_path: Path) -> None:
    losses = [1.0, 2.0, 6.0, 3.0]
    assert losses == running_mean(losses).tolist()
    many = np.arange(100.0)
    assert [1.0, 1.5, 2.0, *range(3, 97)] == running_mean(many)[:97].tolist()
    made = Run("shira", 5, steps=4, best_step=2, losses=list(enumerate(losses, 1)), quality=Quality(1, 1.0, None))
    report = TrainingReport("causal", runs=[made])
    for form, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        draw(report, tmp_path / f"a.{form}")
        first = (tmp_path / f"a.{form}").read_bytes()
        assert first.startswith(start)
        draw(report, tmp_path / f"a.{form}")
        assert first == (tmp_path / f"a.{form}").read_bytes()
    with pytest.raises(SourceError, match="pictures are written as png, svg, pdf"):
        draw(report, tmp_path / "a.gif")
