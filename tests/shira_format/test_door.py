"""``import shira_format as shira``: every verb in one line, with tab completion, and nothing heavy until it is used."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import shira_format as shira

PUBLIC = {
    "Adapter", "AdapterPool", "DenseTensor", "Distillation", "FitOptions", "LiveModel", "Publisher", "ServerLayer", "ServerLayout", "SparseTensor", "Subscriber", "Switcher", "__version__", "apply", "attach", "compose", "csr_to_shira",
    "diff", "errors", "fit_adapter", "fit_full", "fit_lora", "full_to_shira", "inspect", "intersect", "invert", "load", "lora_to_shira", "make_mask", "merge", "open_checkpoint",
    "peft_to_shira", "place_adapter", "repack", "resume", "save", "shira_to_csr", "shira_to_full", "shira_to_lora", "shira_to_peft", "sparse_parameters", "subtract", "verify",
}  # fmt: skip
VERBS = sorted(name for name in PUBLIC if name[0].islower() and name != "errors")


def test_public_names_and_no_others() -> None:
    assert PUBLIC == set(dir(shira)) == set(shira.__all__)
    for name in PUBLIC:
        assert getattr(shira, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        shira.nothing  # noqa: B018


@pytest.mark.parametrize("name", VERBS)
def test_arguments_are_named_alike(name: str) -> None:
    """``adapter``, ``base`` and ``out`` mean the same everywhere; options are explicit keywords."""
    parameters = inspect.signature(getattr(shira, name)).parameters
    assert not [one for one in parameters.values() if one.kind is one.VAR_KEYWORD]
    assert not {"path", "file", "output", "checkpoint", "source", "target", "files"} & parameters.keys() or name in {
        "load", "save", "open_checkpoint",
    }  # fmt: skip


def test_names_survive_the_import_of_their_rooms() -> None:
    """A verb is no module: importing all rooms must not hide it."""
    code = (
        "import pkgutil, importlib, shira_format as s\n"
        "for m in pkgutil.walk_packages(s.__path__, 's' + 'hira_format.'):\n"
        "    if 'kernels' not in m.name and 'prefetch' not in m.name: importlib.import_module(m.name)\n"
        "print([n for n in dir(s) if n != 'errors' and type(getattr(s, n)).__name__ == 'module'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]" == done.stdout.strip()


def adapter(path: Path, base: np.ndarray) -> None:
    tensor = shira.SparseTensor("w", base.shape, [1, 4], np.float32([9, 8]), base=base.reshape(-1)[[1, 4]])
    shira.save(shira.Adapter([tensor]), path)


def test_inspect_and_verify(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    base = np.arange(6, dtype=np.float32).reshape(2, 3)
    adapter(tmp_path / "a.st", base)
    save_file({"w": base}, tmp_path / "base.safetensors")
    save_file({"w": base + 1}, tmp_path / "other.safetensors")
    assert 2 == shira.inspect(tmp_path / "a.st")["totals"]["nnz"]
    assert shira.inspect(tmp_path / "a.st", tmp_path / "base.safetensors")["base"]["fits"]
    found = shira.inspect(tmp_path / "a.st", shira.open_checkpoint(tmp_path / "other.safetensors"), verify=True)
    assert (False, True) == (found["base"]["fits"], found["verified"])
    shira.verify(tmp_path / "a.st")
    shira.verify(tmp_path / "a.st", tmp_path / "base.safetensors")
    with pytest.raises(shira.errors.BaseMismatch, match=r"a\.st: tensor 'w': .*other values"):
        shira.verify(tmp_path / "a.st", tmp_path / "other.safetensors")
    data = bytearray((tmp_path / "a.st").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.st").write_bytes(data)
    with pytest.raises(shira.errors.FormatError, match=r"bad\.st"):
        shira.verify(tmp_path / "bad.st")
