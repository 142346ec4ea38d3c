"""A conversion that succeeds has used every tensor of its source; what it has not used is named, and refused unless allowed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shira_cli.convert import main
from shira_format._core.arrays import Array
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import full_to_shira, lora_to_shira
from shira_format.convert.peft_shira import peft_to_shira
from shira_format.errors import SourceError
from tests.models import save_arrays
from tests.shira_format.test_quantised import X, save, save_lora

WEIGHT = f"{X}.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base", {WEIGHT: np.eye(16, dtype=np.float32)}).parent


def tune(folder: Path, **more: Array) -> Path:
    return save(folder, {WEIGHT: np.full((16, 16), 0.5, np.float32)} | more).parent


def torch_copy(path: Path) -> None:
    torch.save(load_file(path), path.with_suffix(".bin"))


def refused(tmp_path: Path, command: str, source: Path, base: Path, *names: str) -> None:
    """Exit code 1, names in the message, nothing written; with ``--allow-unused`` a note instead."""
    out = tmp_path / "refused.st"
    arguments = [command, str(source), "--base", str(base), "-o", str(out), "--force"]
    if command == "full_to_shira":
        arguments = [command, "--tuned", *arguments[1:]]
    assert main(arguments) == 1
    assert not out.exists()
    verb: Any = {"lora_to_shira": lora_to_shira, "full_to_shira": full_to_shira, "peft_to_shira": peft_to_shira}[
        command
    ]
    with pytest.raises(SourceError) as caught:
        verb(source, base, None)
    notices = "\n".join(verb(source, base, None, allow_unused=True).notices)
    for name in names:
        assert name in str(caught.value)
        assert name in notices
    assert "--allow-unused" in str(caught.value)
    assert main([*arguments, "--allow-unused"]) == 0
    out.unlink()


def test_files_in_the_folder_of_a_lora(base: Path, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora")
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
        (lora / name).write_bytes(b"")
    (lora / "checkpoint-500").mkdir()
    shutil.copy(lora / "adapter_model.safetensors", lora / "checkpoint-500")
    assert lora_to_shira(lora, base, None).notices == []
    (lora / "non_lora_trainables.bin").write_bytes(b"")
    save_arrays(lora / "head.safetensors", {"a": np.ones(2, np.float32)})
    refused(tmp_path, "lora_to_shira", lora, base, "head.safetensors", "non_lora_trainables.bin")
    lora_to_shira(lora / "adapter_model.safetensors", base, None)  # the file was chosen


def test_a_copy_is_used_if_it_has_the_same_tensors(base: Path, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora")
    torch_copy(lora / "adapter_model.safetensors")
    notices = lora_to_shira(lora, base, None).notices
    assert notices == ["lora: not read: adapter_model.bin", "lora: adapter_model.bin: the same tensors as in the files that are read"]  # fmt: skip
    state = torch.load(lora / "adapter_model.bin")
    state[next(iter(state))][0, 0] += 1
    torch.save(state, lora / "adapter_model.bin")
    refused(tmp_path, "lora_to_shira", lora, base, "adapter_model.bin")


def test_a_second_adapter_in_a_subfolder(base: Path, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora")
    shutil.copytree(save_lora(tmp_path / "other"), lora / "other")
    lora_to_shira(lora / "other", base, None)
    (lora / "other" / "adapter_model.safetensors").write_bytes(b"x")
    refused(tmp_path, "lora_to_shira", lora, base, "other/adapter_model.safetensors")


def test_files_in_the_folder_of_a_fine_tune(base: Path, tmp_path: Path) -> None:
    tuned = tune(tmp_path / "tuned")
    torch_copy(tuned / "model.safetensors")
    (tuned / "model.bin").rename(tuned / "pytorch_model.bin")
    shutil.copy(tuned / "model.safetensors", tuned / "model.fp16.safetensors")
    (tuned / "original").mkdir()
    (tuned / "original" / "consolidated.00.pth").write_bytes(b"")
    notices = "\n".join(full_to_shira(tuned, base, None).notices)
    assert "pytorch_model.bin: the same tensors" in notices
    assert "not read: model.fp16.safetensors, pytorch_model.bin, original/consolidated.00.pth" in notices
    save_arrays(tuned / "value_head.safetensors", {"a": np.ones(2, np.float32)})
    refused(tmp_path, "full_to_shira", tuned, base, "value_head.safetensors")
    (tuned / "value_head.safetensors").unlink()
    save_arrays(tuned / "2_Dense" / "model.safetensors", {"linear.weight": np.ones(2, np.float32)})
    full_to_shira(tuned, base, None)
    (tuned / "modules.json").write_text(json.dumps([{"path": "", "type": "t"}, {"path": "2_Dense", "type": "t"}]))
    refused(tmp_path, "full_to_shira", tuned, base, "2_Dense/model.safetensors")


def test_shards_without_an_index_beside_the_same_weights(base: Path, tmp_path: Path) -> None:
    tuned = tune(tmp_path / "tuned")
    state = load_file(tuned / "model.safetensors")
    for number, (name, tensor) in enumerate(state.items(), 1):
        torch.save({name: tensor}, tuned / f"pytorch_model-{number:05d}-of-00002.bin")
    notices = "\n".join(full_to_shira(tuned, base, None).notices)
    assert "pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin: the same tensors" in notices
    torch.save({next(iter(state)): torch.ones(3)}, tuned / "pytorch_model-00001-of-00002.bin")
    refused(tmp_path, "full_to_shira", tuned, base, "pytorch_model-00001-of-00002.bin")


def test_a_tied_weight_that_only_the_copy_has(base: Path, tmp_path: Path) -> None:
    tuned = tune(tmp_path / "tuned")
    state = load_file(tuned / "model.safetensors")
    torch.save(state | {"lm_head.weight": state[WEIGHT].clone()}, tuned / "pytorch_model.bin")
    full_to_shira(tuned, base, None)
    torch.save(state | {"lm_head.weight": state[WEIGHT] + 1}, tuned / "pytorch_model.bin")
    refused(tmp_path, "full_to_shira", tuned, base, "pytorch_model.bin")


def test_entries_of_a_training_checkpoint(base: Path, tmp_path: Path) -> None:
    state = load_file(tune(tmp_path / "tuned") / "model.safetensors")
    path = tmp_path / "last.ckpt"
    trainer = {"optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4)}}}], "epoch": 3}
    callbacks = {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}}
    torch.save({"state_dict": state, "callbacks": callbacks, **trainer}, path)
    full_to_shira(path, base, None)
    torch.save({"state_dict": state, "callbacks": {"EMA": {"weights": [torch.ones(4)]}}, **trainer}, path)
    assert open_checkpoint(path).unused == ("callbacks",)
    refused(tmp_path, "full_to_shira", path, base, "callbacks")


def test_sparse_adapters_of_peft(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shira"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIRA", "r": 1}))
    key, flat = f"base_model.model.{X}.shira_", np.arange(32)
    indices = np.stack([flat // 16, flat % 16]).astype(np.int32)
    save_arrays(folder / "adapter_model.safetensors", {f"{key}indices": indices, f"{key}weight": np.ones(32, np.float32)})  # fmt: skip
    peft_to_shira(folder, base, None)
    (folder / "non_lora_trainables.bin").write_bytes(b"")
    refused(tmp_path, "peft_to_shira", folder, base, "non_lora_trainables.bin")


def test_the_base_may_lie_within(base: Path, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(lora / name, base)
    lora_to_shira(base, base / "model.safetensors", None)


def test_names_that_are_left_out_are_in_the_summary(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = save_lora(tmp_path / "lora")
    state = load_file(lora / "adapter_model.safetensors")
    up = {key.replace("q_proj", "up_proj"): tensor for key, tensor in state.items()}
    copy = {"base_model.model.layers.0.norm.weight": torch.ones(16)}
    save_arrays(base / "model.safetensors", {WEIGHT: np.eye(16, dtype=np.float32), "layers.0.up_proj.weight": np.ones((16, 16), np.float32), "layers.0.norm.weight": np.ones(16, np.float32)})  # fmt: skip
    save_arrays(lora / "adapter_model.safetensors", {key: tensor.numpy() for key, tensor in (state | up | copy).items()})  # fmt: skip
    arguments = [
        "lora_to_shira",
        str(lora),
        "--base",
        str(base),
        "-o",
        str(tmp_path / "out.st"),
        "--exclude",
        "up_",
    ]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "left out, by --include and --exclude: layers.0.up_proj.weight" in lines
    assert "left out, equal to the base's: layers.0.norm.weight" in lines
    assert main([*arguments, "--json", "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {
        "equal to the base's": ["layers.0.norm.weight"], "by --include and --exclude": ["layers.0.up_proj.weight"]
    }  # fmt: skip


def test_tied_and_renamed_names_of_a_fine_tune_are_in_the_summary(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = np.full((16, 16), 0.5, np.float32)
    up = np.ones((16, 16), np.float32)
    tuned = save_arrays(
        tmp_path / "tuned" / "model.safetensors",
        {f"_orig_mod.model.{WEIGHT}": half, "_orig_mod.model.layers.0.up_proj.weight": up, "_orig_mod.model.head.weight": half},
    )  # fmt: skip
    arguments = ["full_to_shira", "--tuned", str(tuned), "--base", str(base), "-o", str(tmp_path / "out.st")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"left out, tied to model.{WEIGHT}: model.head.weight" in out
    assert "names: " in out and "'model.'" in out
    assert "without the words of wrappers" in out


@pytest.mark.parametrize(
    "beside",
    [{"alpha": 4.0, "rank": 2}, {"network_alphas": {"blocks.alpha": 4.0}}, {"hyper_parameters": {"lora": {"lora_alpha": 4}}}],
    ids=["at the top", "of layers", "among settings"],
)  # fmt: skip
def test_a_scale_beside_the_tensors_of_a_file_of_torch(
    base: Path, tmp_path: Path, beside: dict[str, object]
) -> None:
    state = {
        f"transformer.{X}.lora_A.weight": torch.ones(2, 16),
        f"transformer.{X}.lora_B.weight": torch.ones(16, 2),
    }
    file = tmp_path / "lora.pt"
    training = {"epoch": 3, "optimizer": {"param_groups": [{"alpha": 0.99}], "alpha": 0.9}}
    torch.save({"state_dict": state, **training}, file)
    notice = "the tensors under 'state_dict' are read; left out: 'epoch', 'optimizer'"
    assert any(notice in found for found in lora_to_shira(file, base, None).notices)
    torch.save({"state_dict": state, **training, **beside}, file)
    with pytest.raises(SourceError, match="lies beside the tensors, and may change their scale"):
        lora_to_shira(file, base, None)


def test_why_no_dialect_recognises_a_file_is_said(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora.pt"
    torch.save([torch.ones(2, 16), torch.ones(16, 2)], file)
    with pytest.raises(SourceError, match="contains a list, not a dict of tensors"):
        lora_to_shira(file, base, None)
    file.unlink()
    parts = {"lora_A": np.ones((2, 16), np.float32), "lora_B": np.ones((16, 2), np.float32)}
    save_arrays(
        tmp_path / "pair.safetensors",
        {
            f"transformer.{X}.{part}.{name}.weight": array
            for part, array in parts.items()
            for name in ("high", "low")
        },
    )
    with pytest.raises(SourceError, match="keys of several adapters, 'high' and 'low'"):
        lora_to_shira(tmp_path / "pair.safetensors", base, None)
