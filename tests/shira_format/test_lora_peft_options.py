"""Every option of PEFT's LoraConfig is known: read, harmless or refused."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.lora.peft.config import HARMLESS, READ, REFUSED
from tests import models
from tests.merges import Adapted, check_merge


@pytest.fixture
def net(tmp_path: Path) -> Adapted:
    return Adapted(tmp_path, models.net, r=2, target_modules=["wide"])


def refused(net: Adapted, **options: Any) -> str:
    """What the message says after the path of the configuration."""
    models.edit_config(net.lora, **options)
    with pytest.raises(SourceError) as caught:
        net.read()
    start = f"{net.lora / 'adapter_config.json'}: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


def test_a_new_option_of_peft_cannot_slip_through(net: Adapted) -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= READ | HARMLESS | REFUSED.keys()
    written = json.loads((net.lora / "adapter_config.json").read_text())
    assert written.keys() <= READ | HARMLESS | REFUSED.keys()
    assert not READ & HARMLESS
    assert not REFUSED.keys() & (READ | HARMLESS)


def test_all_that_makes_a_variant_is_read_or_refused() -> None:
    """PEFT marks the options that compute the update in another way."""
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert variants - REFUSED.keys() == {"use_dora", "velora_config"}  # VeLoRA: the backward pass


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_options_under_which_the_update_is_another(option: str, net: Adapted) -> None:
    assert refused(net, **{option: {"a": 1}}) == f"{option} is set: {REFUSED[option]}"
    models.edit_config(net.lora, **{option: None})
    assert len(net.read().updates) == 1


def test_all_initialisations_of_peft(net: Adapted) -> None:
    hint = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    known = {value for part in typing.get_args(hint) for value in typing.get_args(part)}
    assert {"gaussian", "eva", "pissa", "loftq"} <= known
    keep = {"gaussian", "eva", "orthogonal", "mica"}
    for start in (known | {"lora_ga"}) - keep:
        assert refused(net, init_lora_weights=start).startswith(
            f"init_lora_weights={start!r} changed the base's weights"
        )
    for start in ("PiSSA", "OLoRA", "pissa_niter_16"):  # PEFT does not mind the case of some
        assert "changed the base's weights in training" in refused(net, init_lora_weights=start)
    for start in (*keep, True, False, None):
        models.edit_config(net.lora, init_lora_weights=start)
        assert len(net.read().updates) == 1
    for other in ("new_method", 3, ["pissa"]):
        assert refused(net, init_lora_weights=other).startswith(f"init_lora_weights={other!r} is not known")


@pytest.mark.parametrize("value", [True, 1, "yes", {"a": None}, [0]])
def test_an_unknown_option_that_is_set(value: Any, net: Adapted) -> None:
    assert refused(net, use_nora=value) == (
        "the option 'use_nora' is set, which is unknown and may change the update; if it does not, remove it from "
        "the file"
    )


@pytest.mark.parametrize("value", [False, None, 0, "", [], {}])
def test_an_unknown_option_that_says_nothing(value: Any, net: Adapted) -> None:
    models.edit_config(net.lora, use_nora=value)
    check_merge(net, changed=1)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("peft_version", float("nan"), "holds a value that an adapter's header cannot: "),
        ("peft_version", float("inf"), "holds a value that an adapter's header cannot: "),
        ("modules_to_save", ["\ud800"], "holds a value that an adapter's header cannot: "),
        ("base_model_name_or_path", "\udfff", "holds a value that an adapter's header cannot: "),
        ("bias", "some", "bias must be 'none', 'all' or 'lora_only', not 'some'"),
        ("target_parameters", "w", "target_parameters must be a list of names"),
        ("target_parameters", [1], "target_parameters must be a list of names"),
    ],
)
def test_values_that_no_adapter_can_hold(option: str, value: Any, reason: str, net: Adapted) -> None:
    assert refused(net, **{option: value}).startswith(reason)


def test_what_is_not_repeated_may_be_anything(net: Adapted, tmp_path: Path) -> None:
    models.edit_config(net.lora, lora_dropout=float("nan"), eva_config={"rho": float("inf")}, task_type="\ud800")
    lora_to_shira(net.lora, net.base, tmp_path / "adapter.st")
    assert load(tmp_path / "adapter.st").manifest["source"]["r"] == 2


def test_the_source_says_what_it_was(tmp_path: Path) -> None:
    options = {"use_dora": True, "rank_pattern": {"wide": 3}, "bias": "all", "target_modules": ["wide"]}
    net = Adapted(tmp_path, models.net, r=2, lora_alpha=4, **options)
    source = net.read().source
    assert source.pop("peft_version")
    assert source == {
        "kind": "lora", "dialect": "peft", "r": 2, "lora_alpha": 4, "use_dora": True, "rank_pattern": {"wide": 3},
        "bias": "all",
    }  # fmt: skip
