"""Adapters over several towers, and what decides between towers that are alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shira_format.convert import lora_to_shira
from shira_format.convert.peft_shira import peft_to_shira
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.names.prefixes import AmbiguousNames, match_names, numbers
from tests.dialects import WRITERS, Pair
from tests.shira_format.test_prefixes import MODULES, check, pairs, save, sparse, towers

# What transformers renames between disk and memory (conversion_mapping.py), and between a causal LM and its wrapper: pairs of
# names that must find each other, both ways.
LAYER, BLOCK = "layers.{}.self_attn.q_proj", "blocks.{}.attn.qkv"
SPACES: dict[str, list[tuple[str, str]]] = {
    "qwen2_vl": [
        (f"model.visual.{BLOCK}", f"visual.{BLOCK}"), ("model.visual.merger.mlp.0", "visual.merger.mlp.0"),
        (f"model.language_model.{LAYER}", f"model.{LAYER}"), ("model.language_model.embed_tokens", "model.embed_tokens"),
        ("lm_head", "lm_head"),
    ],
    "llava": [
        (f"model.vision_tower.vision_model.encoder.{LAYER}", f"vision_tower.vision_model.encoder.{LAYER}"),
        ("model.multi_modal_projector.linear_1", "multi_modal_projector.linear_1"),
        (f"model.language_model.{LAYER}", f"language_model.model.{LAYER}"), ("lm_head", "language_model.lm_head"),
    ],
    "mllama": [
        (f"model.vision_model.transformer.{LAYER}", f"vision_model.transformer.{LAYER}"),
        ("model.multi_modal_projector", "multi_modal_projector"),
        (f"model.language_model.{LAYER}", f"language_model.model.{LAYER}"), ("lm_head", "language_model.lm_head"),
    ],
    "qwen2_audio": [
        (f"model.audio_tower.{LAYER}", f"audio_tower.{LAYER}"),
        (f"model.language_model.{LAYER}", f"language_model.model.{LAYER}"), ("lm_head", "language_model.lm_head"),
    ],
    "causal_lm_in_wrapper": [(f"model.{LAYER}", f"model.language_model.{LAYER}"), ("lm_head", "lm_head")],
    "causal_lm_in_old_wrapper": [(f"model.{LAYER}", f"language_model.model.{LAYER}"), ("lm_head", "language_model.lm_head")],
    "text_and_head": [(f"model.language_model.{LAYER}", f"model.{LAYER}"), ("lm_head", "lm_head")],
    "colqwen2": [
        (f"vlm.model.visual.{BLOCK}", f"vlm.visual.{BLOCK}"), (f"vlm.model.language_model.{LAYER}", f"vlm.language_model.{LAYER}"),
        ("embedding_proj_layer", "embedding_proj_layer"),
    ],
}  # fmt: skip
VISION = ["visual", "vision_tower", "vision_model"]


def several(names: list[str]) -> list[str]:
    return [name.format(i) for name in names for i in ((0, 1) if "{}" in name else (0,))]


@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("space", SPACES)
def test_names_that_transformers_changes(space: str, back: bool, tmp_path: Path) -> None:
    ours, theirs = (several([pair[i] for pair in SPACES[space]]) for i in ((1, 0) if back else (0, 1)))
    adapted = {name: Pair(torch.randn(4, 16) / 8, torch.randn(16, 4) / 8, 8.0) for name in ours}
    state = {f"{name}.weight": torch.randn(16, 16) for name in theirs}
    if not any(word in name for word in VISION for name in theirs):
        # A tower that the adapter does not touch, of other shapes.
        state |= {f"model.visual.{LAYER.format(i)}.weight": torch.randn(12, 16) for i in (0, 1)}
    base = save(state, tmp_path / "base")
    report = lora_to_shira(WRITERS["peft"](adapted, tmp_path), base, tmp_path / "x.st", density=1.0)
    check(load(tmp_path / "x.st"), state, {new: adapted[old] for old, new in zip(ours, theirs, strict=True)})
    assert len(report.notices) == 1
    assert report.notices[0].startswith("names of the LoRA are not those of the base: ")


@pytest.mark.parametrize(
    ("needed", "base"),
    [
        (["visual.a.q", "a.b.q"], ["visual.a.q", "visual.a.b.q"]),  # what tells no tower is not of the vision tower
        (["a.x.q", "b.y.q"], ["text_model.a.x.q", "vision_model.b.y.q"]),  # nor of two towers
        (["visual.a.q", "text.a.q"], ["a.q.q", "a.q"]),  # two are not one
        (["model.layers.0.q", "lm_head.q"], ["language_model.layers.1.q", "lm_head.q"]),
        (["visual.layers.0.q", "model.layers.0.q"], ["audio.layers.0.q", "model.layers.0.q"]),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit(needed: list[str], base: list[str]) -> None:
    with pytest.raises(SourceError, match="adapted weights are not in the base"):
        match_names(needed, base, "it")


def test_one_of_the_groups_is_ambiguous_and_the_user_chooses() -> None:
    needed = ["visual.blocks.0.q.w", "layers.0.q.w"]
    base = ["model.visual.blocks.0.q.w", "a.layers.0.q.w", "b.layers.0.q.w"]
    with pytest.raises(
        AmbiguousNames, match=r"'layers.0.q.w' and the others .* choose with --prefix a\. or --prefix b\."
    ):
        match_names(needed, base, "it")
    rename = match_names(needed, base, "it", prefix="b.")
    assert [rename(name) for name in needed] == ["model.visual.blocks.0.q.w", "b.layers.0.q.w"]
    rename = match_names(needed, base, "it", fits=lambda _, found: not found.startswith("b"))
    assert rename(needed[1]) == "a.layers.0.q.w"
    with pytest.raises(SourceError, match="not in the base under --prefix c"):
        match_names(needed, base, "it", prefix="c.")


def test_names_that_tell_a_tower_keep_it() -> None:
    """Although a layer of the other tower would fit as well, once the word is left out."""
    base = ["visual.layers.0.q.weight", "model.layers.0.q.weight"]
    for needed in (
        "model.visual.layers.0.q.weight",
        "vision_tower.layers.0.q.weight",
        "model.vision.x.layers.0.q.weight",
    ):
        assert match_names([needed], base, "it")(needed) == base[0]


def test_names_of_no_group() -> None:
    """Biases go with their weights; others are found where only one group brings them into the base."""
    base = ["visual.blocks.0.q.weight", "visual.blocks.0.q.bias", "visual.merger.weight", "model.layers.0.q.weight", "model.norm.weight", "score.weight"]  # fmt: skip
    needed = ["model.visual.blocks.0.q.weight", "model.language_model.layers.0.q.weight"]
    rename = match_names(needed, base, "it")
    for old, new in {
        "model.visual.blocks.0.q.bias": "visual.blocks.0.q.bias", "model.visual.merger.weight": "visual.merger.weight",
        "model.language_model.norm.weight": "model.norm.weight", "score.weight": "score.weight", "other.weight": "other.weight",
    }.items():  # fmt: skip
        assert rename(old) == new


PARTS = st.sampled_from(["a", "b", "model", "0", "1", "text_model", "visual", "language_model"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=5, unique=True)


@given(needed=NAMES, base=st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=9, unique=True))  # fmt: skip
@settings(max_examples=500, deadline=None)
def test_what_holds_of_all_renamings(needed: list[str], base: list[str]) -> None:
    names, known = ([f"{name}.q.weight" for name in group] for group in (needed, base))
    try:
        rename = match_names(names, known, "it")
    except SourceError:
        return
    found = [rename(name) for name in names]
    assert len(set(found)) == len(found)
    assert set(found) <= set(known)
    for old, new in zip(names, found, strict=True):
        assert numbers(old) == numbers(new)
        if old != new:
            assert old.split(".")[-2:] == new.split(".")[-2:]


def test_many_names_are_matched_in_bounded_time() -> None:
    """60 groups that fit a hundred thousand names each."""
    base = [f"p{i}.x.weight" for i in range(100_000)]
    with pytest.raises(AmbiguousNames, match="more than 1000 ways"):
        match_names([f"q{i}.x.weight" for i in range(60)], base, "it")
    with pytest.raises(SourceError, match="not in the base"):
        match_names([f"q{i}.z.weight" for i in range(100_000)], base, "it")


TEXT, IMAGE = "text_model.", "vision_model."
SAYS: dict[str, tuple[dict[str, Any], str | None]] = {
    "text_class": ({"auto_mapping": {"base_model_class": "CLIPTextModel", "parent_library": "transformers.models.clip.modeling_clip"}}, TEXT),
    "vision_class": ({"auto_mapping": {"base_model_class": "SiglipVisionModel"}}, IMAGE),
    "projection": ({"auto_mapping": {"base_model_class": "CLIPVisionModelWithProjection"}}, IMAGE),
    "causal_lm": ({"auto_mapping": {"base_model_class": "LlamaForCausalLM"}}, TEXT),
    "whole_class": ({"auto_mapping": {"base_model_class": "CLIPModel"}}, None),
    "two_towers": ({"auto_mapping": {"base_model_class": "VisionTextDualEncoderModel"}}, None),
    "encoder": ({"auto_mapping": {"base_model_class": "T5EncoderModel"}}, None),  # both have one
    "audio_class": ({"auto_mapping": {"base_model_class": "WhisperAudioModel"}}, None),  # neither is
    "library": ({"auto_mapping": {"base_model_class": "LlamaModel", "parent_library": "transformers.models.llama.modeling_llama"}}, TEXT),
    "library_of_both": ({"auto_mapping": {"base_model_class": "X", "parent_library": "transformers.models.clip.modeling_clip"}}, None),
    "regex": ({"target_modules": r"vision_model\.encoder.*\.(query|key)"}, IMAGE),
    "regex_of_both": ({"target_modules": r".*\.query"}, None),
    "regex_of_neither": ({"target_modules": r"encoder\..*query"}, None),
    "regex_that_is_none": ({"target_modules": "("}, None),
    "paths": ({"target_modules": [f"{TEXT}{module}" for module in MODULES]}, TEXT),
    "ends": ({"target_modules": ["query"]}, None),
    "folder": ({"base_model_name_or_path": "/models/clip/vision_model/"}, IMAGE),
    "repository": ({"base_model_name_or_path": "someone/great-vision-model"}, None),
    "agreement": ({"auto_mapping": {"base_model_class": "CLIPTextModel"}, "target_modules": r"text_model.*query"}, TEXT),
    "contradiction": ({"auto_mapping": {"base_model_class": "CLIPTextModel"}, "target_modules": r"vision_model.*query"}, None),
    "not_even_a_mapping": ({"auto_mapping": ["CLIPTextModel"], "target_modules": [1], "base_model_name_or_path": None}, None),
}  # fmt: skip
SUBS = {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}, "q": {"model_type": "clip_text"}, "audio_config": {"model_type": "clip"}}  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "shira"])
@pytest.mark.parametrize("case", SAYS)
def test_what_an_adapter_says_decides_between_towers(case: str, kind: str, tmp_path: Path) -> None:
    options, tower = SAYS[case]
    state = towers(MODULES, "", text_model=(16, 16), vision_model=(16, 16))
    base = save(state, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(SUBS))
    adapter = (
        WRITERS["peft"](pairs(MODULES), tmp_path) if kind == "lora" else sparse(tmp_path / "a", MODULES, 16, 16)
    )
    folder = adapter if adapter.is_dir() else adapter.parent
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    run: Any = (lambda out: lora_to_shira(adapter, base, out, density=1.0)) if kind == "lora" else (lambda out: peft_to_shira(adapter, base, out))  # fmt: skip
    if tower is None:
        with pytest.raises(AmbiguousNames, match=r"--prefix text_model\. or --prefix vision_model\."):
            run(tmp_path / "x.st")
        assert not (tmp_path / "x.st").exists()
        return
    report = run(tmp_path / "x.st")
    assert any(f"the prefix '{tower}' is added (as " in notice for notice in report.notices)
    assert {f"{tower}{module}.weight" for module in MODULES} == set(load(tmp_path / "x.st"))
    if kind == "lora":
        check(load(tmp_path / "x.st"), state, {tower + module: pair for module, pair in pairs(MODULES).items()})


def test_shapes_come_before_what_an_adapter_says(tmp_path: Path) -> None:
    state = towers(MODULES, "", text_model=(12, 12), vision_model=(16, 16), visual=(16, 8))
    base, lora = save(state, tmp_path / "base"), WRITERS["peft"](pairs(MODULES), tmp_path)
    folder = lora if lora.is_dir() else lora.parent
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"auto_mapping": {"base_model_class": "CLIPTextModel"}})
    )
    lora_to_shira(lora, base, tmp_path / "x.st", density=1.0)
    assert all(name.startswith("vision_model.") for name in load(tmp_path / "x.st"))


def test_a_head_in_a_wrapper_keeps_its_rows(tmp_path: Path) -> None:
    """Text with ``lm_head`` whole (modules_to_save), in a wrapper that calls the head otherwise."""
    state = {f"language_model.model.{LAYER.format(0)}.weight": torch.randn(16, 16), "language_model.lm_head.weight": torch.randn(20, 16)}  # fmt: skip
    base = save(state, tmp_path / "base")
    folder = tmp_path / "lora"
    folder.mkdir()
    head, a, b = torch.randn(20, 16), torch.randn(2, 16), torch.randn(16, 2)
    key = f"base_model.model.model.{LAYER.format(0)}"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, "base_model.model.lm_head.weight": head}, folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["lm_head"]}))  # fmt: skip
    lora_to_shira(folder, base, tmp_path / "x.st", density=1.0)
    adapter = load(tmp_path / "x.st")
    assert "language_model.lm_head.weight" in adapter.dense
    np.testing.assert_array_equal(adapter.dense["language_model.lm_head.weight"].values, head.numpy())


HEAD_AND_PROJECTOR = {
    "llava": (
        [f"model.language_model.{LAYER.format(0)}"],
        {"lm_head": "language_model.lm_head", "model.multi_modal_projector.linear_1": "multi_modal_projector.linear_1"},
        {f"model.language_model.{LAYER.format(0)}": f"language_model.model.{LAYER.format(0)}"},
    ),
    "causal_lm": (
        [f"model.{LAYER.format(0)}"], {"lm_head": "language_model.lm_head"},
        {f"model.{LAYER.format(0)}": f"language_model.model.{LAYER.format(0)}"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "shira"])
@pytest.mark.parametrize("case", HEAD_AND_PROJECTOR)
def test_what_is_saved_whole_is_found_under_its_own_change(case: str, kind: str, tmp_path: Path) -> None:
    """And does not become a new tensor beside the base's own."""
    adapted, saved, names = HEAD_AND_PROJECTOR[case]
    state = {f"{name}.weight": torch.randn(16, 16) for name in [*names.values(), *saved.values()]}
    base = save(state, tmp_path / "base")
    whole = {f"base_model.model.{name}.weight": torch.randn(16, 16) for name in saved}
    if kind == "shira":
        folder = sparse(tmp_path / "a", adapted, 16, 16)
    else:
        folder = tmp_path / "a"
        folder.mkdir()
        WRITERS["peft"](pairs(adapted), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    new = {"base_model.model.score.weight": torch.randn(3, 16)}
    options = {"modules_to_save": [*(name.rpartition(".")[2] for name in saved), "score"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    path = next(folder.glob("*.safetensors"))
    save_file(load_file(path) | whole | new, path)
    if kind == "shira":
        report = peft_to_shira(folder, base, tmp_path / "x.st")
    else:
        report = lora_to_shira(folder, base, tmp_path / "x.st", density=1.0)
    adapter = load(tmp_path / "x.st")
    assert set(adapter) == {f"{names[name]}.weight" for name in adapted}
    assert set(adapter.dense) == {*(f"{name}.weight" for name in saved.values()), "score.weight"}
    for name, other in saved.items():
        found = adapter.dense[f"{other}.weight"].values
        np.testing.assert_array_equal(found, whole[f"base_model.model.{name}.weight"].numpy())
        assert any(f"'{other}.weight'" in notice for notice in report.notices) or case == "causal_lm"


def test_a_whole_tensor_that_could_be_two_is_refused(tmp_path: Path) -> None:
    state = {
        f"a.{LAYER.format(0)}.weight": torch.randn(16, 16),
        "b.head.weight": torch.randn(16, 16),
        "c.head.weight": torch.randn(16, 16),
    }
    folder = tmp_path / "a"
    folder.mkdir()
    WRITERS["peft"](pairs([f"model.{LAYER.format(0)}"]), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["head"]}))
    path = next(folder.glob("*.safetensors"))
    save_file(load_file(path) | {"base_model.model.head.weight": torch.randn(16, 16)}, path)
    with pytest.raises(AmbiguousNames, match=r"--prefix b\. or --prefix c\."):
        lora_to_shira(folder, save(state, tmp_path / "base"), None)


PREFIXES = {
    "text": ["language_model.", "model.language_model.", "language_model.model.", "text_model.", "model.text_model.", "model.", ""],
    "vision": ["visual.", "model.visual.", "vision_tower.", "vision_tower.vision_model.", "model.vision_tower.", "vision_model."],
    "audio": ["audio_tower.", "model.audio_tower."],
}  # fmt: skip
HEADS = ["lm_head.weight", "language_model.lm_head.weight"]


@given(data=st.data())
@settings(max_examples=600, deadline=None)
def test_towers_of_the_same_layers_are_never_confused(data: st.DataObject) -> None:
    """Each name finds the tensor of its tower, or the whole is refused, whatever the prefixes of adapter and base."""
    towers = data.draw(st.lists(st.sampled_from(list(PREFIXES)), min_size=1, max_size=3, unique=True))
    adapted = data.draw(st.lists(st.sampled_from(towers), min_size=1, max_size=3, unique=True))
    here, there = ({tower: data.draw(st.sampled_from(PREFIXES[tower])) for tower in towers} for _ in range(2))
    modules = [f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.fc1")]
    base = {there[tower] + module: (tower, module) for tower in towers for module in modules}
    needed = {here[tower] + module: (tower, module) for tower in adapted for module in modules}
    if data.draw(st.booleans()):
        base[data.draw(st.sampled_from(HEADS))] = needed[data.draw(st.sampled_from(HEADS))] = ("text", "head")
    try:
        rename = match_names(list(needed), list(base), "it")
    except SourceError:
        return
    assert {name: base[rename(name)] for name in needed} == needed
