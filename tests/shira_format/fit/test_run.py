"""Fits from end to end: files that a plain conversion could have written, but for their values and support."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shira_format
from shira_format.convert.fit.distill import Distillation
from shira_format.convert.fit.live import LiveModel
from shira_format.convert.fit.outputs import logits
from shira_format.convert.fit.run import FitOptions, fit_adapter, fit_full, fit_lora
from shira_format.errors import BaseMismatch, SourceError
from shira_format.live import Switcher
from tests import fits, models

OPTIONS = FitOptions(distillation=Distillation(steps=30, learning_rate=0.02))


def test_a_lora(tmp_path: Path) -> None:
    lora, base, live = fits.net_lora(tmp_path)
    before = fits.state(live.model)
    out, plain = tmp_path / "fit.st", tmp_path / "plain.st"
    report = fit_lora(lora, base, out, fits.rows(200), density=0.05, model=live, options=OPTIONS)
    shira_format.lora_to_shira(lora, base, plain, density=0.05)
    assert fits.same_state(live.model, before)
    assert report.kept == "fit" and report.fit.r2 > report.plain.r2 + 0.1
    fitted, cut = shira_format.load(out), shira_format.load(plain)
    assert sum(one.nnz for one in fitted.values()) == report.budget == sum(one.nnz for one in cut.values())
    # Beyond entries the files agree: names, shapes, dtypes, and where they come from.
    assert {n: (t.shape, t.dtype, t.value_kind) for n, t in fitted.items()} == {n: (t.shape, t.dtype, t.value_kind) for n, t in cut.items()}  # fmt: skip
    assert fitted.manifest["source"] == cut.manifest["source"]
    assert fitted.manifest["base_model"] == cut.manifest["base_model"]
    fit = fitted.manifest["fit"]
    assert fit["method"] == "distill" and fit["effect"]["r2"] == pytest.approx(report.fit.r2, rel=1e-5)
    assert fit["inputs"] == {"name": "an array", "fitted": 160, "held": 40}
    assert fitted.manifest["selection"]["rule"] == "fit"
    json.dumps(report.as_dict(), allow_nan=False)
    # It applies to the base, and what is reported is what it does.
    model = models.net()
    want = models.load_lora(models.net(), lora)
    x = fits.rows(64, 9)
    with torch.no_grad():
        zero, source = models.net()(x), want(x)
        Switcher(model).load(out)
        found = model(x)
    r2 = 1 - float((found - source).square().sum() / (zero - source).square().sum())
    assert r2 == pytest.approx(report.fit.r2, abs=0.15)
    assert not list(tmp_path.glob("*.tmp*"))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    lora, base, live = fits.net_lora(tmp_path)
    for name in ("a.st", "b.st"):
        fit_lora(lora, base, tmp_path / name, fits.rows(60), density=0.1, model=live, options=OPTIONS)
    assert (tmp_path / "a.st").read_bytes() == (tmp_path / "b.st").read_bytes()


def test_the_better_one_is_written(tmp_path: Path) -> None:
    lora, base, live = fits.net_lora(tmp_path)

    def bad(task, budget, *, seed=0, on_step=None):  # noqa: ANN001, ANN202
        at = torch.arange(budget)
        return {"square.weight": (at, torch.full((budget,), 9.0))}

    out = tmp_path / "out.st"
    report = fit_lora(lora, base, out, fits.rows(60), density=0.05, model=live, options=FitOptions(method=bad))
    assert report.kept == "plain" and report.written is report.plain
    assert "the plain cut is nearer" in report.notices[-1]
    shira_format.lora_to_shira(lora, base, tmp_path / "plain.st", density=0.05)
    assert shira_format.load(out) == shira_format.load(tmp_path / "plain.st")
    assert shira_format.load(out).manifest["fit"]["kept"] == "plain"


def test_values_of_a_narrow_base_are_measured_as_they_are_stored(tmp_path: Path) -> None:
    lora, _, _ = fits.net_lora(tmp_path)
    base = models.save_base(models.net(), tmp_path / "half", torch.bfloat16)
    live = LiveModel(models.load_base(models.net(), base), outputs=lambda z, _: z)
    out = tmp_path / "out.st"
    report = fit_lora(lora, base, out, fits.rows(100), density=0.1, model=live, options=OPTIONS)
    adapter = shira_format.load(out)
    assert all(one.dtype.name == "bfloat16" for one in adapter.values())
    assert report.fit.r2 > report.plain.r2
    model = models.load_base(models.net(), base).bfloat16()
    Switcher(model).load(adapter)  # its digests are those of the base's own values


def test_a_full_fine_tune(tmp_path: Path) -> None:
    base = models.save_base(models.net(), tmp_path / "base")
    task = fits.net_task()
    tuned = {**task.source, **task.whole}
    (tmp_path / "tuned").mkdir()
    save_file({name: one.contiguous() for name, one in tuned.items()}, tmp_path / "tuned" / "model.safetensors")
    arguments = {"density": 0.05, "model": fits.live_net(), "options": OPTIONS}
    out = tmp_path / "fit.st"
    report = fit_full(tmp_path / "tuned", base, out, fits.rows(100), **arguments)
    adapter = shira_format.load(out)
    assert set(adapter.dense) == {"wide.bias", "square.bias"}
    assert np.array_equal(adapter.dense["wide.bias"].values, task.whole["wide.bias"].numpy())
    assert adapter.dense["wide.bias"].base_digest is not None
    assert report.fit.r2 > report.plain.r2
    Switcher(models.net()).load(out)
    sparse = replace(OPTIONS, whole_vectors=False)
    fit_full(tmp_path / "tuned", base, out, fits.rows(100), **arguments | {"options": sparse})
    assert not shira_format.load(out).dense
    fit_full(tmp_path / "tuned", base, out, fits.rows(100), self_contained=True, **arguments)
    assert shira_format.load(out).dense["wide.bias"].base is not None


def test_an_adapter_of_ours_to_a_lower_density(tmp_path: Path) -> None:
    lora, base, live = fits.net_lora(tmp_path)
    first = tmp_path / "first.st"
    shira_format.lora_to_shira(lora, base, first, density=0.3)
    report = fit_adapter(
        first, base, tmp_path / "second.st", fits.rows(100), density=0.05, model=live, options=OPTIONS
    )
    assert report.fit.r2 > report.plain.r2
    found = shira_format.load(tmp_path / "second.st")
    assert found.manifest["source"]["kind"] == "adapter"
    assert found.manifest["source"]["files"][0]["name"] == "first.st"
    with pytest.raises(ValueError, match="2 strengths for 1 adapters"):
        fit_adapter(first, base, None, fits.rows(9), strengths=[1, 2], model=live)


def test_several_adapters_are_one_source(tmp_path: Path) -> None:
    _, base, live = fits.net_lora(tmp_path)
    paths = []
    for seed in (1, 2):
        peft = models.random_lora(models.net(), seed, scale=0.2, r=2, target_modules=["wide", "square"])
        models.save_lora(peft, tmp_path / f"lora{seed}")
        paths.append(tmp_path / f"{seed}.st")
        shira_format.lora_to_shira(tmp_path / f"lora{seed}", base, paths[-1], density=0.3)
    out = tmp_path / "out.st"
    fit_adapter(paths, base, out, fits.rows(100), strengths=[1, 0.5], density=1.0, model=live, options=OPTIONS)
    # All entries may be kept, so the fit starts at what both adapters do, and is not far from it.
    both, found = models.net(), models.net()
    switcher = Switcher(both)
    switcher.set([(paths[0], 1.0), (paths[1], 0.5)])
    Switcher(found).load(out)
    x = fits.rows(20, 5)
    with torch.no_grad():
        distance = (both(x) - found(x)).square().sum() / (both(x) - models.net()(x)).square().sum()
    assert float(distance) < 0.05
    assert shira_format.load(out).manifest["source"]["strengths"] == [1, 0.5]


def test_each_adapter_teaches_on_its_own_inputs(tmp_path: Path) -> None:
    base = models.save_base(models.net(), tmp_path / "base")
    paths, inputs = [], []
    for seed, name in ((1, "wide"), (2, "square")):
        peft = models.random_lora(models.net(), seed, scale=0.4, r=2, target_modules=[name])
        models.save_lora(peft, tmp_path / name)
        paths.append(tmp_path / f"{name}.st")
        shira_format.lora_to_shira(tmp_path / name, base, paths[-1], density=1.0)
        inputs.append([{"x": one} for one in (fits.rows(96, seed) + 3 * (-1) ** seed).split(8)])
    out = tmp_path / "out.st"
    live = fits.live_net()
    options = replace(OPTIONS, distillation=Distillation(steps=120, learning_rate=0.01))
    report = fit_adapter(paths, base, out, parts=inputs, density=1.0, model=live, options=options)
    assert report.fit.r2 > report.plain.r2 + 0.1
    found = models.net()
    Switcher(found).load(out)
    error = base_error = 0.0
    for path, batches in zip(paths, inputs, strict=True):
        one = models.net()
        Switcher(one).load(path)
        x = torch.cat([batch["x"] for batch in batches])
        with torch.no_grad():
            error += float((one(x) - found(x)).square().sum())
            base_error += float((one(x) - models.net()(x)).square().sum())
    assert 1 - error / base_error > report.plain.r2 + 0.1
    assert 1 - error / base_error == pytest.approx(report.fit.r2, abs=0.15)
    for bad, message in (
        ({"parts": inputs[:1]}, "1 parts for 2 adapters"),
        ({"parts": inputs, "data": fits.rows(9)}, "in place of data"),
        ({"held_parts": inputs}, "go with parts"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_adapter(paths, base, None, model=live, **bad)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="batches of keyword arguments; these are Tensor"):
        fit_adapter(paths, base, None, parts=[fits.rows(9)] * 2, model=live)


def test_another_model_is_refused(tmp_path: Path) -> None:
    lora, base, live = fits.net_lora(tmp_path)
    with torch.no_grad():
        live.model.square.weight[3, 3] += 1
    out = tmp_path / "out.st"
    with pytest.raises(BaseMismatch, match=r"square\.weight.*other values than the base"):
        fit_lora(lora, base, out, fits.rows(40), model=live)
    assert not out.exists()


def test_one_input_is_too_few(tmp_path: Path) -> None:
    lora, base, live = fits.net_lora(tmp_path)
    with pytest.raises(SourceError, match="but one input"):
        fit_lora(lora, base, None, fits.rows(1), model=live)


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    lora, base, live = fits.net_lora(tmp_path)
    before, files = fits.state(live.model), sorted(tmp_path.rglob("*"))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_lora(lora, base, tmp_path / "out.st", fits.rows(40), model=live, options=OPTIONS, on_step=stop)
    assert fits.same_state(live.model, before)
    assert sorted(tmp_path.rglob("*")) == files


def test_an_unknown_method(tmp_path: Path) -> None:
    lora, base, live = fits.net_lora(tmp_path)
    with pytest.raises(ValueError, match="no fit is named 'magic'"):
        fit_lora(lora, base, None, fits.rows(40), model=live, options=FitOptions(method="magic"))


def test_a_head_that_the_lora_brings(tmp_path: Path) -> None:
    model = models.bert()
    folder = tmp_path / "base"
    model.bert.save_pretrained(folder)
    peft = models.random_lora(models.bert(), scale=0.2, r=2, target_modules=["query", "dense"], exclude_modules=r".*pooler.*", modules_to_save=["classifier"])  # fmt: skip
    models.save_lora(peft, tmp_path / "lora")
    live = LiveModel(models.bert(), outputs=logits, is_logits=True)
    with torch.no_grad():
        live.model.classifier.weight.zero_()  # the source brings its own
    out = tmp_path / "out.st"
    report = fit_lora(tmp_path / "lora", folder, out, fits.tokens(20), density=0.1, model=live, options=OPTIONS)
    adapter = shira_format.load(out)
    assert set(adapter.dense) == {"classifier.weight", "classifier.bias"}
    assert report.fit.agreement is not None
    head = load_file(tmp_path / "lora" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert np.array_equal(adapter.dense["classifier.weight"].values, head.numpy())
    assert all(name.startswith("encoder.") for name in adapter)  # the base's names
