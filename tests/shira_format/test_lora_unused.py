"""Weight files in an adapter's folder that a conversion does not use are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shira_cli.convert import main
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from tests.models import save_arrays
from tests.shira_format.test_quantised import X, save, save_lora


def test_they_are_refused_unless_allowed(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {f"{X}.weight": np.eye(16, dtype=np.float32)})
    lora, out = save_lora(tmp_path / "lora"), tmp_path / "out.st"
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "adapter_model.bin"):
        (lora / name).write_bytes(b"")
    lora_to_shira(lora, base, None)
    (lora / "non_lora_trainables.bin").write_bytes(b"")
    save_arrays(lora / "head.safetensors", {"a": np.ones(2, np.float32)})
    with pytest.raises(SourceError, match=r"head.safetensors, non_lora_trainables.bin.*--allow-unused"):
        lora_to_shira(lora, base, out)
    arguments = ["lora_to_shira", str(lora), "--base", str(base), "-o", str(out)]
    assert 1 == main(arguments)
    assert not out.exists()
    assert 0 == main([*arguments, "--allow-unused"])
    lora_to_shira(lora / "adapter_model.safetensors", base, None)  # the file was chosen
