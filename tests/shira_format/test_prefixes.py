"""Names that differ in a prefix: every renaming is found before one is taken, in every dialect and on live models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shira_cli.convert import main
from shira_format.adapter import Adapter
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import full_to_shira, lora_to_shira
from shira_format.convert.peft_shira import peft_to_shira
from shira_format.errors import BaseMismatch, SourceError
from shira_format.format import load
from shira_format.live import Switcher
from shira_format.lora import open_lora
from shira_format.names.prefixes import AmbiguousNames, Renaming, match_names, numbers
from tests.dialects import WRITERS, Pair, Pairs

MODULES = [f"encoder.layer.{i}.attention.self.query" for i in (0, 1)]
Base = dict[str, torch.Tensor]


def torchtune(pairs: Pairs, folder: Path) -> Path:
    """torchtune's recipe names its layers in its own way, which is one of Llama."""
    some = next(iter(pairs.values()))
    (folder / "adapter_config.json").write_text(json.dumps({"r": some.a.shape[0], "lora_alpha": some.alpha}))
    state = {}
    for i, (a, b, _) in enumerate(pairs.values()):
        state |= {f"layers.{i}.attn.v_proj.lora_a.weight": a, f"layers.{i}.attn.v_proj.lora_b.weight": b}
    torch.save(state, folder / "adapter_model.pt")
    return folder / "adapter_model.pt"


def xlabs(pairs: Pairs, folder: Path) -> Path:
    """x-flux has no alpha."""
    state = {}
    for i, (a, b, alpha) in enumerate(pairs.values()):
        key = f"double_blocks.{i}.processor.qkv_lora1"
        state |= {f"{key}.down.weight": a, f"{key}.up.weight": b * (alpha / a.shape[0])}
    save_file(state, folder / "flux.safetensors")
    return folder / "flux.safetensors"


OTHERS: dict[str, tuple[Callable[[Pairs, Path], Path], list[str], str]] = {
    "torchtune": (torchtune, [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)], "model."),
    "xlabs": (xlabs, [f"double_blocks.{i}.img_attn.qkv" for i in (0, 1)], ""),
}
ROWS = {"xlabs": 48}  # queries, keys and values
DIALECTS = {name: (write, MODULES, "") for name, write in WRITERS.items()} | OTHERS


def pairs(modules: list[str], rows: int = 16, columns: int = 16) -> dict[str, Pair]:
    torch.manual_seed(3)
    return {module: Pair(torch.randn(4, columns) / 8, torch.randn(rows, 4) / 8, 8.0) for module in modules}


def towers(modules: list[str], own: str, **shapes: tuple[int, int]) -> Base:
    """The modules under each tower's prefix in place of ``own``."""
    torch.manual_seed(4)
    return {
        f"{tower}.{module.removeprefix(own)}.weight": torch.randn(shape)
        for tower, shape in shapes.items()
        for module in modules
    }


def save(base: Base, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4}))
    save_file(base, folder / "model.safetensors")
    return folder


