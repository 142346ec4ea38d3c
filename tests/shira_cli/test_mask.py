"""``shira-mask`` as people call it, and the losses of its texts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import shira_format as shira
from shira_cli import inspect, mask
from shira_format.errors import SourceError
from shira_format.masks import make_mask
from shira_format.masks.tasks import text_task, weights_in_files
from tests import models

Capture = pytest.CaptureFixture[str]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "four"]
TEXTS = ["one two", "three", "four three two one two three", "two two two", "one", "four four"]
SPAM = models.LORAS.parent / "text" / "spam.jsonl"


def run(*arguments: object) -> int:
    return mask.main([str(argument) for argument in arguments])


def save_tokenizer(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT, a tiny Llama with a tied head, and texts with labels."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 16}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=True)).save_pretrained(
        tmp_path / "llama"
    )
    for name in ("bert", "llama"):
        save_tokenizer(tmp_path / name)
    lines = [json.dumps({"text": text, "label": number % 2}) for number, text in enumerate(TEXTS)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_mask_of_a_checkpoint(folder: Path, capsys: Capture) -> None:
    out = folder / "m.st"
    assert 0 == run("--base", folder / "bert", "--density", "0.1", "--exclude", "embed", "-o", out)
    text, err = capsys.readouterr()
    assert "" == err
    assert "entries chosen by wm" in text
    expected = make_mask(folder / "bert", density=0.1, exclude=["embed"])
    assert expected == shira.load(out)
    assert expected.manifest.items() <= shira.load(out).manifest.items()
    assert 1 == run("--base", folder / "bert", "-o", out)
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert 0 == run("--base", folder / "bert", "-o", out, "--force", "--rule", "struct", "--lines", "columns", "--step", "4",
                    "--offset", "1", "--diagonal", "-1", "--json")  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert {"rule": "struct", "lines": "columns", "offset": 1, "step": 4, "diagonal": -1} == found["mask"]
    assert found["totals"]["nnz"] == sum(tensor.nnz for tensor in shira.load(out).values())


def test_inspect_shows_the_mask(folder: Path, capsys: Capture) -> None:
    out = folder / "m.st"
    assert 0 == run(
        "--base", folder / "bert", "--rule", "rand", "--rank", "1", "--runs", "8", "--seed", "3", "-o", out
    )
    assert 0 == inspect.main([str(out), "--verify", "--base", str(folder / "bert")])
    shown = capsys.readouterr().out
    assert "mask           rand, seed 3, runs 8\n" in shown
    assert "as many as a LoRA of rank 1, per tensor" in shown
    assert "fits the base  yes" in shown
    assert " none " in shown


def test_a_dry_run_says_the_same_and_writes_nothing(folder: Path, capsys: Capture) -> None:
    arguments = ("--base", folder / "bert", "--rule", "rand", "--rank", "1", "--json", "-o", folder / "m.st")
    before = set(folder.iterdir())
    assert 0 == run(*arguments, "--dry-run")
    dry = json.loads(capsys.readouterr().out)
    assert before == set(folder.iterdir())
    assert 0 == run(*arguments)
    wet = json.loads(capsys.readouterr().out)
    assert dry["tensors"] == wet["tensors"]
    assert wet["totals"]["file_bytes"] == (folder / "m.st").stat().st_size


@pytest.mark.parametrize("rule", ["grad", "snip", "gallop", "talos"])
@pytest.mark.parametrize(("model", "task"), [("bert", "classify"), ("llama", "causal")])
def test_gradients_of_texts(folder: Path, capsys: Capture, rule: str, model: str, task: str) -> None:
    arguments = (
        "--base",
        folder / model,
        "--rule",
        rule,
        "--data",
        folder / "texts.jsonl",
        "--task",
        task,
        "--scope",
        "global",
    )
    assert 0 == run(*arguments, "-o", folder / "m.st", "--batch", "4")
    err = capsys.readouterr().err
    assert ("the loss does not depend on them: pooler.dense.weight" in err) == (model == "bert")
    found = shira.load(folder / "m.st")
    assert 64 == len(found.manifest["mask"]["calibration_digest"])
    task_ = text_task(folder / model, folder / "texts.jsonl", task, batch=4, own_outputs=rule == "talos")
    live = task_.loaded.model
    renamed = {name.replace("bert.", ""): name for name, _ in live.named_parameters()}
    expected = make_mask(live, rule, scope="global", batches=task_.batches, loss=task_.loss, exclude=["pooler"])
    assert {renamed[name] for name in found} == set(expected)
    for name, tensor in found.items():
        assert expected[renamed[name]].indices.tolist() == tensor.indices.tolist()
    assert 0 == run(*arguments, "-o", folder / "again.st", "--batch", "4", "--at-once", "3", "--quiet")
    assert (folder / "m.st").read_bytes() == (folder / "again.st").read_bytes()


def test_the_causal_loss_is_that_of_transformers(folder: Path) -> None:
    task = text_task(folder / "llama", folder / "texts.jsonl", "causal", batch=3)
    model = task.loaded.model
    for batch in task.batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        assert torch.allclose(model(**batch, labels=labels).loss, task.loss(model, batch))
    assert (len(TEXTS), ()) == (task.texts, task.labels)


def test_the_classifier_is_fitted_to_the_labels(folder: Path) -> None:
    task = text_task(folder / "bert", folder / "texts.jsonl", "classify", batch=4)
    assert ("0", "1") == task.labels
    words = {text: number % 2 for number, text in enumerate(TEXTS)}
    for batch in task.batches:
        for row, label in zip(batch["input_ids"], batch["classes"], strict=True):
            text = task.loaded.tokenizer.decode(row, skip_special_tokens=True)
            assert words[text] == label
    with torch.no_grad():
        losses = [float(task.loss(task.loaded.model, batch)) for batch in task.batches]
    assert max(losses) < 0.3 < np.log(2)


def test_the_classifier_on_real_texts(tmp_path: Path) -> None:
    """A logistic regression on sentence embeddings, of use on texts that it has not seen."""
    lines = SPAM.read_text("utf-8").splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join(lines[:64]))
    task = text_task(models.minilm(), tmp_path / "some.jsonl", "classify", max_length=32)
    others = [json.loads(line) for line in lines[64:128]]
    batch = dict(
        task.loaded.tokenizer(
            [one["text"] for one in others], padding=True, truncation=True, max_length=32, return_tensors="pt"
        )
    )
    model = task.loaded.model
    with torch.no_grad():
        seen = np.mean([float(task.loss(model, batch)) for batch in task.batches])
        unseen = float(
            task.loss(model, batch | {"classes": [task.labels.index(str(one["label"])) for one in others]})
        )
    assert seen < 0.2
    assert unseen < 0.6 < np.log(2)
    weights, unknown = weights_in_files(model, shira.open_checkpoint(models.minilm()), include=["layer.0"])
    assert ([], 6) == (unknown, len(weights))


def test_outputs_of_the_model_itself_are_drawn_by_the_seed(folder: Path) -> None:
    losses = []
    for seed in (0, 0, 1):
        task = text_task(folder / "llama", folder / "texts.jsonl", "causal", batch=1, own_outputs=True, seed=seed)
        with torch.no_grad():
            losses.append(
                [
                    float(task.loss(task.loaded.model, batch))
                    for batch in task.batches
                    if batch["input_ids"].numel() > 2
                ]
            )
    assert losses[0] == losses[1] != losses[2]
    model, batch = task.loaded.model, task.batches[-1]
    with torch.no_grad():
        logits = model(**batch).logits[0, :-1]
    least = cross_entropy(logits, logits.argmax(-1))
    assert losses[2][-1] >= float(least)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--rule", "grad"), "--rule grad needs --data"),
        (("--data", "x.jsonl"), "--rule wm needs no --data"),
        (("--seed", "1"), "--seed has no meaning with --rule wm"),
        (("--lift-rank", "1"), "--lift-rank has no meaning"),
        (("--rule", "struct", "--runs", "8"), "ranks nothing"),
        (("--rule", "struct", "--step", "2", "--offset", "2"), "offset 2 is not"),
        (("--rule", "struct", "--diagonal", "1", "--no-diagonal"), "exclude each other"),
        (("--density", "0.1", "--rank", "2"), "exclude each other"),
        (("--runs", "3"), "runs of 3 entries"),
        (("--rule", "none"), "none"),
        (("--density", "0"), "not in (0, 1]"),
    ],
)
def test_wrong_usage(options: tuple[str, ...], why: str, folder: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        sys.exit(run("--base", folder / "bert", "-o", folder / "m.st", *options))
    assert 2 == caught.value.code
    assert why in capsys.readouterr().err
    assert not (folder / "m.st").exists()


def test_masks_within_and_without_others(folder: Path, capsys: Capture) -> None:
    base = ("--base", folder / "bert", "--include", "query")
    first, second, both, same = (folder / f"{name}.st" for name in ("first", "second", "both", "same"))
    assert 0 == run(*base, "--density", "0.1", "-o", first)
    assert 0 == run(*base, "--density", "0.1", "--without", first, "-o", second)
    assert 0 == run(*base, "--density", "0.1", "--band", "1", "-o", same)
    one, two, band = shira.load(first), shira.load(second), shira.load(same)
    assert all(np.array_equal(two[name].indices, band[name].indices) for name in one)
    assert ["first.st"] == two.manifest["selection"]["without"]
    capsys.readouterr()
    assert 0 == run("--combine", "union", first, second, "-o", both, "--json")
    found = json.loads(capsys.readouterr().out)
    assert {"rule": "union"} == found["mask"] == shira.load(both).manifest["mask"]
    assert found["totals"]["nnz"] == sum(tensor.nnz for tensor in (*one.values(), *two.values()))
    assert found["totals"]["file_bytes"] == both.stat().st_size
    for how, files, expected in (("difference", (both, second), one), ("intersection", (both, second), two)):
        assert 0 == run("--combine", how, *files, "-o", folder / f"{how}.st")
        made = shira.load(folder / f"{how}.st")
        assert made.keys() == expected.keys()
        assert all(np.array_equal(made[name].indices, expected[name].indices) for name in made)
    assert 0 == run(*base, "--density", "0.1", "--within", both, "--force", "-o", same)
    assert all(np.array_equal(shira.load(same)[name].indices, one[name].indices) for name in one)
    capsys.readouterr()
    for arguments, why in (
        (("--combine", "intersection", first, second), "has no entries"),
        ((*base, "--density", "0.5", "--within", first), "may be chosen"),
        (
            ("--base", folder / "bert", "--include", "key", "--within", first),
            "no weight has entries within the masks",
        ),
    ):
        assert 1 == run(*arguments, "-o", folder / "no.st")
        assert why in capsys.readouterr().err
    for arguments, why in (
        (("--combine", "union", first), "two masks or more"),
        ((first, second), "are for --combine"),
        (("--combine", "union", first, second, "--density", "0.1"), "--density has no meaning with --combine"),
        ((), "missing option '--base'"),
        ((*base, "--rule", "struct", "--without", first), "combine its mask with these"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(*arguments, "-o", folder / "no.st")
        assert 2 == caught.value.code
        assert why in capsys.readouterr().err
    assert not (folder / "no.st").exists()


def test_errors_are_one_line(folder: Path, capsys: Capture) -> None:
    (folder / "plain.txt").write_text("one\n")
    (folder / "none.jsonl").write_text('{"text": "one"}\n')
    (folder / "same.jsonl").write_text('{"text": "one", "label": "a"}\n{"text": "two", "label": "a"}\n')
    (folder / "short.jsonl").write_text('{"text": "", "label": "a"}\n{"text": "two", "label": "b"}\n')
    classify = ("--rule", "grad", "--task", "classify", "--data")
    for options, why in (
        ((*classify, folder / "plain.txt"), "needs labels: give .jsonl"),
        ((*classify, folder / "none.jsonl"), "line 1 has no 'label'"),
        ((*classify, folder / "same.jsonl"), "all labels are 'a'"),
        ((*classify, folder / "short.jsonl"), "1 lines have no text"),
        ((*classify, folder / "nowhere.jsonl"), "nowhere.jsonl"),
        (("--include", "nowhere"), "no weight of two dimensions or more is left"),
        (("--rank", "9"), "a LoRA of rank 9 has"),
        (("--rule", "rand", "--density", "0.5", "--band", "2"), "band 2 of"),
    ):
        assert 1 == run("--base", folder / "bert", "-o", folder / "m.st", "--quiet", *options)
        out, err = capsys.readouterr()
        assert ("", 1) == (out, err.count("\n")), err
        assert why in err
    assert not (folder / "m.st").exists()
    out = folder / "bert" / "model.safetensors"
    before = out.read_bytes()
    assert 1 == run("--base", folder / "bert", "-o", out, "--force")
    assert "is one of the inputs" in capsys.readouterr().err
    assert before == out.read_bytes()
    with pytest.raises(SourceError, match="its loss is meaningless"):
        text_task(folder / "bert", folder / "texts.jsonl", "causal")


def test_experts_that_the_files_hold_one_by_one(folder: Path, capsys: Capture) -> None:
    """Without gradients each expert is a matrix of its own; with them nothing is left out in silence."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 16, "num_key_value_heads": 1}
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=3)).save_pretrained(folder / "mixtral")
    save_tokenizer(folder / "mixtral")
    arguments = ("--base", folder / "mixtral", "-o", folder / "m.st", "--force")
    stacked = [name for name in shira.open_checkpoint(folder / "mixtral") if "gate_up_proj" in name]
    assert 0 == run(*arguments, "--density", "0.1")
    experts = [name for name in shira.load(folder / "m.st") if "experts" in name]
    assert (2 if stacked else 9) == len(experts)
    capsys.readouterr()
    with_data = (*arguments, "--rule", "snip", "--data", folder / "texts.jsonl", "--quiet")
    assert (0 if stacked else 1) == run(*with_data)
    assert stacked or "in which transformers stacks the experts" in capsys.readouterr().err
    assert 0 == run(*with_data, "--exclude", "experts")
