"""OFT and BOFT of kohya's trainer and LyCORIS, and the maps of the base that they are, against LyCORIS' own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from torch import nn

from shira_format._core.arrays import Array
from shira_format.checkpoints import Checkpoint, open_checkpoint
from shira_format.errors import SourceError
from shira_format.lora import from_base
from shira_format.lora.cayley import cayley, cayley_neumann, skew_symmetric
from shira_format.lora.from_base import StoredBlocks, input_map, output_map
from shira_format.lora.glora import glora
from shira_format.lora.rotations import rotation
from shira_format.lora.row_stack import Piece, stack_rows, take_update_rows
from shira_format.names.located import LocatedCheckpoint, check_location
from shira_format.names.row_blocks import Location, RowBlock
from tests import models
from tests.updates import dense

F64 = np.dtype(np.float64)


def base_of(folder: Path, weight: Array) -> Checkpoint:
    return open_checkpoint(models.save_arrays(folder / "base.safetensors", {"w": weight}))


def randomised(module: nn.Module, seed: int, size: float = 0.2) -> None:
    """Random parameters; ``rescale`` near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            start = 1.0 if name == "rescale" else 0.0
            parameter.copy_(start + size * torch.randn(parameter.shape, generator=generator))


def parts_of(module: nn.Module) -> dict[str, Array]:
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


