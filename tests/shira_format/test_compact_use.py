"""Compact files where adapters are made and used: conversions, merges, masks, live models, full checkpoints, and repacking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import shira_format as shira
from shira_format.errors import BaseMismatch, BaseRequired
from shira_format.format import AdapterFile, load
from tests import models

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAMES = ("layer.0.weight", "layer.1.weight")


def weights(seed: int = 0, move: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {name: rng.normal(0, 0.02, (60, 90)).astype(np.float32) for name in NAMES}
    steps = np.random.default_rng(seed + 50)
    return {name: (one + steps.normal(0, 1, one.shape) * move).astype(BFLOAT16) for name, one in found.items()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base and what a step makes of it."""
    return (
        models.save_arrays(tmp_path / "base.safetensors", weights()),
        models.save_arrays(tmp_path / "tuned.safetensors", weights(move=2e-5)),
    )


def convert(pair: tuple[Path, Path], out: Path, **options: Any) -> Path:
    shira.full_to_shira(pair[1], pair[0], out, exact=True, **options)
    return out


def test_a_conversion_writes_what_repack_writes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plain = convert(pair, tmp_path / "plain.st")
    compact = convert(pair, tmp_path / "compact.st", compact=True)
    report = shira.repack(plain, tmp_path / "repacked.st", base=pair[0], compact=True)
    assert compact.read_bytes() == (tmp_path / "repacked.st").read_bytes()
    assert (True, ("compact",)) == (report.needs_base, report.features)
    assert report.after < 0.6 * report.before
    again = shira.repack(compact, tmp_path / "again.st", base=pair[0])
    assert plain.read_bytes() == (tmp_path / "again.st").read_bytes()
    assert not again.needs_base
    with pytest.raises(BaseRequired):
        shira.repack(compact, tmp_path / "never.st")
    with pytest.raises(BaseMismatch):
        shira.repack(compact, tmp_path / "never.st", base=pair[1])
    assert not (tmp_path / "never.st").exists()


