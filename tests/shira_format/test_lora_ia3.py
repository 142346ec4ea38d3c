"""(IA)^3 of LyCORIS against its own modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lycoris.modules.ia3 import IA3Module

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.errors import SourceError
from shira_format.lora.scalings import ia3, scaled
from tests import models
from tests.shira_format.test_lora_rotations import LAYERS, parts_of, randomised
from tests.updates import dense


def base_of(folder: Path, weight: Array) -> Checkpoint:
    return open_checkpoint(models.save_arrays(folder / "base.safetensors", {"w": weight}))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("on_input", [False, True])
def test_lycoris_scales_alike(layer: str, on_input: bool, tmp_path: Path) -> None:
    """The delta and the trained model's forward pass; the bias stays."""
    torch.manual_seed(1)
    org = LAYERS[layer]()
    module = IA3Module("m", org, train_on_input=on_input)
    randomised(module, 2)
    parts, weight = parts_of(module), org.weight.detach().numpy()
    found = dense(ia3(parts, "w", weight.shape, base_of(tmp_path, weight), "f"), step=5)
    np.testing.assert_allclose(found, module.get_diff_weight()[0].detach().numpy(), rtol=1e-6, atol=1e-8)
    assert np.abs(found).max() > 0.01
    plain = type(org).forward
    x = torch.randn(2, weight.shape[1], *[7] * (weight.ndim - 2))
    module.apply_to()
    with torch.no_grad():
        live = org(x)
        merged = LAYERS[layer]()
        merged.weight.copy_(org.weight + torch.from_numpy(found))
        merged.bias.copy_(org.bias)
        torch.testing.assert_close(plain(merged, x), live, rtol=1e-4, atol=1e-5)


def test_lycoris_forgets_which_side_it_scales(tmp_path: Path) -> None:
    """It loads every (IA)^3 as one of outputs. We read what was trained; the day that it does too, the docstring changes."""
    torch.manual_seed(1)
    org = torch.nn.Linear(4, 4)
    module = IA3Module("m", org, train_on_input=True)
    randomised(module, 2)
    loaded = IA3Module.make_module_from_state_dict("m", org, module.weight.detach())
    weight = org.weight.detach().numpy()
    found = dense(ia3(parts_of(module), "w", (4, 4), base_of(tmp_path, weight), "f"))
    trained, read = (one.get_diff_weight()[0].detach().numpy() for one in (module, loaded))
    np.testing.assert_allclose(found, trained, rtol=1e-6)
    assert np.abs(read - trained).max() > 0.01


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 6), columns=st.integers(1, 6), kernel=st.integers(1, 3))
def test_scaling_scales_norms(
    seed: int, rows: int, columns: int, kernel: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A law: the norm of each row, or of each input's columns, is multiplied by the absolute value of its number."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns, kernel))
    base = base_of(tmp_path_factory.mktemp("base"), weight)
    for by_input, axes in ((False, (1, 2)), (True, (0, 2))):
        factors = rng.standard_normal(weight.shape[by_input])
        new = weight + dense(scaled(factors - 1, "w", weight.shape, base, "f", by_input=by_input), step=2)
        norms = np.sqrt((weight**2).sum(axes))
        np.testing.assert_allclose(np.sqrt((new**2).sum(axes)), np.abs(factors) * norms, atol=1e-12)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weight": np.ones(8)}, "needs the parts 'weight' and 'on_input'"),
        ({"weight": np.ones(8), "on_input": np.array(0), "alpha": np.ones(1)}, "needs the parts"),
        ({"weight": np.ones(8), "on_input": np.array(2)}, "on_input must be 0 or 1"),
        ({"weight": np.ones(8), "on_input": np.array(1)}, "scales 8 inputs"),
        ({"weight": np.ones(3), "on_input": np.array(0)}, "scales 3 outputs"),
    ],
)
def test_refusals(parts: dict[str, Array], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        ia3(parts, "w", (8, 3), base_of(tmp_path, np.ones((8, 3))), "f")


def test_a_vector_is_not_scaled(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"whose shape is \[8\]"):
        scaled(np.ones(8), "w", (8,), base_of(tmp_path, np.ones(8)), "f", by_input=False)
