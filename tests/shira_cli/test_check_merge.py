"""``shira-convert check_merge`` on what PEFT merges, and on the ways in which merges go wrong."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from shira_cli.convert import main
from shira_format.convert import lora_to_shira
from tests import models
from tests.shira_format import test_checkpoints_gguf as ggufs

Capture = pytest.CaptureFixture[str]
State = dict[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
LLAMA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
BERT: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "dense"]}


class Merge:
    """A base, a LoRA of it, and what PEFT merges, each in a folder."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, options: dict[str, Any], make: Callable[[], nn.Module] = models.llama,
        scale: float = 0.05,
    ) -> None:  # fmt: skip
        self.folder, self.dtype, self.make = folder, dtype, make
        self.base = models.save_base(make(), folder / "base", dtype)
        trained = models.random_lora(models.load_base(make().to(dtype), self.base), scale=scale, **options)
        self.lora = models.save_lora(trained, folder / "lora")
        self.merged = folder / "merged"

    def model(self, base: Path | None = None, lora: Path | None = None, **options: Any) -> PeftModel:
        model = models.load_base(self.make().to(self.dtype), base or self.base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(model, lora or self.lora, **options).eval()

    def merge(self, base: Path | None = None, lora: Path | None = None, **options: Any) -> None:
        models.save_base(self.model(base, lora, **options).merge_and_unload(), self.merged, self.dtype)

    def merge_as(self, **config: Any) -> None:
        """Merge as if the LoRA's configuration said this."""
        other = self.folder / "other"
        shutil.copytree(self.lora, other, dirs_exist_ok=True)
        models.edit_config(other, **config)
        self.merge(lora=other)

    def edit(self, edit: Callable[[State], State | None]) -> None:
        state = {name: tensor.clone() for name, tensor in load_file(self.merged / "model.safetensors").items()}
        save_file(edit(state) or state, self.merged / "model.safetensors")

    def of_base(self, *names: str) -> Callable[[State], None]:
        """Put back these tensors of the base."""
        base = load_file(self.base / "model.safetensors")
        return lambda state: state.update({name: base[name] for name in base if any(n in name for n in names)})

    def check(self, *options: str) -> int:
        paths = ("--base", str(self.base), "--lora", str(self.lora), "--merged", str(self.merged))
        return main(["check_merge", *paths, *options])


@pytest.fixture(params=DTYPES)
def merge(request: pytest.FixtureRequest, tmp_path: Path) -> Merge:
    return Merge(tmp_path, DTYPES[request.param], LLAMA)


def sentence(capsys: Capture) -> str:
    return capsys.readouterr().out.splitlines()[-1]


CASES = {
    "net": (models.net, {"r": 4, "lora_alpha": 6, "target_modules": ["wide", "square", "head"]}),
    "rslora": (models.llama, LLAMA | {"use_rslora": True}),
    "bias": (models.bert, BERT | {"lora_bias": True}),
    "head": (models.bert, BERT | {"modules_to_save": ["classifier"]}),
    "trained_bias": (models.bert, BERT | {"bias": "all"}),
    "conv1d": (models.gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "patterns": (models.bert, BERT | {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 1.5}}),
    "llama": (models.llama, LLAMA),
    "dora": (models.llama, LLAMA | {"use_dora": True}),
    "embedding": (models.llama, LLAMA | {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize("lora_in", ["fp32", "own dtype"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_what_peft_merges_is_verified(
    case: str, dtype: str, lora_in: str, tmp_path: Path, capsys: Capture
) -> None:
    make, options = CASES[case]
    merge = Merge(tmp_path, DTYPES[dtype], options, make)
    merge.merge(autocast_adapter_dtype=lora_in == "fp32")
    assert 0 == merge.check("--json")
    report = json.loads(capsys.readouterr().out)
    assert {"verified"} == {layer["verdict"] for layer in report["layers"]}
    assert [] == report["others"]["changed"]
    assert 1 == pytest.approx(report["strength"], rel=1e-3)
    shutil.copytree(merge.base, merge.merged, dirs_exist_ok=True)
    assert 1 == merge.check("--quiet")
    assert sentence(capsys).startswith("no: nothing was merged: all ")


def test_nothing_merged(merge: Merge, capsys: Capture) -> None:
    shutil.copytree(merge.base, merge.merged)
    assert 1 == merge.check()
    out, err = capsys.readouterr()
    assert "" == err
    assert "no: nothing was merged: all 14 adapted tensors equal the base's" == out.splitlines()[-1]
    assert 14 == sum(" absent " in line for line in out.splitlines())


def test_a_layer_skipped(merge: Merge, capsys: Capture) -> None:
    merge.merge()
    merge.edit(merge.of_base(UP))
    assert 1 == merge.check()
    assert f"no: of 14 adapted tensors 13 hold the LoRA, 1 are unchanged: {UP}" == sentence(capsys)
    assert 0 == merge.check("--exclude", "layers.1.mlp.up")
    assert 1 == merge.check("--include", "layers.1.mlp.up")


@pytest.mark.parametrize(
    "config, strength, hint",
    [
        ({"lora_alpha": 4}, 0.25, ""),
        ({"lora_alpha": 16.5}, 1.03125, ""),
        ({"lora_alpha": -16}, -1, " (subtracted?)"),
        ({"use_rslora": True}, 2.828, " (as if rslora were set)"),
        ({"lora_alpha": 8}, 0.5, " (as if the scale 2 of rank 8 and alpha 16 had been left out)"),
    ],
)
def test_another_strength(config: Any, strength: float, hint: str, merge: Merge, capsys: Capture) -> None:
    merge.merge_as(**config)
    assert 1 == merge.check()
    last = sentence(capsys)
    assert last.startswith("no: it holds the LoRA at strength ")
    assert last.endswith(f" in all layers, not 1{hint}")
    assert strength == pytest.approx(float(last.split()[7]), rel=3e-3)
    assert 0 == merge.check("--strength", str(strength))
    assert f"yes: it holds the LoRA at strength {strength:g} in 14 adapted tensors" == sentence(capsys)


def test_rslora_ignored(merge: Merge, capsys: Capture) -> None:
    models.edit_config(merge.lora, use_rslora=True)
    merge.merge_as(use_rslora=False)
    assert 1 == merge.check()
    assert sentence(capsys).endswith("strength 0.3536 in all layers, not 1 (as if rslora were not set)")


def test_two_strengths(merge: Merge, capsys: Capture) -> None:
    merge.merge_as(alpha_pattern={"q_proj": 8})
    assert 1 == merge.check()
    last = sentence(capsys)
    assert last.startswith(
        "no: of 14 adapted tensors 12 hold the LoRA, 2 hold it at another strength; strengths from 0."
    )
    assert last.endswith(f": {Q}, {Q.replace('.0.', '.1.')}")


def test_dora_merged_as_lora(merge: Merge, tmp_path: Path, capsys: Capture) -> None:
    again = Merge(tmp_path / "dora", merge.dtype, LLAMA | {"use_dora": True})
    other = tmp_path / "dora" / "other"
    shutil.copytree(again.lora, other)
    models.edit_config(other, use_dora=False)
    models.edit_weights(
        other, lambda state: {name: tensor for name, tensor in state.items() if "magnitude" not in name}
    )
    again.merge(lora=other)
    assert 1 == again.check()
    assert sentence(capsys).startswith("no: of 14 adapted tensors 14 hold something else")


def test_merged_twice(merge: Merge, capsys: Capture) -> None:
    merge.merge()
    merge.merge(base=merge.merged)
    assert 1 == merge.check()
    assert "no: it holds the LoRA at strength 2 in all layers, not 1 (merged twice?)" == sentence(capsys)


def test_a_transposed_update(merge: Merge, capsys: Capture) -> None:
    merge.merge()
    base = load_file(merge.base / "model.safetensors")[Q].float()
    merge.edit(lambda state: state.update({Q: (base + (state[Q].float() - base).T).to(merge.dtype).contiguous()}))
    assert 1 == merge.check()
    assert f"no: of 14 adapted tensors 13 hold the LoRA, 1 hold something else: {Q}" == sentence(capsys)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_base(dtype: str, tmp_path: Path, capsys: Capture) -> None:
    merge = Merge(tmp_path, DTYPES[dtype], LLAMA, scale=0.01)
    state = load_file(merge.base / "model.safetensors")
    other = tmp_path / "other-base"
    other.mkdir()
    save_file({name: tensor * 1.01 for name, tensor in state.items()}, other / "model.safetensors")
    merge.merge(base=other)
    assert 1 == merge.check()
    last = sentence(capsys)
    assert last.startswith("no: of 14 adapted tensors 14 hold something else; ")
    assert "most other tensors differ as well: was it merged into another base?" in last


def test_another_lora_on_top(merge: Merge, capsys: Capture) -> None:
    merge.merge()
    noise = torch.Generator().manual_seed(1)
    base = load_file(merge.base / "model.safetensors")

    def add(state: State) -> None:
        for name in state:
            if "_proj" in name:
                step = state[name].float() - base[name].float()
                step = 0.1 * step.std() * torch.randn(step.shape, generator=noise)
                state[name] = (state[name].float() + step).to(merge.dtype)

    merge.edit(add)
    assert 1 == merge.check()
    assert sentence(capsys).startswith("no: of 14 adapted tensors 14 hold something else: ")


def test_other_tensors_changed(merge: Merge, capsys: Capture) -> None:
    merge.merge()
    name = "model.embed_tokens.weight"
    merge.edit(lambda state: state.update({name: state[name] * 1.1}))
    assert 1 == merge.check()
    out = capsys.readouterr().out.splitlines()
    assert f"no: it holds the LoRA at strength 1 in 14 adapted tensors, but one tensor that the LoRA does not change differs from the base: {name}" == out[-1]  # fmt: skip
    assert f"  changed: {name}" == out[-2]
    assert 0 == merge.check("--layers-only")
    assert 0 == merge.check("--exclude", "embed")


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_beside_the_weights(dtype: str, tmp_path: Path, capsys: Capture) -> None:
    """A bias that was not merged; a head that was not replaced."""
    merge = Merge(
        tmp_path, DTYPES[dtype], BERT | {"lora_bias": True, "modules_to_save": ["classifier"]}, models.bert
    )
    merge.merge()
    assert 0 == merge.check()
    merge.edit(merge.of_base("query.bias"))
    assert 1 == merge.check()
    assert "2 are unchanged: bert.encoder.layer.0.attention.self.query.bias" in sentence(capsys)
    merge.merge()
    merge.edit(merge.of_base("classifier"))
    assert 1 == merge.check()
    assert sentence(capsys).endswith(" 2 are unchanged: classifier.bias, classifier.weight")
    merge.edit(lambda state: state.update({"classifier.weight": state["classifier.weight"] + 1}))
    assert 1 == merge.check()
    assert "1 are unchanged, 1 hold something else" in sentence(capsys)


@pytest.mark.parametrize("rounded", ["after", "before"])
@pytest.mark.parametrize("scale", [0.05, 0.01])
def test_a_float32_base_and_a_bf16_merge(rounded: str, scale: float, tmp_path: Path, capsys: Capture) -> None:
    merge = Merge(tmp_path, torch.float32, LLAMA, scale=scale)
    if rounded == "after":
        models.save_base(merge.model().merge_and_unload(), merge.merged, torch.bfloat16)
    else:
        merge.dtype = torch.bfloat16
        merge.merge()
    assert 0 == merge.check()
    models.save_base(merge.make(), merge.merged, torch.bfloat16)
    assert 1 == merge.check()
    assert "no: nothing was merged: all 14 adapted tensors equal the base's" == sentence(capsys)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_bf16_base_and_a_float32_merge(held: torch.dtype, tmp_path: Path) -> None:
    merge = Merge(tmp_path, torch.bfloat16, LLAMA, scale=0.02)
    merge.dtype = held
    models.save_base(merge.model().merge_and_unload(), merge.merged, torch.float32)
    assert 0 == merge.check()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_an_update_that_rounding_hides(dtype: str, tmp_path: Path, capsys: Capture) -> None:
    merge = Merge(tmp_path, DTYPES[dtype], LLAMA | {"lora_alpha": 1e-4}, scale=1e-4)
    merge.merge()
    assert 3 == merge.check("--json")
    report = json.loads(capsys.readouterr().out)
    assert ("inconclusive", 3) == (report["answer"], report["exit_code"])
    assert "rounding hides the update in all of 14 adapted tensors" == report["sentence"]
    shutil.copytree(merge.base, merge.merged, dirs_exist_ok=True)
    assert 3 == merge.check()
    # In float32 the same update can be told.
    again = Merge(tmp_path / "again", torch.float32, LLAMA | {"lora_alpha": 1e-4}, scale=1e-4)
    again.merge()
    assert 0 == again.check()


def test_a_layer_too_small_to_tell(tmp_path: Path, capsys: Capture) -> None:
    """It is as it should be, and holds next to nothing of the update."""
    merge = Merge(tmp_path, torch.bfloat16, LLAMA)

    def shrink(state: State) -> State:
        return {name: tensor * (1e-5 if "0.self_attn.q_proj" in name else 1) for name, tensor in state.items()}

    models.edit_weights(merge.lora, shrink)
    merge.merge()
    assert 0 == merge.check()
    assert "yes: it holds the LoRA at strength 1 in 14 adapted tensors (1 of them consistent with it, but too small to tell)" == sentence(capsys)  # fmt: skip
    models.edit_weights(merge.lora, lambda state: {name: tensor * 0 for name, tensor in state.items()})
    shutil.copytree(merge.base, merge.merged, dirs_exist_ok=True)
    assert 3 == merge.check()
    assert "inconclusive: the update is zero in all of 14 adapted tensors" == sentence(capsys)


def test_wrappers(tmp_path: Path, capsys: Capture) -> None:
    """A PEFT model that was saved without unloading it; then a name at a time of the wrapper goes."""
    merge = Merge(tmp_path, torch.float32, LLAMA)
    peft = merge.model()
    models.save_base(peft, merge.merged)
    assert 1 == merge.check("--quiet")
    last = sentence(capsys)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert last.startswith(
        "no: it is a PEFT model that was not unloaded (keys like 'base_model.model.model.layers.0."
    )
    assert ".lora_" in last
    assert last.endswith(": of 14 adapted tensors 14 are unchanged; save what merge_and_unload() returns")
    peft.merge_adapter()
    models.save_base(peft, merge.merged)
    assert key in load_file(merge.merged / "model.safetensors")
    assert 1 == merge.check("--quiet")
    assert "and its weights hold the LoRA, but under PEFT's names, which other loaders do not find" in sentence(
        capsys
    )
    merge.edit(lambda state: {name: tensor for name, tensor in state.items() if "lora_" not in name})
    assert 1 == merge.check("--quiet")
    assert ".base_layer.weight')" in sentence(capsys)
    merge.edit(lambda state: {name.replace(".base_layer", ""): tensor for name, tensor in state.items()})
    assert 0 == merge.check()
    assert "note: names of the merged checkpoint are not those of the base: the prefix 'base_model.model.' is left out\n" == capsys.readouterr().err  # fmt: skip
    save_file(load_file(merge.lora / "adapter_model.safetensors"), merge.merged / "model.safetensors")
    assert 1 == merge.check()
    assert sentence(capsys).startswith("no: it is a LoRA, not a merged checkpoint")


def test_tensors_that_are_not_there(merge: Merge, capsys: Capture) -> None:
    merge.merge()
    merge.edit(
        lambda state: {n: t for n, t in state.items() if n not in (UP, "lm_head.weight")} | {"new": torch.ones(2)}
    )
    assert 1 == merge.check()
    out = capsys.readouterr().out.splitlines()
    assert f"no: of 14 adapted tensors 13 hold the LoRA, 1 are missing: {UP}" == out[-1]
    assert ["  not in the merged checkpoint: lm_head.weight", "  new in the merged checkpoint: new"] == out[-3:-1]
    assert 0 == merge.check("--exclude", "layers.1.mlp.up_proj")


@pytest.mark.parametrize("task", ["genre", "spam"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_real_ones(task: str, dtype: str, tmp_path: Path, capsys: Capture) -> None:
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    lora = models.LORAS / task
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(models.minilm(), num_labels=2, dtype=DTYPES[dtype])
    models.load_lora(model, lora).merge_and_unload().save_pretrained(tmp_path / "merged")
    arguments = ["check_merge", "--base", str(models.minilm()), "--lora", str(lora)]
    assert 0 == main([*arguments, "--merged", str(tmp_path / "merged"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert {"verified"} == {layer["verdict"] for layer in report["layers"]}
    assert 1 == pytest.approx(report["strength"], rel=1e-3)
    assert 1 == main([*arguments, "--merged", str(models.minilm()), "--quiet"])
    assert 1 == main([*arguments, "--merged", str(models.sre()), "--quiet"])
    other = next(path for path in models.LORAS.iterdir() if path.is_dir() and path != lora)
    arguments[-1] = str(other)
    assert 1 == main([*arguments, "--merged", str(tmp_path / "merged"), "--quiet"])


def test_an_adapter_file(tmp_path: Path, capsys: Capture) -> None:
    """The entries have the bits that are due, and the others those of the base."""
    merge = Merge(tmp_path, torch.bfloat16, LLAMA)
    lora_to_shira(merge.lora, merge.base, tmp_path / "a.st", density=0.05)
    assert 0 == main(["shira_to_full", str(tmp_path / "a.st"), "--base", str(merge.base), "-o", str(merge.merged)])
    merge.lora = tmp_path / "a.st"
    assert 0 == merge.check()
    assert "yes: it holds the LoRA at strength 1 in 14 adapted tensors" == sentence(capsys)
    assert 1 == merge.check("--strength", "0.5")
    base = load_file(merge.base / "model.safetensors")
    merged = load_file(merge.merged / "model.safetensors")
    where = int((base[Q] != merged[Q]).flatten().nonzero()[7])

    def nudge(state: State) -> None:
        state[Q].view(torch.int16).view(-1)[where] += 1

    merge.edit(nudge)
    assert 1 == merge.check()
    assert sentence(capsys).endswith(f"1 hold something else: {Q}")
    shutil.copytree(merge.base, merge.merged, dirs_exist_ok=True)
    (merge.merged / "model.safetensors").write_bytes((merge.base / "model.safetensors").read_bytes())
    assert 1 == merge.check()
    assert sentence(capsys).startswith("no: nothing was merged")
    half = ["shira_to_full", str(tmp_path / "a.st"), "--base", str(merge.base), "-o", str(merge.merged), "--force"]
    assert 0 == main([*half, "--alpha", "0.5"])
    assert 0 == merge.check("--strength", "0.5")
    assert 1 == merge.check()
    save_file({name: tensor + 1 for name, tensor in base.items()}, merge.base / "model.safetensors")
    capsys.readouterr()
    assert 2 == merge.check()
    assert "holds other values at the adapter's entries" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0], ids=str)
def test_gguf(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """What rounding to floats does is told entry by entry; of quantised weights only the strength is."""
    state = ggufs.model("llama")
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    lora, merged = {}, dict(state)
    for name, weight in state.items():
        if "_proj" in name:
            a, b = (
                torch.randn(shape, generator=generator) for shape in ((8, weight.shape[1]), (weight.shape[0], 8))
            )
            key = "base_model.model." + name.removesuffix(".weight")
            lora |= {f"{key}.lora_A.weight": 0.05 * a, f"{key}.lora_B.weight": 0.05 * b}
            merged[name] = weight + 0.05 * b @ (0.05 * a)
    (tmp_path / "lora").mkdir()
    save_file(lora, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    arguments = ["check_merge", "--base", str(tmp_path / "base"), "--lora", str(tmp_path / "lora"), "--quiet"]
    for name, content in (("merged", merged), ("plain", state)):
        monkeypatch.setattr(ggufs, "model", lambda _, content=content: content)
        ggufs.write(tmp_path / f"{name}.gguf", "llama", kind)
    plain = kind != Kind.Q8_0
    assert (0 if plain else 3) == main([*arguments, "--merged", str(tmp_path / "merged.gguf")])
    last = sentence(capsys)
    assert ("yes: it holds" if plain else "inconclusive: the weights are quantised, and only") in last
    assert 1 == main([*arguments, "--merged", str(tmp_path / "plain.gguf")])
    assert "no: nothing was merged: all 14 adapted tensors equal the base's" == sentence(capsys)
    assert 1 == main([*arguments, "--merged", str(tmp_path / "merged.gguf"), "--strength", "2"])
    last = sentence(capsys)
    assert last.startswith("no: it holds the LoRA at strength ")
    assert 1 == pytest.approx(float(last.split()[7]), rel=0.005)


def test_the_table(merge: Merge, capsys: Capture) -> None:
    merge.merge()
    assert 0 == merge.check("--threads", "1")
    out, err = capsys.readouterr()
    assert "" == err
    lines = out.splitlines()
    assert [
        "tensor",
        "verdict",
        "strength",
        "fits",
        "from",
        "to",
        "bits",
        "equal",
        "off",
        "by",
        "residual",
    ] == lines[0].split()
    assert 14 == sum(" verified " in line for line in lines)
    assert "yes: it holds the LoRA at strength 1 in 14 adapted tensors" == lines[-1]
    assert "tensors that it leaves alone: 7 compared, 0 changed" == lines[-2]


def test_what_cannot_be_read_is_2(tmp_path: Path, capsys: Capture) -> None:
    merge = Merge(tmp_path, torch.float32, LLAMA)
    merge.merge()

    def failed(*arguments: str) -> str:
        assert 2 == merge.check(*arguments)
        out, err = capsys.readouterr()
        assert "" == out
        assert 1 == err.count("\n")
        return err

    assert "no adapted tensor is left by the choice of names" in failed("--include", "nothing")
    assert "not a regular expression" in failed("--include", "(")
    weights = (merge.merged / "model.safetensors").read_bytes()
    (merge.merged / "model.safetensors").write_bytes(weights[:-100])
    assert "model.safetensors" in failed()
    (merge.merged / "model.safetensors").unlink()
    assert str(merge.merged) in failed()
    save_file({"x.weight": torch.ones(3, 3)}, merge.merged / "model.safetensors")
    assert "no tensor of the base is in it" in failed()
    (merge.merged / "model.safetensors").write_bytes(weights)
    models.edit_config(merge.lora, peft_type="IA3")
    assert "adapter_config.json" in failed()
    shutil.rmtree(merge.lora)
    assert str(merge.lora) in failed()


@pytest.mark.parametrize(
    "options, reason",
    [
        (("--strength", "0"), "--strength 0.0 is not a number other than 0"),
        (("--strength", "nan"), "--strength nan is not a number other than 0"),
        (("--threads", "0"), "--threads 0 is not a positive count"),
        (("--dialect", "x"), "--dialect 'x' is not one of "),
        (("--nothing",), "no such option: --nothing"),
    ],
)
def test_wrong_usage_is_2(options: tuple[str, ...], reason: str, tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(
            ["check_merge", "--base", str(tmp_path), "--lora", str(tmp_path), "--merged", str(tmp_path), *options]
        )
    assert 2 == caught.value.code
    assert reason in capsys.readouterr().err


def test_help(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check_merge", "--help"])
    assert 0 == caught.value.code
    out = capsys.readouterr().out
    assert "3  inconclusive: rounding to the merged dtype hides the update" in out
    assert "shira-convert check_merge --base my-model/ --lora my-lora/ --merged my-merged-model/" in out
