"""Models and inputs: loaded from the base with the source's head, texts, arrays and batches, and texts that a model writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

import shira_format
from shira_format.convert.fit.data import Split, read_inputs, sampled
from shira_format.convert.fit.distill import Distillation
from shira_format.convert.fit.run import FitOptions, fit_full, fit_lora
from shira_format.errors import SourceError
from shira_format.live import Switcher
from shira_format.training.models import load_live_model
from tests import fits, models

QUICK = FitOptions(distillation=Distillation(steps=3, batches=1, stages=1), length=12, limit=24)
TEXTS = models.LORAS.parent / "text" / "spam.jsonl"


def test_a_shipped_lora_with_its_head(tmp_path: Path) -> None:
    out = tmp_path / "out.st"
    report = fit_lora(models.LORAS / "spam", models.minilm(), out, TEXTS, density=0.001, options=QUICK)
    assert report.fit.agreement is not None and report.fit.kl is not None  # two classes, from the head
    assert set(report.fit.layers) == {f"bert.encoder.layer.{n}" for n in range(6)}
    assert report.inputs == {"name": "spam.jsonl", "digest": report.inputs["digest"], "fitted": 19, "held": 5}
    model = load_live_model(models.minilm(), "classifier", num_labels=2).model
    assert Switcher(model).load(out).whole == 2
    assert report.seconds.keys() == {"load", "inputs", "fit", "measure"}


def test_a_fine_tune_of_an_encoder(tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in TEXTS.read_text("utf-8").splitlines()[:24]]
    report = fit_full(models.sre(), models.minilm(), tmp_path / "out.st", texts, density=0.001, options=QUICK)
    assert report.fit.agreement is None and report.fit.cosine is not None  # embeddings
    adapter = shira_format.load(tmp_path / "out.st")
    assert all(len(one.shape) == 2 or not one.nnz for one in adapter.values()) and len(adapter.dense) > 50


def llama_folder(folder: Path) -> Path:
    """A small causal model with a tokenizer of single letters."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model = models.llama()
    assert isinstance(model.config, LlamaConfig)
    model.save_pretrained(folder)
    letters = {chr(97 + n): n for n in range(26)} | {"<s>": 26, "</s>": 27}
    tokenizer = Tokenizer(WordLevel(letters, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def test_a_causal_model_writes_its_own_texts(tmp_path: Path) -> None:
    base = llama_folder(tmp_path / "base")
    lora = models.save_lora(
        models.random_lora(models.llama(), r=2, target_modules=["q_proj", "up_proj"]), tmp_path / "lora"
    )
    out = tmp_path / "out.st"
    report = fit_lora(lora, base, out, density=0.05, options=QUICK)
    assert "24 of 12 tokens were sampled from the source" in report.notices[0]
    assert report.inputs["fitted"] + report.inputs["held"] == 24
    assert report.fit.kl is not None
    first = out.read_bytes()
    fit_lora(lora, base, out, density=0.05, options=QUICK)
    assert out.read_bytes() == first


def test_samples_are_of_the_seed_and_begin_where_texts_begin(tmp_path: Path) -> None:
    live = load_live_model(llama_folder(tmp_path), "causal")
    state = torch.random.get_rng_state()
    first, again, other = (
        sampled(live.model, live.tokenizer, count=5, length=6, seed=seed, batch=2) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [tuple(one["input_ids"].shape) for one in first] == [(2, 6), (2, 6), (1, 6)]
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(first, again, strict=True))
    assert not all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(first, other, strict=True))
    assert all((one["input_ids"][:, 0] == 26).all() for one in first)


def test_no_inputs_for_a_model_that_writes_none() -> None:
    with pytest.raises(SourceError, match="no inputs to fit on"):
        fit_lora(models.LORAS / "spam", models.minilm(), None, options=QUICK)


def test_a_model_whose_head_is_random_is_refused() -> None:
    options = FitOptions(kind="classifier")
    with pytest.raises(SourceError, match="neither in the base nor in the source"):
        fit_full(models.sre(), models.minilm(), None, ["a", "b"], options=options)


def test_the_split_is_of_the_seed() -> None:
    first, again, other = (read_inputs(fits.rows(50), Split(seed=seed, batch=8)) for seed in (1, 1, 2))
    assert torch.equal(torch.cat(first.held), torch.cat(again.held))
    assert not torch.equal(torch.cat(first.held), torch.cat(other.held))
    assert first.counts == (40, 10)
    together = torch.cat([*first.train, *first.held])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, fits.rows(50).tolist()))


def test_arrays_by_name_and_files_of_them(tmp_path: Path) -> None:
    ids = np.arange(40).reshape(10, 4)
    found = read_inputs({"input_ids": ids, "attention_mask": np.ones_like(ids)}, Split(batch=4))
    assert [one["input_ids"].shape[0] for one in found.train] == [4, 4]
    np.savez(tmp_path / "ids.npz", input_ids=ids)
    read = read_inputs(tmp_path / "ids.npz", Split(batch=4))
    assert torch.equal(read.train[0]["input_ids"], found.train[0]["input_ids"])
    assert read.source["name"] == "ids.npz" and len(read.source["digest"]) == 64
    with pytest.raises(SourceError, match="rows: all need the same number"):
        read_inputs({"a": np.zeros((3, 2)), "b": np.zeros((4, 2))}, Split())


def test_texts_that_occur_again_are_on_one_side_only() -> None:
    class Words:
        pad_token = "x"

        def __call__(self, texts: list[str], **_: object) -> dict[str, list[str]]:
            return {"texts": texts}

    found = read_inputs(["a", "b", "a", "c", " a "], Split(batch=1), Words())
    shown = [one["texts"][0] for one in (*found.train, *found.held)]
    assert sorted(shown) == ["a", "b", "c"]
    assert "left out: 2 repeated texts" == found.notices[0]


def test_texts_without_a_tokenizer() -> None:
    with pytest.raises(SourceError, match="texts need a tokenizer"):
        read_inputs(["a", "b"], Split())
    with pytest.raises(SourceError, match="no inputs"):
        read_inputs([], Split())