LAYERS = {
    "linear": lambda: nn.Linear(10, 16),
    "conv1d": lambda: nn.Conv1d(3, 16, 3),
    "conv2d": lambda: nn.Conv2d(3, 16, (3, 2)),
    "conv3d": lambda: nn.Conv3d(2, 8, (2, 1, 3)),
    "tall": lambda: nn.Linear(3, 48),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", [DiagOFTModule, ButterflyOFTModule])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("constraint", [0, 0.01])
def test_lycoris_rotates_alike(layer: str, kind: Any, rescaled: bool, constraint: float, tmp_path: Path) -> None:
    """The delta and the trained model's forward pass, to the rounding of float32, in which LyCORIS computes."""
    torch.manual_seed(1)
    org = LAYERS[layer]()
    module = kind("m", org, lora_dim=6, constraint=constraint, rescaled=rescaled)
    randomised(module, 2)
    weight = org.weight.detach().numpy()
    update = rotation(parts_of(module), "w", weight.shape, base_of(tmp_path, weight), "f")
    found = dense(update, step=5)
    wanted = module.get_diff_weight()[0].detach().numpy()
    scale = float(np.abs(wanted).max())
    assert scale > 1e-2 * (constraint or 1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-6 * max(scale, 1))
    plain = type(org).forward
    x = torch.randn(2, weight.shape[1], *[7] * (weight.ndim - 2))
    module.apply_to()
    with torch.no_grad():
        live = org(x)
        merged = LAYERS[layer]()
        merged.weight.copy_(org.weight + torch.from_numpy(found))
        merged.bias.copy_(org.bias)
        torch.testing.assert_close(plain(merged, x), live, rtol=1e-4, atol=1e-5)


def kohya_oft(weight: torch.Tensor, blocks: torch.Tensor, alpha: float) -> torch.Tensor:
    """The weight that ``OFTModule`` of sd-scripts (networks/oft.py) uses, written anew in float64, one block after the other."""
    skew = blocks - blocks.mT
    norm = skew.norm()
    skew = skew * ((norm.clamp(max=alpha * len(weight)) + 1e-8) / (norm + 1e-8))
    eye = torch.eye(blocks.shape[1], dtype=blocks.dtype)
    rows = weight.split(blocks.shape[1])
    return torch.cat([
        torch.tensordot(((eye + q) @ torch.linalg.inv(eye - q)).mT, w, dims=1) for q, w in zip(skew, rows, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("shape", [(12, 5), (12, 3, 3, 2)])
def test_kohya_rotates_alike(alpha: float, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(3)
    weight = torch.randn(shape, dtype=torch.float64)
    blocks = torch.randn(4, 3, 3, dtype=torch.float64)
    parts = {"oft_blocks": blocks.numpy(), "alpha": np.array(alpha)}
    update = rotation(parts, "w", shape, base_of(tmp_path, weight.numpy()), "f", kohya=True)
    wanted = kohya_oft(weight, blocks, alpha) - weight
    np.testing.assert_allclose(dense(update), wanted.numpy(), rtol=1e-9, atol=1e-14)
    assert (np.abs(wanted.numpy()).max() > 1e-6) == (alpha > 0)


def test_an_alpha_of_zero_bounds_nothing_in_lycoris(tmp_path: Path) -> None:
    """In kohya's trainer it leaves nothing; see above."""
    weight = np.random.default_rng(1).standard_normal((8, 3))
    blocks = np.random.default_rng(2).standard_normal((2, 4, 4))
    base = base_of(tmp_path, weight)
    none = dense(rotation({"oft_blocks": blocks}, "w", (8, 3), base, "f"))
    zero = dense(rotation({"oft_blocks": blocks, "alpha": np.array(0)}, "w", (8, 3), base, "f"))
    np.testing.assert_array_equal(none, zero)
    assert np.abs(none).max() > 0.1


REFUSED = {
    "no blocks": ({"rescale": np.ones((8, 1))}, {}, "without oft_blocks"),
    "unknown part": ({"oft_blocks": np.ones((2, 4, 4)), "lora_mid": np.ones(1)}, {}, "OFT has no such part"),
    "old LyCORIS": ({"oft_diag": np.ones((2, 4, 4))}, {}, "full_to_shira"),
    "not square": ({"oft_blocks": np.ones((2, 4, 3))}, {}, r"shape \[2, 4, 3\]"),
    "other size": ({"oft_blocks": np.ones((2, 3, 3))}, {}, "rotates 6 outputs"),
    "alpha": ({"oft_blocks": np.ones((2, 4, 4)), "alpha": np.ones(2)}, {}, "not one number"),
    "rescale": ({"oft_blocks": np.ones((2, 4, 4)), "rescale": np.ones((1, 8))}, {}, "for each of 8 outputs"),
    "odd butterfly": ({"oft_blocks": np.ones((2, 8, 1, 1))}, {}, "even"),
    "many steps": ({"oft_blocks": np.ones((3, 2, 4, 4))}, {}, "BOFT of 3 steps"),
    "kohya's boft": ({"oft_blocks": np.ones((1, 2, 4, 4)), "alpha": np.ones(())}, {"kohya": True}, "no BOFT"),
    "kohya's alpha": ({"oft_blocks": np.ones((2, 4, 4))}, {"kohya": True}, "bounds the rotation"),
    "negative": ({"oft_blocks": np.ones((2, 4, 4)), "alpha": np.array(-1.0)}, {"kohya": True}, "negative"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, tmp_path: Path) -> None:
    parts, options, message = REFUSED[case]
    with pytest.raises(SourceError, match=message) as error:
        rotation(parts, "w", (8, 3), base_of(tmp_path, np.ones((8, 3))), "f: 'm'", **options)  # type: ignore[arg-type]
    assert "f: 'm'" in str(error.value)


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 9), spread=st.floats(1e-6, 30))
def test_cayley_gives_rotations(seed: int, size: int, spread: float) -> None:
    """``R R^T = I`` and ``det R = 1``, in float64; near the identity the series of PEFT agrees."""
    free = np.random.default_rng(seed).standard_normal((3, size, size)) * spread
    skew = free - free.swapaxes(1, 2)
    rotated = cayley(skew) + np.eye(size)
    np.testing.assert_allclose(
        rotated @ rotated.swapaxes(1, 2), np.broadcast_to(np.eye(size), rotated.shape), atol=1e-10
    )
    np.testing.assert_allclose(np.linalg.det(rotated), 1, atol=1e-9)
    small = skew / max(1.0, 100 * float(np.abs(skew).max()) * size)
    np.testing.assert_allclose(cayley_neumann(small, 8), cayley(small), atol=1e-12)


@given(
    seed=st.integers(0, 2**32 - 1), steps=st.integers(0, 4), half=st.integers(1, 3), groups=st.integers(1, 3),
    columns=st.integers(1, 5),
)  # fmt: skip
def test_rotations_keep_norms_of_columns(
    seed: int, steps: int, half: int, groups: int, columns: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A law for any OFT (no steps) and BOFT without ``rescale``: columns of ``W`` keep their norms and angles."""
    rng = np.random.default_rng(seed)
    size = 2 * half
    outputs = (size << max(0, steps - 1)) * groups
    weight = rng.standard_normal((outputs, columns))
    free = rng.standard_normal((*[steps] * (steps > 0), outputs // size, size, size))
    base = base_of(tmp_path_factory.mktemp("base"), weight)
    new = weight + dense(rotation({"oft_blocks": free}, "w", weight.shape, base, "f"), step=3)
    np.testing.assert_allclose(new.T @ new, weight.T @ weight, atol=1e-10)


@pytest.mark.parametrize("limit", [1, 30, 1 << 20])
def test_maps_in_pieces_of_any_size(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_base, "_TILE", limit)
    rng = np.random.default_rng(5)
    weight, blocks = rng.standard_normal((12, 7)), rng.standard_normal((3, 4, 4))
    base = base_of(tmp_path, weight)
    wanted = np.concatenate([block @ part for block, part in zip(blocks, np.split(weight, 3), strict=True)])
    update = output_map("w", weight.shape, base, StoredBlocks(blocks), F64)
    for step in (1, 2, 5, 12):
        np.testing.assert_allclose(dense(update, step), wanted, atol=1e-13)


def test_maps_of_inputs(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    weight, blocks = rng.standard_normal((5, 12)), rng.standard_normal((3, 4, 4))
    wanted = np.concatenate(
        [part @ block for block, part in zip(blocks, np.split(weight, 3, 1), strict=True)], axis=1
    )
    update = input_map("w", weight.shape, base_of(tmp_path, weight), blocks, F64)
    np.testing.assert_allclose(dense(update, 2), wanted, atol=1e-13)


def test_a_base_in_bf16_is_rotated_in_float32(tmp_path: Path) -> None:
    weight = torch.randn(8, 3).bfloat16()
    folder = models.save_base(nn.ParameterDict({"w": weight}), tmp_path / "base", torch.bfloat16)
    parts = {"oft_blocks": np.random.default_rng(1).standard_normal((2, 4, 4)).astype(np.float32)}
    update = rotation(parts, "w", (8, 3), open_checkpoint(folder), "f")
    assert update.dtype == np.float32
    rotated = (cayley(parts["oft_blocks"] - parts["oft_blocks"].swapaxes(1, 2))).swapaxes(1, 2)
    wanted = np.concatenate([r @ w for r, w in zip(rotated, np.split(weight.double().numpy(), 2), strict=True)])
    np.testing.assert_allclose(dense(update), wanted, atol=1e-6)


def test_skew_symmetric_by_rows() -> None:
    np.testing.assert_array_equal(
        skew_symmetric(np.array([[1.0, 2, 3]]), 3), [[[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]]
    )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("alpha", [0, 3])
def test_lycoris_glora(layer: str, alpha: float, tmp_path: Path) -> None:
    torch.manual_seed(4)
    org = LAYERS[layer]()
    module = GLoRAModule("m", org, lora_dim=2, alpha=alpha)
    randomised(module, 5, 0.5)
    weight = org.weight.detach().numpy()
    parts = {key: tensor.detach().numpy() for key, tensor in module.custom_state_dict().items()}
    update = glora(parts, "w", weight.shape, base_of(tmp_path, weight), "f")
    wanted = module.get_diff_weight()[0].detach().numpy()
    np.testing.assert_allclose(dense(update), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a1.weight": None}, "GLoRA without 'a1.weight'"),
        ({"bm.weight": np.ones((2, 2))}, "GLoRA has no such part"),
        ({"a2.weight": np.ones((2, 4))}, "do not fit"),
        ({"b1.weight": np.ones((7, 2))}, r"shape \[7, 3\]"),
        ({"alpha": np.ones(2)}, "not one number"),
    ],
)
def test_glora_that_does_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    parts = {"a1.weight": np.ones((3, 2)), "a2.weight": np.ones((2, 3)), "b1.weight": np.ones((8, 2)), "b2.weight": np.ones((2, 3))}  # fmt: skip
    made = {key: value for key, value in (parts | change).items() if value is not None}
    with pytest.raises(SourceError, match=message):
        glora(made, "w", (8, 3), base_of(tmp_path, np.ones((8, 3))), "f")


def test_a_module_that_the_base_holds_in_parts(tmp_path: Path) -> None:
    """Of three weights, one is rows of a larger one, and another has its halves exchanged."""
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((12, 3, 2)).astype(np.float32)
    large = np.concatenate([np.zeros((2, 3, 2)), weight[4:8]]).astype(np.float32)
    arrays = {"a": weight[:4], "large": large, "c": np.concatenate([weight[10:], weight[8:10]])}
    base = open_checkpoint(models.save_arrays(tmp_path / "parts.safetensors", arrays))
    blocks = [
        RowBlock("c", 0, ((10, 12), (8, 10))), RowBlock("a", 0, ((0, 4),)), RowBlock("large", 2, ((4, 8),)),
    ]  # fmt: skip
    location = Location(weight.shape, tuple(blocks))
    check_location(base, location, "f")
    gathered = LocatedCheckpoint(base, {"w": location})
    np.testing.assert_array_equal(gathered["w"], weight)
    for start, stop in ((0, 72), (5, 61), (30, 31), (23, 25)):
        np.testing.assert_array_equal(gathered.part("w", start, stop), weight.reshape(-1)[start:stop])
    parts = {"oft_blocks": rng.standard_normal((3, 4, 4))}
    wanted = dense(rotation(parts, "w", weight.shape, base_of(tmp_path, weight), "f"))
    update = rotation(parts, "w", weight.shape, gathered, "f")
    for block in blocks:
        found = dense(
            stack_rows(
                block.name,
                base.shape(block.name),
                [Piece(block.start, take_update_rows(update, block.name, block.rows), "w")],
                "f",
            ),
            3,
        )
        np.testing.assert_allclose(found[block.start : block.start + block.height], block.take(wanted), rtol=1e-12)
        assert not found[: block.start].any()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([RowBlock("a", 0, ((0, 4),)), RowBlock("b", 0, ((4, 8),))], "differ in columns or dtype"),
        ([RowBlock("a", 0, ((0, 4),)), RowBlock("c", 0, ((5, 9),))], "all rows of the module once"),
        ([RowBlock("a", 0, ((0, 4),)), RowBlock("c", 0, ((3, 7),))], "all rows of the module once"),
    ],
)
def test_rows_that_are_no_module(blocks: list[RowBlock], message: str, tmp_path: Path) -> None:
    arrays = {"a": np.ones((4, 3)), "b": np.ones((4, 2)), "c": np.ones((4, 3))}
    base = open_checkpoint(models.save_arrays(tmp_path / "parts.safetensors", arrays))
    with pytest.raises(SourceError, match=message):
        check_location(base, Location((8, 3), tuple(blocks)), "f: 'm'")
