"""Adapters of a training: saved at any step, resumed to the bit, and used like any other."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shira_format.adapter import Adapter
from shira_format.convert.peft_shira import peft_to_shira
from shira_format.entries.inspection import inspect
from shira_format.errors import BaseMismatch, SourceError
from shira_format.export.full import shira_to_full
from shira_format.export.peft_shira.export import shira_to_peft
from shira_format.format import load, save
from shira_format.live import Switcher
from shira_format.merging.verbs import merge
from shira_format.tensors import SparseTensor
from shira_format.training.hook import attach
from shira_format.training.sparse import SparseParameters, resume, sparse_parameters
from tests import models
from tests.training import bare, copied, frozen_bits_are_kept, mask, tokens, word_tokenizer


def mask_file(model: nn.Module, path: Path, prefix: str = "", **options: Any) -> Path:
    """A mask file; ``prefix`` is left out of its names."""
    tensors = [
        SparseTensor(name.removeprefix(prefix), tuple(dict(model.named_parameters())[name].shape), indices, value_kind="none")
        for name, indices in mask(model, **options).items()
    ]  # fmt: skip
    save(Adapter(tensors, manifest={"mask": {"rule": "rand", "seed": 0}}), path)
    return path


def adamw(trained: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"dtype": torch.float32, "rounding": "stochastic", "seed": 3}, {"dora": True, "dtype": torch.float32}])  # fmt: skip
def test_a_run_that_stops_goes_on_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    ends = []
    for stops in (False, True):
        model = models.bert().bfloat16().eval()
        trained = sparse_parameters(model, mask(model, only="layer"), new=["classifier"], **options)
        optimizer = adamw(trained)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
        bare(model, optimizer, tokens())
        schedule.step()
        if stops:
            trained.save_state(tmp_path / "a.st", {"optimizer": optimizer, "schedule": schedule})
            model = models.bert().bfloat16().eval()
            trained = resume(model, tmp_path / "a.st")
            optimizer = adamw(trained)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
            trained.restore_optimizer({"optimizer": optimizer, "schedule": schedule})
        bare(model, optimizer, tokens())
        schedule.step()
        ends.append((trained.adapter(), trained.state(), optimizer.state_dict(), schedule.get_last_lr()))
    one, other = ends
    assert one[0] == other[0]
    assert one[1]["options"] == other[1]["options"]
    torch.testing.assert_close(one[1]["weights"], other[1]["weights"], rtol=0, atol=0)
    torch.testing.assert_close(one[2], other[2], rtol=0, atol=0)
    assert one[3] == other[3]


def test_a_run_with_masked_gradients_stops_and_goes_on(tmp_path: Path) -> None:
    """Its file has the values as they are: weights and optimizer are all there is."""
    ends = []
    for stops in (False, True):
        model = models.bert().eval()
        trained = attach(model, mask(model, only="layer"))
        optimizer = adamw(trained)
        bare(model, optimizer, tokens())
        if stops:
            state = copy.deepcopy(optimizer.state_dict())
            trained.save(tmp_path / "a.st")
            model = models.bert().eval()
            Switcher(model).load(tmp_path / "a.st")
            trained = attach(model, load(tmp_path / "a.st"))
            optimizer = adamw(trained)
            optimizer.load_state_dict(state)
        bare(model, optimizer, tokens())
        ends.append(copied(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_resuming_an_adapter_without_its_state(tmp_path: Path) -> None:
    model = models.bert().eval()
    trained = sparse_parameters(model, mask(model, only="layer"), whole=["LayerNorm"], new=["classifier"])
    bare(model, adamw(trained), tokens())
    trained.save_state(tmp_path / "a.st")
    assert (tmp_path / "a.st.state").is_file()
    trained.save(tmp_path / "a.st", self_contained=True)
    assert not (tmp_path / "a.st.state").exists()
    again = models.bert().eval()
    resumed = resume(again, tmp_path / "a.st")
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)
    assert resumed.adapter(self_contained=True) == load(tmp_path / "a.st") == trained.adapter(self_contained=True)
    with pytest.raises(SourceError, match="no optimizer was saved"):
        resumed.restore_optimizer(adamw(resumed))


def test_a_file_with_the_name_of_a_state_stays(tmp_path: Path) -> None:
    model = models.net()
    trained = sparse_parameters(model, mask(model))
    state = tmp_path / "a.st.state"
    for content in (b"mine", None):
        if content is None:
            torch.save({"version": 1, "weights": {}}, state)
        else:
            state.write_bytes(content)
        before = state.read_bytes()
        for write in (trained.save, trained.save_state):
            with pytest.raises(SourceError, match=r"a\.st\.state: not a training state, and so not removed"):
                write(tmp_path / "a.st")
        assert before == state.read_bytes()
        assert not (tmp_path / "a.st").exists()


def test_a_state_of_another_file_and_another_base_are_refused(tmp_path: Path) -> None:
    model = models.net()
    trained = sparse_parameters(model, mask(model))
    optimizer = adamw(trained)
    trained.save_state(tmp_path / "a.st", optimizer)
    first = (tmp_path / "a.st.state").read_bytes()
    with torch.no_grad():
        trained.parameters()[0].add_(1)
    trained.save_state(tmp_path / "a.st")
    (tmp_path / "a.st.state").write_bytes(first)
    with pytest.raises(SourceError, match="is not the state of"):
        resume(models.net(), tmp_path / "a.st")
    (tmp_path / "a.st.state").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="not a training state"):
        resume(models.net(), tmp_path / "a.st")
    (tmp_path / "a.st.state").unlink()
    other = models.net()
    with torch.no_grad():
        other.wide.weight.mul_(2)
    before = copied(other)
    with pytest.raises(BaseMismatch, match="wide.weight"):
        resume(other, tmp_path / "a.st")
    assert all(torch.equal(before[name], now) for name, now in copied(other).items())
    assert before.keys() == dict(other.named_parameters()).keys()
    with pytest.raises(SourceError, match="is a mask, without values"):
        resume(models.net(), mask_file(models.net(), tmp_path / "mask.st"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_one_like_any_other(dtype: torch.dtype, tmp_path: Path) -> None:
    base = models.save_base(models.llama(), tmp_path / "base", dtype)
    model = models.llama().to(dtype)
    where = mask_file(model, tmp_path / "mask.st", only="layers")
    trained = sparse_parameters(model, where, dtype=torch.float32)
    bare(model, adamw(trained), tokens())
    more = {"base_model": {"id": "tiny"}, "source": {"kind": "training", "steps": 4}}
    trained.save(tmp_path / "a.st", manifest=more, masks=where)
    trained.save(tmp_path / "own.st", manifest=more, self_contained=True)
    report = inspect(tmp_path / "a.st", base=base)
    assert report is not None
    found = load(tmp_path / "a.st")
    assert ({"rule": "rand", "seed": 0}, "tiny", 4) == (found.manifest["mask"], found.manifest["base_model"]["id"], found.manifest["source"]["steps"])  # fmt: skip
    assert (tmp_path / "a.st").stat().st_size < (tmp_path / "own.st").stat().st_size
    logits = model(tokens()).logits
    trained.detach(restore=True)
    with Switcher(model).applied(tmp_path / "a.st"):
        assert torch.equal(logits, model(tokens()).logits)
    shira_to_full(tmp_path / "a.st", base, tmp_path / "full")
    whole = models.load_base(models.llama().to(dtype), tmp_path / "full")
    assert torch.equal(logits, whole(tokens()).logits)
    merge(
        [tmp_path / "a.st", tmp_path / "own.st"],
        tmp_path / "ab.st",
        base=base,
        method="linear",
        weights=[0.5, 0.5],
    )
    merged = load(tmp_path / "ab.st")
    assert merged.keys() == found.keys()
    shira_to_peft(tmp_path / "a.st", tmp_path / "peft", base=base, pad=True)
    peft_to_shira(tmp_path / "peft", base, tmp_path / "back.st")
    back = load(tmp_path / "back.st")
    for name, tensor in found.items():
        moved = tensor.values != tensor.at_entries(dict(model.named_parameters())[name])
        assert np.array_equal(tensor.indices[moved], back[name].indices)
        np.testing.assert_allclose(back[name].values.astype(float), tensor.values[moved].astype(float), rtol=1e-2)


def test_names_differ_in_a_prefix(tmp_path: Path) -> None:
    model = models.bert()
    where = mask_file(model, tmp_path / "mask.st", prefix="bert.", only="bert.encoder")
    trained = sparse_parameters(model, where, whole=["LayerNorm.bias"], new=["classifier"])
    bare(model, adamw(trained), tokens())
    trained.save(tmp_path / "a.st")
    found = load(tmp_path / "a.st")
    assert all(name.startswith("encoder.") for name in found)
    assert {"classifier.weight", "classifier.bias", "embeddings.LayerNorm.bias"} <= found.dense.keys()
    assert found.dense["classifier.weight"].base_digest is None
    assert found.dense["embeddings.LayerNorm.bias"].base_digest is not None
    again = models.bert()
    resume(again, tmp_path / "a.st")
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)
    plain = models.bert()
    Switcher(plain).load(tmp_path / "a.st")
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 24

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {"input_ids": (torch.arange(6) * 7 + place) % 50, "labels": torch.tensor(place % 3)}


def test_the_checkpoints_of_the_trainer_are_adapters(tmp_path: Path) -> None:
    """Small, and a run that goes on from one ends at the same bits; the best one is loaded at the end."""
    from transformers import TrainingArguments

    from shira_format.training.trainer import adapter_trainer

    def run(folder: Path, resume_from: Any = None) -> tuple[SparseParameters, Any]:
        model = models.bert().bfloat16()
        trained = sparse_parameters(model, mask(model, only="layer"), dtype=torch.float32, new=["classifier"])
        arguments = TrainingArguments(
            str(folder), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to=[],
            save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4, disable_tqdm=True, logging_strategy="no",
            load_best_model_at_end=True, metric_for_best_model="loss",
        )  # fmt: skip
        trainer = adapter_trainer()(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
        trainer.train(resume_from_checkpoint=resume_from)
        return trained, trainer

    whole, trainer = run(tmp_path / "whole")
    halfway = tmp_path / "whole" / "checkpoint-4"
    names = {path.name for path in halfway.iterdir()}
    assert {"adapter.st", "adapter.st.state", "optimizer.pt"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    again, _ = run(tmp_path / "again", str(halfway))
    assert whole.adapter() == again.adapter()
    best = load(Path(trainer.state.best_model_checkpoint) / "adapter.st")
    assert best == whole.adapter()


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.parametrize("regrown", [False, True])
def test_the_trainer_of_trl_saves_and_goes_on(regrown: bool, tmp_path: Path) -> None:
    import trl
    from datasets import Dataset

    from shira_format.training.trainer import adapter_trainer

    rows = [{"input_ids": [(7 * place + start) % 30 for place in range(8)], "labels": list(range(8))} for start in range(24)]  # fmt: skip
    data = Dataset.from_list(rows)

    def run(
        folder: Path, resume_from: Any = None
    ) -> tuple[SparseParameters, list[float], nn.Module, dict[str, Any]]:
        model = models.llama()
        before, masked = copied(model), mask(model, only="layers")
        trained = sparse_parameters(model, masked)
        if regrown:
            trained.regrow(8, every=3, summed=2, rate=0.5)
        arguments = trl.SFTConfig(
            str(folder), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, bf16=False, report_to=[],
            save_strategy="steps", save_steps=4, disable_tqdm=True, logging_steps=1, gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = adapter_trainer(trl.SFTTrainer)(
            model, args=arguments, train_dataset=data, processing_class=word_tokenizer(32)
        )
        trainer.train(resume_from_checkpoint=resume_from)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        entries = {name: weight.indices for name, weight in trained.weights.items()}
        assert frozen_bits_are_kept(model, before, entries)
        return trained, losses, model, before

    whole, losses, *_ = run(tmp_path / "whole")
    assert losses[-1] < losses[0]
    halfway = tmp_path / "whole" / "checkpoint-4"
    names = {path.name for path in halfway.iterdir()}
    assert {"adapter.st", "adapter.st.state", "optimizer.pt"} <= names
    assert not {"model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"} & names
    again, *_ = run(tmp_path / "again", str(halfway))
    assert whole.adapter() == again.adapter()
    plain = models.llama()
    Switcher(plain).load(tmp_path / "whole" / "checkpoint-8" / "adapter.st")
    assert torch.equal(whole.model.eval()(tokens()).logits, plain.eval()(tokens()).logits)
