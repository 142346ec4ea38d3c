"""A checkpoint of a PEFT model that was never merged is neither a fine-tune nor a base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shira_cli.convert import main
from shira_format._core.arrays import Array
from shira_format.convert import full_to_shira
from shira_format.errors import SourceError
from tests.models import save_arrays

Q, UP = "layers.0.q_proj", "layers.0.up_proj"
PLAIN = {f"{Q}.weight": np.ones((8, 8), np.float32), f"{UP}.weight": np.ones((8, 8), np.float32)}
WRAPPED = {
    f"{Q}.base_layer.weight": np.ones((8, 8), np.float32),
    f"{Q}.lora_A.default.weight": np.ones((2, 8), np.float32),
    f"{Q}.lora_B.default.weight": np.ones((8, 2), np.float32),
    f"{UP}.weight": np.full((8, 8), 2, np.float32),
}


def prefixed(arrays: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {prefix + name: array for name, array in arrays.items()}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("prefix", ["", "base_model.model.", "model."])
def test_full_to_shira_refuses_it(prefix: str, exact: bool, tmp_path: Path) -> None:
    plain = save_arrays(tmp_path / "plain.safetensors", PLAIN)
    wrapped = save_arrays(tmp_path / "wrapped.safetensors", prefixed(WRAPPED, prefix))
    for tuned, base in ((wrapped, plain), (plain, wrapped)):
        with pytest.raises(SourceError, match="not merged") as caught:
            full_to_shira(tuned, base, tmp_path / "out.st", exact=exact)
        for words in (str(wrapped), "base_layer", "merge_and_unload", "lora_to_shira"):
            assert words in str(caught.value)
    assert not (tmp_path / "out.st").exists()


@pytest.mark.parametrize("part", ["modules_to_save.default.weight", "lora_embedding_A.default", "lora_magnitude_vector.default.weight"])  # fmt: skip
def test_one_name_of_the_wrapper_is_enough(part: str, tmp_path: Path) -> None:
    plain = save_arrays(tmp_path / "plain.safetensors", PLAIN)
    wrapped = save_arrays(tmp_path / "w.safetensors", PLAIN | {f"{Q}.{part}": np.ones((8, 8), np.float32)})
    with pytest.raises(SourceError, match="merge_and_unload"):
        full_to_shira(wrapped, plain, None, exact=True)


def test_a_model_that_itself_has_such_layers(tmp_path: Path) -> None:
    base = save_arrays(tmp_path / "base.safetensors", WRAPPED)
    changed = WRAPPED | {f"{Q}.lora_A.default.weight": np.full((2, 8), 3, np.float32)}
    tuned = save_arrays(tmp_path / "tuned.safetensors", changed)
    report = full_to_shira(tuned, base, None, exact=True)
    assert [f"{Q}.lora_A.default.weight"] == report.whole


def test_check_merge_refuses_it_as_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = save_arrays(tmp_path / "plain.safetensors", PLAIN)
    wrapped = save_arrays(tmp_path / "wrapped.safetensors", WRAPPED)
    tuned = save_arrays(tmp_path / "t.safetensors", PLAIN | {f"{UP}.weight": np.full((8, 8), 2, np.float32)})
    full_to_shira(tuned, plain, tmp_path / "a.st", exact=True, exclude=[Q], digests=False)
    arguments = ["check_merge", "--lora", str(tmp_path / "a.st")]
    assert 2 == main([*arguments, "--base", str(wrapped), "--merged", str(plain)])
    assert "merge_and_unload" in capsys.readouterr().err
    assert 1 == main([*arguments, "--base", str(plain), "--merged", str(wrapped)])
    assert "merge_and_unload" in capsys.readouterr().out