def check(adapter: Adapter, base: Base, wanted: dict[str, Pair]) -> None:
    """Every target is ``W + alpha / r B A`` of this tensor, in float64 and up to rounding; no other tensor is there."""
    assert wanted.keys() == {name.removesuffix(".weight") for name in adapter}
    for module, (a, b, alpha) in wanted.items():
        weight = base[f"{module}.weight"].double()
        exact = (weight + alpha / a.shape[0] * b.double() @ a.double()).numpy()
        tensor = adapter[f"{module}.weight"]
        found = weight.numpy().reshape(-1).copy()
        found[tensor.indices] = tensor.values
        np.testing.assert_allclose(found.reshape(exact.shape), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_two_towers_alike_are_refused_and_the_user_chooses(dialect: str, tmp_path: Path) -> None:
    write, modules, own = DIALECTS[dialect]
    rows = ROWS.get(dialect, 16)
    state = towers(modules, own, text_model=(rows, 16), vision_model=(rows, 16))
    base, lora = save(state, tmp_path / "base"), write(pairs(modules, rows), tmp_path)
    with pytest.raises(
        SourceError, match=r"text_model\..*vision_model\..*--prefix text_model\. or --prefix vision_model\."
    ):
        lora_to_shira(lora, base, tmp_path / "x.st", density=1.0)
    assert not (tmp_path / "x.st").exists()
    for tower in ("text_model.", "vision_model."):
        out = tmp_path / f"{tower}st"
        assert (
            main(
                [
                    "lora_to_shira",
                    str(lora),
                    "--base",
                    str(base),
                    "-o",
                    str(out),
                    "--density",
                    "1",
                    "--prefix",
                    tower,
                ]
            )
            == 0
        )
        check(
            load(out),
            state,
            {tower + module.removeprefix(own): pair for module, pair in pairs(modules, rows).items()},
        )
    with pytest.raises(SourceError, match="the base.* under --prefix audio"):
        lora_to_shira(lora, base, None, prefix="audio.")


@pytest.mark.parametrize("dialect", sorted(set(DIALECTS) - {"xlabs"}))
def test_shapes_choose_the_tower(dialect: str, tmp_path: Path) -> None:
    write, modules, own = DIALECTS[dialect]
    state = towers(modules, own, text_model=(12, 12), vision_model=(16, 16), visual=(16, 8))
    base, lora = save(state, tmp_path / "base"), write(pairs(modules), tmp_path)
    report = lora_to_shira(lora, base, tmp_path / "x.st", density=1.0)
    assert any("vision_model." in notice for notice in report.notices)
    check(
        load(tmp_path / "x.st"), state,
        {f"vision_model.{module.removeprefix(own)}": pair for module, pair in pairs(modules).items()},
    )  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_layer_that_the_base_lacks_is_refused_by_name(dialect: str, tmp_path: Path) -> None:
    write, modules, own = DIALECTS[dialect]
    rows = ROWS.get(dialect, 16)
    base = save(towers(modules[:1], "", top=(rows, 16)), tmp_path / "base")
    lora = write(pairs(modules, rows), tmp_path)
    with pytest.raises(SourceError, match=r"[._]1[._]"):
        lora_to_shira(lora, base, None)


def test_layer_31_is_not_put_on_layer_0(tmp_path: Path) -> None:
    module = "model.layers.31.self_attn.q_proj"
    base = save({"model.layers.0.self_attn.q_proj.weight": torch.randn(16, 16)}, tmp_path / "base")
    for dialect in sorted(set(WRITERS) - {"gguf"}):
        (tmp_path / dialect).mkdir()
        lora = WRITERS[dialect](pairs([module]), tmp_path / dialect)
        with pytest.raises(SourceError, match=r"layers.31.self.attn.q.proj"):
            open_lora(lora, open_checkpoint(base))


@pytest.mark.parametrize(
    ("needed", "base"),
    [
        ("layers.31.q", "layers.0.q"), ("a.0.b.q", "a.b.q"), ("a.b.q", "a.0.b.q"), ("0.a.b.q", "a.b.q"), ("b.q.w", "0.b.q.w"),
        ("m.1.2.b.q", "m.2.1.b.q"), ("text_model.a.q", "vision_model.a.q"), ("encoder.a.q", "decoder.a.q"),
    ],
)  # fmt: skip
def test_renamings_that_are_none(needed: str, base: str) -> None:
    with pytest.raises(SourceError, match="1 of 1 adapted weights are not in the base"):
        match_names([needed], [base], "it")


PARTS = st.sampled_from(["a", "b", "model", "0", "1", "31", "text_model", "vision_model"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=5).map(".".join), min_size=1, max_size=3, unique=True)


@given(
    needed=NAMES,
    base=st.lists(st.lists(PARTS, min_size=1, max_size=5).map(".".join), min_size=1, max_size=8, unique=True),
)
@settings(max_examples=400, deadline=None)
def test_a_renaming_is_the_only_one_and_keeps_numbers(needed: list[str], base: list[str]) -> None:
    tails = [f"{name}.q.weight" for name in needed]
    known = [f"{name}.q.weight" for name in base]
    try:
        rename = match_names(tails, known, "it")
    except AmbiguousNames as error:
        assert str(error).count("--prefix") > 1
        return
    except SourceError:
        return
    for name in tails:
        assert rename(name) in known
        assert numbers(name) == numbers(rename(name))
    if rename != Renaming():  # nothing else would do
        for old in {"", *(".".join(tails[0].split(".")[:n]) + "." for n in (1, 2, 3))}:
            for new in {"", *(".".join(name.split(".")[:n]) + "." for name in known for n in (1, 2, 3))}:
                other = Renaming(old, new)
                kept = numbers(old) == numbers(new) and all(name.startswith(old) for name in tails)
                towers = {"text_model", "vision_model"}
                told = towers & set(tails[0].split(".")[:-1])
                if kept and all(other(name) in known for name in tails) and not (
                    towers & set(old.split(".")) and towers & set(new.split("."))
                ) and told <= set(other(tails[0]).split(".")):  # fmt: skip
                    assert [other(name) for name in tails] == [rename(name) for name in tails]


def sparse(folder: Path, modules: list[str], rows: int, columns: int, r: int = 2) -> Path:
    """A SHiRA as PEFT writes it."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIRA", "r": r}))
    state = {}
    for module in modules:
        flat = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(1))[: r * (rows + columns)]
        key = f"base_model.model.{module}.shira_"
        state[f"{key}indices"] = torch.stack([flat // columns, flat % columns]).int()
        state[f"{key}weight"] = torch.randn(len(flat))
    save_file(state, folder / "adapter_model.safetensors")
    return folder


def test_sparse_adapters_of_peft(tmp_path: Path) -> None:
    folder = sparse(tmp_path / "a", MODULES, 16, 16)
    base = save(towers(MODULES, "", text_model=(16, 16), vision_model=(16, 16)), tmp_path / "base")
    with pytest.raises(SourceError, match=r"--prefix text_model\. or --prefix vision_model\."):
        peft_to_shira(folder, base, None)
    for tower in ("text_model.", "vision_model."):
        out = tmp_path / f"{tower}st"
        assert main(["peft_to_shira", str(folder), "--base", str(base), "-o", str(out), "--prefix", tower]) == 0
        assert {f"{tower}{module}.weight" for module in MODULES} == set(load(out))
    other = save(
        towers(MODULES, "", text_model=(12, 20), vision_model=(16, 16), visual=(10, 10)), tmp_path / "other"
    )
    report = peft_to_shira(folder, other, tmp_path / "x.st")
    assert any("vision_model." in notice for notice in report.notices)
    assert {f"vision_model.{module}.weight" for module in MODULES} == set(load(tmp_path / "x.st"))
    wrong = save({"encoder.layer.0.attention.self.query.weight": torch.randn(16, 16)}, tmp_path / "wrong")
    with pytest.raises(SourceError, match=r"encoder\.layer\.1\.attention"):
        peft_to_shira(folder, wrong, None)


def test_live_models(tmp_path: Path) -> None:
    bare = towers(MODULES, "", x=(16, 16))
    base = save({name.removeprefix("x."): tensor for name, tensor in bare.items()}, tmp_path / "base")
    lora_to_shira(WRITERS["peft"](pairs(MODULES), tmp_path), base, tmp_path / "x.st", density=1.0)
    values = {name.removeprefix("x."): tensor for name, tensor in bare.items()}
    alike: dict[str, Any] = {
        f"{t}.{n}": v.clone() for t in ("text_model", "vision_model") for n, v in values.items()
    }
    before = {name: tensor.clone() for name, tensor in alike.items()}
    with pytest.raises(BaseMismatch, match=r"prefix= text_model\. or prefix= vision_model\. or rename="):
        Switcher(alike).load(tmp_path / "x.st")
    assert all(torch.equal(alike[name], before[name]) for name in before)
    Switcher(alike, prefix="vision_model.").load(tmp_path / "x.st")
    changed = {name for name in before if not torch.equal(alike[name], before[name])}
    assert {f"vision_model.{name}" for name in values} == changed
    unlike: dict[str, Any] = {f"vision_model.{name}": tensor.clone() for name, tensor in values.items()}
    unlike |= {f"text_model.{name}": torch.randn(8, 16) for name in values}
    Switcher(unlike).load(tmp_path / "x.st")
    lacking: dict[str, Any] = {name.replace(".1.", ".7."): tensor.clone() for name, tensor in values.items()}
    with pytest.raises(BaseMismatch, match=r"encoder\.layer\.1\."):
        Switcher(lacking).load(tmp_path / "x.st")


def merged(base: Base, tower: str, modules: list[str]) -> Base:
    return base | {
        f"{tower}{module}.weight": base[f"{tower}{module}.weight"] + 2 * b @ a
        for module, (a, b, _) in pairs(modules).items()
    }


def test_check_merge_needs_the_choice_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = towers(MODULES, "", text_model=(16, 16), vision_model=(16, 16))
    base, lora = save(state, tmp_path / "base"), WRITERS["peft"](pairs(MODULES), tmp_path)
    after = save(merged(state, "vision_model.", MODULES), tmp_path / "merged")
    paths = ["check_merge", "--base", str(base), "--lora", str(lora), "--merged", str(after)]
    assert main(paths) == 2
    assert "--prefix text_model. or --prefix vision_model." in capsys.readouterr().err
    assert main([*paths, "--prefix", "vision_model."]) == 0
    assert main([*paths, "--prefix", "text_model."]) == 1


def test_a_merged_checkpoint_with_two_towers_of_a_bare_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name.removeprefix("x."): tensor for name, tensor in towers(MODULES, "", x=(16, 16)).items()}
    base, lora = save(state, tmp_path / "base"), WRITERS["peft"](pairs(MODULES), tmp_path)
    right = merged(state, "", MODULES)
    both = {f"one.{n}": t for n, t in state.items()} | {f"two.{n}": t for n, t in right.items()}
    paths = [
        "check_merge",
        "--base",
        str(base),
        "--lora",
        str(lora),
        "--merged",
        str(save(both, tmp_path / "merged")),
    ]
    assert main(paths) == 2
    error = capsys.readouterr().err
    assert "'one.' is left out, or the prefix 'two.' is left out; choose with --merged-prefix" in error
    assert main([*paths, "--merged-prefix", "two."]) == 0
    assert main([*paths, "--merged-prefix", "one."]) == 1


def test_a_full_fine_tune_of_one_of_two_towers(tmp_path: Path) -> None:
    state = towers(MODULES, "", text_model=(16, 16), vision_model=(16, 16))
    base = save(state, tmp_path / "base")
    tuned = {n.removeprefix("vision_model."): t.clone() for n, t in state.items() if n.startswith("vision_model.")}
    for tensor in tuned.values():
        tensor[0, 0] += 1
    folder = save(tuned, tmp_path / "tuned")
    with pytest.raises(SourceError, match=r"'text_model\.' is added .*'vision_model\.' is added .*\(exact\)"):
        full_to_shira(folder, base, None)
    full_to_shira(folder, base, tmp_path / "x.st", exact=True)  # by content
    adapter = load(tmp_path / "x.st")
    assert {name: f"vision_model.{name}" for name in tuned} == {n: adapter[n].base_name for n in adapter}
    assert all(tensor.nnz == 1 for tensor in adapter.values())
    other = save(state | {n: torch.ones(12, 16) for n in state if "text" in n}, tmp_path / "other")
    report = full_to_shira(folder, other, tmp_path / "y.st", exclude=["text_model"])
    assert ["names: the prefix 'vision_model.' is added"] == report.notices
