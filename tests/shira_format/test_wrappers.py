"""Names of live models' state dicts: the words of wrappers, and PEFT's names of adapters in keys."""

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

from shira_cli.convert import main
from shira_format.checkpoints import open_checkpoint
from shira_format.checkpoints.wrapped import unwrapped_names
from shira_format.convert import full_to_shira, lora_to_shira
from shira_format.convert.peft_shira import peft_to_shira
from shira_format.errors import SourceError
from shira_format.export.full import shira_to_full
from shira_format.format import load
from shira_format.live import Switcher
from shira_format.lora import open_lora
from shira_format.lora.files import unwrapped_keys
from tests.dialects import WRITERS
from tests.shira_format.test_prefixes import MODULES, Base, check, merged, pairs, save, sparse, towers

WORDS = ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
FILES = ("adapter_model.safetensors", "kohya.safetensors", "lycoris.safetensors", "pytorch_lora_weights.safetensors", "adapters.safetensors")  # fmt: skip


def bare() -> Base:
    return {name.removeprefix("x."): tensor for name, tensor in towers(MODULES, "", x=(16, 16)).items()}


def weights_in(folder: Path) -> Path:
    return next(folder / name for name in FILES if (folder / name).is_file())


def in_front(key: str, word: str) -> str:
    """The key with the word before the module's name."""
    for prefix in ("base_model.model.", "text_encoder."):
        if key.startswith(prefix):
            return f"{prefix}{word}.{key.removeprefix(prefix)}"
    for prefix in ("lora_te_", "lycoris_"):
        if key.startswith(prefix):
            return f"{prefix}{word}_{key.removeprefix(prefix)}"
    return f"{word}.{key}"


def between(key: str, word: str) -> str:
    if key.startswith(("lora_te_", "lycoris_")):
        return key.replace("_attention_self", f"_{word}_attention_self")
    return key.replace(".attention.self", f".{word}.attention.self")


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dialect", sorted(set(WRITERS) - {"gguf"}))
@pytest.mark.parametrize("place", [in_front, between])
def test_words_in_the_keys_of_every_dialect(dialect: str, word: str, place: Any, tmp_path: Path) -> None:
    if word == "module" and place is between and dialect in ("kohya", "lycoris"):
        pytest.skip("'_module_' may be the middle of a name")
    state = bare()
    base = save(state, tmp_path / "base")
    lora = WRITERS[dialect](pairs(MODULES), tmp_path)
    path = weights_in(tmp_path)
    with open_header(path) as header:
        save_file({place(key, word): tensor for key, tensor in load_file(path).items()}, path, header)
    report = lora_to_shira(lora, base, tmp_path / "x.st", density=1.0)
    check(load(tmp_path / "x.st"), state, pairs(MODULES))
    assert any("without the words of wrappers" in notice for notice in report.notices)


