"""Adapters on bases that hold their tensors under other names: exports, against transformers' and diffusers' own conversions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from shira_format.convert import full_to_shira
from shira_format.export.full import shira_to_full
from tests.shira_format.test_experts import FULL, JOINED, forms, in_memory, on_disk, tuned, under
from tests.shira_format.test_names_models import CASES, Case, other_spaces

State = dict[str, torch.Tensor]


def state(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def saved(folder: Path, tensors: State) -> Path:
    folder.mkdir()
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def same(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


# Experts


@pytest.mark.parametrize("made_for", ["disk", "memory"])
@pytest.mark.parametrize("name", FULL)
def test_experts_in_the_other_form(name: str, made_for: str, tmp_path: Path) -> None:
    """The base in the other form, patched, has the bits that transformers' own conversion of the patched base has."""
    disk, memory = forms(JOINED[name], tmp_path)
    tune = (on_disk if made_for == "disk" else in_memory)(tuned(JOINED[name]), tmp_path / "tune")
    own, other = (disk, memory) if made_for == "disk" else (memory, disk)
    for number, options in enumerate(({"density": 0.2}, {"density": 0.2, "self_contained": True})):
        full_to_shira(tune, own, tmp_path / "x.st", **options)  # type: ignore[arg-type]
        for alpha in (None, 0.5, 0):
            out = tmp_path / f"{number}-{alpha}"
            shira_to_full(tmp_path / "x.st", own, out / "own" if out.mkdir() is None else out, alpha=alpha)
            report = shira_to_full(tmp_path / "x.st", other, out / "other", alpha=alpha)
            model = JOINED[name]()
            patched = under(model.state_dict(), state(out / "own")) if made_for == "memory" else None
            if patched is not None:
                model.load_state_dict(patched, strict=False)
                wanted = state(on_disk(model, out / "wanted"))
            else:
                loaded = type(model).from_pretrained(_with_config(out / "own", disk), dtype=torch.float32)  # type: ignore[attr-defined]
                wanted = state(in_memory(loaded, out / "wanted"))
            same(state(out / "other"), under(state(out / "other"), wanted))
            if alpha != 0:
                assert any("tensors of other names in the base" in notice for notice in report.notices)
                assert any(not torch.equal(t, state(other)[n]) for n, t in state(out / "other").items())


def _with_config(folder: Path, model: Path) -> Path:
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


# Diffusion

DIFFUSION = [
    "Wan, image to video",
    "FLUX.2",
    "FLUX.3",
    "SD 3.5",
    "Z-Image",
    "Lumina 2",
    "LTX-Video",
    "AuraFlow",
    "Mochi 1",
]


def diffusion(case: Case) -> tuple[State, State]:
    """The weights of a tiny model in diffusers' names, and in those of its authors, as diffusers converts them."""
    torch.manual_seed(2)
    model = getattr(diffusers, case.cls)(**case.options)
    ours = {name: torch.randn_like(tensor).bfloat16() for name, tensor in model.state_dict().items()}
    theirs = {}
    for name, location in other_spaces(case, {name: tuple(tensor.shape) for name, tensor in ours.items()}).items():
        theirs[case.prefix + name] = torch.empty(location.shape, dtype=torch.bfloat16)
        for block in location.blocks:
            at = block.start
            for start, stop in block.rows:
                theirs[case.prefix + name][start:stop] = ours[block.name][at : at + stop - start]
                at += stop - start
    return ours, theirs | {name: tensor.bfloat16() for name, tensor in case.more(ours).items()}


def fine_tune(weights: State) -> State:
    rng = torch.Generator().manual_seed(3)
    return {
        name: tensor + torch.randn(tensor.shape, generator=rng).to(tensor.dtype) / 16
        for name, tensor in weights.items()
    }


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_models_in_the_other_names(name: str, prefix: str, tmp_path: Path) -> None:
    case = CASES[name]
    ours, theirs = diffusion(case)
    convert: Callable[[State], State] = lambda tensors: case.convert(  # noqa: E731
        {n.removeprefix(prefix): t.clone() for n, t in tensors.items()}
    )
    base = saved(tmp_path / "ours", ours)
    single = saved(tmp_path / "theirs", {prefix + n: t for n, t in theirs.items()})
    same(convert(state(single)), ours)
    # Made for diffusers' names, onto the authors' file.
    full_to_shira(saved(tmp_path / "tune", fine_tune(ours)), base, tmp_path / "x.st", density=0.2)
    shira_to_full(tmp_path / "x.st", base, tmp_path / "own")
    shira_to_full(tmp_path / "x.st", single, tmp_path / "other")
    same(convert(state(tmp_path / "other")), state(tmp_path / "own"))
    assert any(not torch.equal(t, ours[n]) for n, t in state(tmp_path / "own").items())
    # Made for the authors', onto diffusers'.
    dropped = {prefix + n for n in case.more(ours)}
    tuned_theirs = {n: t for n, t in fine_tune(state(single)).items() if n not in dropped}
    tune = saved(tmp_path / "tune2", tuned_theirs | {n: t for n, t in state(single).items() if n in dropped})
    full_to_shira(tune, single, tmp_path / "y.st", density=0.2)
    shira_to_full(tmp_path / "y.st", single, tmp_path / "own2")
    shira_to_full(tmp_path / "y.st", base, tmp_path / "other2")
    same(state(tmp_path / "other2"), convert(state(tmp_path / "own2")))