def test_self_contained_and_compact(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plain = convert(pair, tmp_path / "plain.st", self_contained=True)
    compact = convert(pair, tmp_path / "compact.st", self_contained=True, compact=True)
    assert load(plain) == load(compact)
    assert compact.stat().st_size < plain.stat().st_size
    assert not any(map(AdapterFile(compact).needs_base, NAMES))


def test_full_checkpoints_come_back(pair: tuple[Path, Path], tmp_path: Path) -> None:
    compact = convert(pair, tmp_path / "compact.st", compact=True)
    shira.shira_to_full(compact, pair[0], tmp_path / "again")
    found = shira.open_checkpoint(tmp_path / "again")
    for name, one in weights(move=2e-5).items():
        assert one.tobytes() == found[name].tobytes()


def test_another_base_of_a_full_checkpoint_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    compact = convert(pair, tmp_path / "compact.st", compact=True)
    other = models.save_arrays(tmp_path / "other.safetensors", weights(seed=1))
    with pytest.raises(BaseMismatch):
        shira.shira_to_full(compact, other, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_live_model_is_the_base(pair: tuple[Path, Path], tmp_path: Path, prefix: str) -> None:
    compact = convert(pair, tmp_path / "compact.st", compact=True)
    live = {
        prefix + name: torch.from_numpy(one.view(np.int16).copy()).view(torch.bfloat16)
        for name, one in weights().items()
    }
    switcher = shira.Switcher(live)

    def bits() -> list[bytes]:
        return [one.view(torch.int16).numpy().tobytes() for one in live.values()]

    before, after = bits(), [one.tobytes() for one in weights(move=2e-5).values()]
    switcher.switch(compact)
    assert after == bits()
    switcher.switch(compact)  # while it is applied itself: what it is coded on is the base, not the model as it is
    assert after == bits()
    switcher.load(compact, alpha=0.0)
    assert after == bits()
    switcher.revert()
    assert before == bits()


def test_a_live_model_that_is_another_base_is_left_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    compact = convert(pair, tmp_path / "compact.st", compact=True)
    live = {name: one.copy() for name, one in weights(seed=1).items()}
    before = {name: one.tobytes() for name, one in live.items()}
    with pytest.raises(BaseMismatch, match="compact"):
        shira.Switcher(live).switch(compact)
    assert before == {name: one.tobytes() for name, one in live.items()}


def test_merges_of_compact_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plain, compact = convert(pair, tmp_path / "plain.st"), convert(pair, tmp_path / "compact.st", compact=True)
    other = models.save_arrays(tmp_path / "other.safetensors", weights(move=-3e-5))
    second = convert((pair[0], other), tmp_path / "second.st")
    shira.merge([plain, second], tmp_path / "ab.st", base=pair[0])
    shira.merge([compact, second], tmp_path / "ab from compact.st", base=pair[0])
    shira.merge([compact, second], tmp_path / "ab compact.st", base=pair[0], compact=True)
    merged = load(tmp_path / "ab.st")
    assert merged == load(tmp_path / "ab from compact.st")
    assert merged == load(tmp_path / "ab compact.st", base=shira.open_checkpoint(pair[0]))
    with pytest.raises(BaseRequired, match=r"compact\.st"):
        shira.merge([compact, second], tmp_path / "never.st")


def test_algebra_of_compact_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = shira.open_checkpoint(pair[0])
    last = models.save_arrays(tmp_path / "last.safetensors", weights(move=-3e-5))
    first, other = (convert(one, tmp_path / f"{one[1].stem}.st", compact=True) for one in (pair, (pair[0], last)))
    second = convert((pair[1], last), tmp_path / "second.st")
    results: dict[str, Callable[[Path, bool], object]] = {
        "subtract": lambda out, compact: shira.subtract(first, other, out, base=base, compact=compact),
        "compose": lambda out, compact: shira.compose([first, second], out, base=base, compact=compact),
        "intersect": lambda out, compact: shira.intersect([first, other], out, base=base, compact=compact),
    }
    for name, write in results.items():
        plain, compact = tmp_path / f"{name}.st", tmp_path / f"{name} compact.st"
        write(plain, False)
        write(compact, True)
        assert load(plain) == load(compact, base=base)
        assert compact.stat().st_size < plain.stat().st_size
        assert AdapterFile(compact).needs_base(NAMES[0])
    inverse = tmp_path / "inverse.st"
    shira.invert(first, inverse, base=base, compact=True)  # of the adapted weights, which a reader may not have
    shira.shira_to_full(inverse, pair[1], tmp_path / "again")
    found = shira.open_checkpoint(tmp_path / "again")
    assert all(found[name].tobytes() == one.tobytes() for name, one in weights().items())


def test_differences_of_compact_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from shira_cli.diff import main

    plain, compact = convert(pair, tmp_path / "plain.st"), convert(pair, tmp_path / "compact.st", compact=True)
    assert shira.diff(plain, compact, base=pair[0]).same
    assert 0 == main([str(plain), str(compact), "--base", str(pair[0])])
    assert 2 == main([str(plain), str(compact)])
    with pytest.raises(BaseRequired):
        shira.diff(plain, compact)
    with pytest.raises(BaseMismatch):
        shira.diff(plain, compact, base=pair[1])


def test_a_pool_of_compact_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    compact = convert(pair, tmp_path / "compact.st", compact=True)
    live = {name: one.copy() for name, one in weights().items()}
    switcher = shira.Switcher(live, pool=shira.AdapterPool({"step": compact}, base=pair[0]))
    switcher.switch("step")
    assert {name: one.tobytes() for name, one in weights(move=2e-5).items()} == {
        k: v.tobytes() for k, v in live.items()
    }
    with pytest.raises(BaseRequired):
        shira.AdapterPool({"step": compact}).get_adapter("step")
    with pytest.raises(BaseMismatch):
        shira.AdapterPool({"step": compact}, base=pair[1]).get_adapter("step")


def test_matrices_of_compact_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from shira_cli.convert import main

    plain, compact = convert(pair, tmp_path / "plain.st"), convert(pair, tmp_path / "compact.st", compact=True)
    shira.shira_to_csr(plain, tmp_path / "matrices", base=pair[0])
    again = ["csr_to_shira", str(tmp_path / "matrices"), "--base", str(pair[0]), "--compact", "-o"]
    assert 0 == main([*again, str(tmp_path / "again.st")])
    assert compact.stat().st_size == pytest.approx((tmp_path / "again.st").stat().st_size, rel=0.05)
    assert load(plain) == load(tmp_path / "again.st", base=shira.open_checkpoint(pair[0]))


def test_measures_of_compact_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from shira_analysis.measures.deltas import open_deltas

    plain, compact = convert(pair, tmp_path / "plain.st"), convert(pair, tmp_path / "compact.st", compact=True)
    one, other = (list(open_deltas(path, pair[0]).tensors()) for path in (plain, compact))
    assert one == other
    with pytest.raises(BaseRequired):
        list(open_deltas(compact).tensors())


def test_the_base_may_have_other_names(tmp_path: Path) -> None:
    """As for plain files, where one prefix makes all names fit."""
    base = models.save_arrays(tmp_path / "base.safetensors", weights())
    tuned = models.save_arrays(tmp_path / "tuned.safetensors", weights(move=2e-5))
    compact = convert((base, tuned), tmp_path / "compact.st", compact=True)
    plain = convert((base, tuned), tmp_path / "plain.st")
    renamed = models.save_arrays(
        tmp_path / "renamed.safetensors", {f"model.{name}": one for name, one in weights().items()}
    )
    results = []
    for path in (plain, compact):
        try:
            shira.shira_to_full(path, renamed, tmp_path / path.stem)
            results.append(
                {name: one.tobytes() for name, one in shira.open_checkpoint(tmp_path / path.stem).items()}
            )
        except shira.errors.ShiraError as error:
            results.append(type(error).__name__)  # type: ignore[arg-type]
    assert results[0] == results[1]


def test_a_mask_of_the_largest_weights_takes_no_bits(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from shira_cli.mask import main

    out = tmp_path / "mask.st"
    assert 0 == main(
        ["--base", str(pair[0]), "--rule", "wm", "--density", "0.05", "--compact", "-o", str(out), "--quiet"]
    )
    assert {"magnitude"} == {entry.codec for entry in AdapterFile(out).manifest.tensors.values()}
    assert shira.make_mask(pair[0], "wm", density=0.05) == load(out, base=shira.open_checkpoint(pair[0]))


def test_the_command(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from shira_cli.convert import main

    plain, small = convert(pair, tmp_path / "plain.st"), tmp_path / "small.st"
    assert 0 == main(["repack", str(plain), "--base", str(pair[0]), "-o", str(small), "--compact"])
    assert "it is read with its base" in capsys.readouterr().out
    assert 0 == main(["repack", str(small), "--base", str(pair[0]), "-o", str(tmp_path / "again.st")])
    assert plain.read_bytes() == (tmp_path / "again.st").read_bytes()
    assert 0 != main(["repack", str(small), "-o", str(tmp_path / "never.st")])
    assert "pass the base (--base)" in capsys.readouterr().err
    exact = ["full_to_shira", "--tuned", str(pair[1]), "--base", str(pair[0]), "--exact", "--compact", "-o"]
    assert 0 == main([*exact, str(tmp_path / "direct.st")])
    assert small.read_bytes() == (tmp_path / "direct.st").read_bytes()