class open_header:  # noqa: N801
    """The ``__metadata__`` of a file."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            self.header = file.metadata()

    def __enter__(self) -> Any:
        return self.header

    def __exit__(self, *_: object) -> None:
        pass


def test_a_word_that_the_base_has_stays(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in bare().items()} | {"other.weight": torch.ones(2)}
    base = save(state, tmp_path / "base")
    lora = WRITERS["peft"](pairs([f"module.{module}" for module in MODULES]), tmp_path)
    lora_to_shira(lora, base, tmp_path / "x.st", density=1.0)
    check(load(tmp_path / "x.st"), state, pairs([f"module.{module}" for module in MODULES]))


@pytest.mark.parametrize("word", WORDS)
def test_words_in_checkpoints(word: str, tmp_path: Path) -> None:
    state = bare()
    base = save({f"{word}.{name}": tensor for name, tensor in state.items()}, tmp_path / "base")
    lora = WRITERS["peft"](pairs(MODULES), tmp_path)
    report = lora_to_shira(lora, base, tmp_path / "x.st", density=1.0)
    # "module" may be the name of a module, and stays in the base: there it is a prefix like others.
    kept = "module." if word == "module" else ""
    wanted = "the prefix 'module.' is added" if kept else "without the words of wrappers"
    assert any(wanted in notice for notice in report.notices)
    state = {kept + name: tensor for name, tensor in state.items()}
    check(load(tmp_path / "x.st"), state, pairs([kept + module for module in MODULES]))
    shira_to_full(tmp_path / "x.st", base, tmp_path / "full")  # from the same base
    full = load_file(tmp_path / "full" / "model.safetensors")
    assert full.keys() == state.keys()
    for name, tensor in merged(state, kept, MODULES).items():
        np.testing.assert_allclose(full[name], tensor, rtol=0, atol=1e-5)
    live: dict[str, Any] = {f"{word}.{name}": tensor.clone() for name, tensor in bare().items()}
    Switcher(live).load(tmp_path / "x.st")
    assert all(torch.equal(live[f"{word}.{name.removeprefix(kept)}"], full[name]) for name in full)
    state = bare()
    after = merged(state, "", MODULES)
    wrapped = {name.replace(".attention", f".{word}.attention"): tensor for name, tensor in after.items()}
    done = save(wrapped, tmp_path / "merged")
    plain = save(state, tmp_path / "plain")
    assert main(["check_merge", "--base", str(plain), "--lora", str(lora), "--merged", str(done)]) == 0
    full_to_shira(done, plain, tmp_path / "y.st", density=1.0)
    assert state.keys() == set(load(tmp_path / "y.st"))
    full_to_shira(done, plain, tmp_path / "z.st", exact=True)  # with its very names
    shira_to_full(tmp_path / "z.st", plain, tmp_path / "exact")
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    assert exact.keys() == wrapped.keys()
    assert all(torch.equal(exact[name], wrapped[name]) for name in wrapped)


def test_two_names_that_become_one(tmp_path: Path) -> None:
    both = bare() | {f"_orig_mod.{name}": tensor + 1 for name, tensor in bare().items()}
    with pytest.raises(SourceError, match=r"without the words of wrappers .*_orig_mod\."):
        open_checkpoint(save(both, tmp_path))


def test_parts_that_only_look_alike(tmp_path: Path) -> None:
    state = {
        "submodule.module_list.weight": torch.ones(2),
        "a.module.weight": torch.ones(2),
        "module": torch.ones(1),
    }
    assert state.keys() == set(open_checkpoint(save(state, tmp_path)))


def edit(folder: Path, state: Base) -> None:
    save_file(state, folder / "adapter_model.safetensors")


def named(state: Base, adapter: str) -> Base:
    return {
        key.replace(".weight", f".{adapter}.weight") if ".lora_" in key else key: t for key, t in state.items()
    }


@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("saved", ["", ".default"])
def test_a_state_dict_of_peft(adapter: str, saved: str, tmp_path: Path) -> None:
    """``score.modules_to_save.default.weight`` is ``score.weight``, whatever the adapter's name."""
    state = bare() | {"score.weight": torch.ones(3, 16)}
    base = save(state, tmp_path / "base")
    lora = WRITERS["peft"](pairs(MODULES), tmp_path)
    config = json.loads((lora / "adapter_config.json").read_text()) | {"modules_to_save": ["score"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    plain = load_file(lora / "adapter_model.safetensors")
    head = torch.randn(3, 16)
    key = f"base_model.model.score.modules_to_save{saved.replace('default', adapter)}.weight"
    edit(lora, named(plain, adapter) | {key: head})
    lora_to_shira(lora, base, tmp_path / "x.st", density=1.0)
    adapter_file = load(tmp_path / "x.st")
    check(adapter_file, state, pairs(MODULES))
    assert ["score.weight"] == list(adapter_file.dense)
    np.testing.assert_array_equal(adapter_file.dense["score.weight"].values, head.numpy())
    edit(lora, plain | {key: head})  # LoRA as saved, head as in a state dict
    lora_to_shira(lora, base, tmp_path / "y.st", density=1.0)
    assert load(tmp_path / "y.st") == adapter_file


def test_several_adapters_are_refused_naming_both(tmp_path: Path) -> None:
    base = save(bare(), tmp_path / "base")
    lora = WRITERS["peft"](pairs(MODULES), tmp_path)
    plain = load_file(lora / "adapter_model.safetensors")
    edit(lora, named(plain, "one") | {k: t + 1 for k, t in named(plain, "two").items()})
    with pytest.raises(SourceError, match="several adapters, 'one' and 'two'"):
        open_lora(lora, open_checkpoint(base))
    edit(lora, named(plain, "one") | {k: t + 1 for k, t in plain.items()})
    with pytest.raises(SourceError, match="has the name of an adapter in it and"):
        open_lora(lora, open_checkpoint(base))


def test_a_module_that_was_saved_with_submodules(tmp_path: Path) -> None:
    """Older files: what follows ``modules_to_save`` is no adapter's name."""
    keys = [f"base_model.model.classifier.modules_to_save.{part}.weight" for part in ("dense", "out_proj")]
    assert {key: key for key in keys} == unwrapped_keys(
        keys, ["classifier.dense.weight", "classifier.out_proj.weight"], "it"
    )
    assert {key: key for key in keys} == unwrapped_keys(keys, [], "it")


def test_sparse_adapters_of_peft(tmp_path: Path) -> None:
    folder = sparse(tmp_path / "a", MODULES, 16, 16)
    base = save(bare(), tmp_path / "base")
    peft_to_shira(folder, base, tmp_path / "x.st")
    state = load_file(folder / "adapter_model.safetensors")
    edit(folder, {f"_orig_mod.{key}.default": tensor for key, tensor in state.items()})
    report = peft_to_shira(folder, base, tmp_path / "y.st")
    assert any("without the words of wrappers" in notice for notice in report.notices)
    assert load(tmp_path / "x.st") == load(tmp_path / "y.st")


PLAIN = st.lists(st.sampled_from(["a", "b", "layers", "0", "31"]), min_size=1, max_size=4)
INSERTED = st.lists(st.tuples(st.integers(0, 9), st.sampled_from(WORDS)), max_size=3)


@given(st.lists(st.tuples(PLAIN, INSERTED), min_size=1, max_size=5, unique_by=lambda pair: tuple(pair[0])))
@settings(max_examples=300, deadline=None)
def test_words_anywhere(names: list[tuple[list[str], list[tuple[int, str]]]]) -> None:
    wanted = {}
    for parts, words in names:
        full = list(parts)
        for place, word in words:
            full.insert(place % (len(full) + 1), word)
        wanted[".".join([*parts, "weight"])] = ".".join([*full, "weight"])
    assert wanted == unwrapped_names(list(wanted.values()), list(wanted), "it")
    assert wanted == unwrapped_keys(list(wanted.values()), list(wanted), "it")


TOWERS = ["", "text_model.", "vision_model.", "model.", "model.visual."]


@given(
    dialect=st.sampled_from(sorted(set(WRITERS) - {"gguf"})),
    towers_of=st.dictionaries(
        st.sampled_from(TOWERS), st.sampled_from([(16, 16), (16, 8), (12, 16)]), min_size=1, max_size=4
    ),
    word=st.sampled_from(["", *WORDS]),
    place=st.sampled_from([in_front, between]),
    chosen=st.sampled_from([None, *TOWERS[1:]]),
    layers=st.lists(st.sampled_from([0, 1, 31]), min_size=1, max_size=2, unique=True),
)
@settings(max_examples=150, deadline=None)
def test_the_right_weights_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, dialect: str, towers_of: dict[str, tuple[int, int]], word: str, place: Any,
    chosen: str | None, layers: list[int],
) -> None:  # fmt: skip
    """Every way of naming: the file's only possible meaning, in float64, or an error."""
    folder = tmp_path_factory.mktemp("grid")
    modules = [f"encoder.layer.{i}.attention.self.query" for i in layers]
    state = {
        f"{tower}{module}.weight": torch.randn(shape) for tower, shape in towers_of.items() for module in MODULES
    }
    base = save(state, folder / "base")
    lora = WRITERS[dialect](pairs(modules, 16, 8), folder)
    if word:
        path = weights_in(folder)
        with open_header(path) as header:
            save_file({place(key, word): tensor for key, tensor in load_file(path).items()}, path, header)
    exact = chosen in towers_of
    wanted = [
        tower
        for tower, shape in towers_of.items()
        if shape == (16, 8) and (tower == chosen if exact else tower.startswith(chosen or ""))
    ]
    try:
        lora_to_shira(lora, base, folder / "x.st", density=1.0, prefix=chosen)
    except SourceError:
        certain = len(wanted) == 1 and 31 not in layers and chosen is None and "" not in towers_of
        flat_word = word == "module" and place is between and dialect in ("kohya", "lycoris")
        assert not certain or flat_word
        assert not (folder / "x.st").exists()
        return
    assert 31 not in layers
    if chosen is None and "" in wanted:  # the names themselves
        wanted = [""]
    assert len(wanted) == 1
    check(
        load(folder / "x.st"), state, {wanted[0] + module: pair for module, pair in pairs(modules, 16, 8).items()}
    )
