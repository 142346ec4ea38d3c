"""Second moments against the layers themselves: what a change adds to a layer's output is what the moments predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

from shira_analysis.measures.interference import interference
from shira_format.calibration.moments import Moment, Moments, collect_moments
from shira_format.errors import FormatError, SourceError
from shira_format.tensors import SparseTensor
from tests.models import minilm


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sparse_change(shape: torch.Size, seed: int) -> SparseTensor:
    generator = np.random.default_rng(seed)
    size = int(np.prod(shape))
    indices = np.sort(generator.choice(size, max(1, size // 3), replace=False))
    return SparseTensor(
        "weight", tuple(shape), indices, generator.standard_normal(indices.size), value_kind="delta"
    )


def outputs(layer: nn.Module, change: SparseTensor, inputs: torch.Tensor, channels: int) -> torch.Tensor:
    """What the layer gives with the change alone as its weight: ``[places, out]``."""
    weight: Any = layer.weight
    kept = weight.data.clone()
    flat = torch.zeros(weight.numel(), dtype=weight.dtype)
    flat[torch.from_numpy(change.indices.copy())] = torch.from_numpy(change.values.copy())
    weight.data = flat.reshape(weight.shape)
    bias: Any = getattr(layer, "bias", None)
    if bias is not None:
        bias.data.zero_()
    with torch.no_grad():
        found = layer(inputs).movedim(channels, -1)
    weight.data = kept
    return found.reshape(-1, found.shape[-1])


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), random(7, 5), -1),
    "linear, tokens": (lambda: nn.Linear(5, 4), random(3, 7, 5), -1),
    "conv1d of gpt2": (lambda: Conv1D(4, 5), random(3, 7, 5), -1),
    "embedding": (lambda: nn.Embedding(6, 4), torch.tensor([[0, 1, 1], [5, 5, 5]]), -1),
    "conv 1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), random(2, 3, 9), 1),
    "conv 2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), dilation=(2, 1)), random(2, 3, 9, 8), 1),
    "conv 2d, one image": (lambda: nn.Conv2d(3, 4, 3), random(3, 9, 8), 0),
    "conv 2d, same": (lambda: nn.Conv2d(2, 4, (4, 3), padding="same"), random(2, 2, 6, 5), 1),
    "conv 2d, reflected": (
        lambda: nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="reflect"),
        random(2, 2, 6, 5),
        1,
    ),
    "conv 2d, wrapped": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), random(2, 2, 6, 5), 1),
    "conv 2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), random(2, 4, 6, 5), 1),
    "conv 2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), random(2, 4, 6, 5), 1),
    "conv 2d, channels last": (
        lambda: nn.Conv2d(3, 4, 2),
        random(2, 3, 5, 4).to(memory_format=torch.channels_last),
        1,
    ),
    "conv 3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, stride=2), random(2, 2, 4, 5, 3), 1),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the one that pads one side more
@pytest.mark.parametrize("kind", LAYERS)
def test_moments_predict_the_outputs(kind: str) -> None:
    make, inputs, channels = LAYERS[kind]
    layer = make().double()
    a, b = (sparse_change(layer.weight.shape, seed) for seed in (1, 2))
    moments = collect_moments(layer, [inputs], inputs=1000)
    y1, y2 = (outputs(layer, change, inputs, channels) for change in (a, b))
    found = interference(a, b, moments["weight"])
    assert moments["weight"].samples == len(y1)
    means = [float((u * v).sum(1).mean()) for u, v in ((y1, y2), (y1, y1), (y2, y2))]
    assert [found.inner, found.first, found.second] == pytest.approx(means, rel=1e-12, abs=1e-13)
    # All inputs were kept, so that what happens at each of them is known; of an embedding they need not be.
    assert moments["weight"].tokens == (moments["weight"].inputs is None) == (kind == "embedding")
    each = [float(((y1 * y2).sum(1) ** 2 / (y * y).sum(1).clamp(min=1e-300)).mean()) for y in (y1, y2)]
    assert [found.projected_first, found.projected_second] == pytest.approx(each, rel=1e-12, abs=1e-13)


def test_inputs_are_kept_at_random_whatever_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(400, dtype=torch.float64).reshape(200, 2)
    layer = nn.Linear(2, 2).double()
    kept = collect_moments(layer, x.split(17), inputs=20)["weight"].inputs
    assert kept is not None
    assert (20, 1, 2) == kept.shape
    numbers = kept[:, 0, 0]
    assert (np.diff(numbers) > 0).all()  # in the order in which they came, none twice
    assert set(numbers) <= set(x[:, 0].tolist())
    assert numbers.min() < 100 < 300 < numbers.max()
    monkeypatch.setattr("shira_format.calibration.layers._ROWS", 3)
    again = collect_moments(layer, [x], inputs=20)["weight"].inputs
    np.testing.assert_array_equal(kept, again)
    other = collect_moments(layer, [x], inputs=20, seed=1)["weight"].inputs
    assert other is not None
    assert set(other[:, 0, 0]) != set(numbers)
    # Every row is as likely as any other.
    counts = np.zeros(30)
    for seed in range(300):
        found = collect_moments(layer, [x[:30]], inputs=10, seed=seed)["weight"].inputs
        assert found is not None
        counts[(found[:, 0, 0] / 2).astype(int)] += 1
    assert 3000 == counts.sum()
    assert 60 < counts.min() < counts.max() < 140  # 100 expected of each, with a deviation of 8


def test_batches_stream_and_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(50, 6)
    layer = nn.Linear(6, 2).double()
    whole = collect_moments(layer, (part for part in x.split(17)))["weight"]
    monkeypatch.setattr("shira_format.calibration.layers._ROWS", 3)
    again = collect_moments(layer, [x])["weight"]
    wanted = (x.T @ x / 50).numpy()
    for found in (whole, again):
        assert (found.samples, found.whole, found.groups) == (50, True, 1)
        np.testing.assert_allclose(found.blocks[0, 0], wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("block", [1, 2, 4, 5, 6, 100])
def test_blocks_are_the_cells_near_the_diagonal(block: int) -> None:
    x = random(20, 6)
    found = collect_moments(nn.Linear(6, 2).double(), [x], block=block)["weight"]
    wanted = (x.T @ x / 20).numpy()
    size = min(block, 6)
    wide = np.zeros((12, 12))
    wide[:6, :6] = wanted
    for number in range(-(-6 // size)):
        start = number * size
        np.testing.assert_allclose(
            found.blocks[0, number], wide[start : start + size, start : start + size], atol=1e-14
        )
    assert found.whole == (block >= 6)


def test_float32_is_near() -> None:
    x = random(40, 6).float()
    layer = nn.Linear(6, 2)
    exact, near = (collect_moments(layer, [x], dtype=dtype)["weight"] for dtype in ("float64", "float32"))
    assert near.blocks.dtype == np.float32
    np.testing.assert_allclose(near.blocks, exact.blocks, atol=1e-6)


class Two(nn.Module):
    """Two layers, dropout, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 3)
        self.drop = nn.Dropout(0.9)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.second(input=self.drop(torch.relu(self.first(scale * x))))


def test_the_model_is_left_as_it_was() -> None:
    model = Two()
    model.second.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = collect_moments(model, [(random(8, 3).float(),), {"x": random(8, 3).float(), "scale": 2.0}])
    assert (list(found), found.unseen) == (["first.weight", "second.weight"], ("idle.weight",))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model.first.training, model.second.training) == (True, True, False)
    hidden = torch.relu(model.first(torch.cat([random(8, 3), 2 * random(8, 3)]).float()))  # without dropout
    wanted = (hidden.T @ hidden / 16).detach().numpy()
    np.testing.assert_allclose(found["second.weight"].blocks[0, 0], wanted, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_go_when_the_model_fails() -> None:
    model = Two()
    with pytest.raises(RuntimeError, match="invalid for input"):
        collect_moments(model, [random(8, 5).float()])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training


def test_masked_tokens_do_not_count_where_they_are_flattened() -> None:
    """As before the router of a mixture of experts."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(3, 2)

        def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            assert attention_mask.shape == hidden.shape[:2]
            return self.router(hidden.reshape(-1, 3))

    hidden, mask = random(2, 4, 3), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    found = collect_moments(Flat().double(), [{"hidden": hidden, "attention_mask": mask}])["router.weight"]
    kept = hidden[mask != 0].numpy()
    assert 4 == found.samples
    np.testing.assert_allclose(found.blocks[0, 0], kept.T @ kept / 4, rtol=1e-12)


def test_masked_tokens_do_not_count() -> None:
    model = AutoModel.from_pretrained(minilm())
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    texts = ["A cat sat on the mat, and would not move.", "Yes."]
    chosen = ["embeddings.word_embeddings", "encoder.layer.2.attention.self.query", "pooler.dense"]
    padded = collect_moments(model, [tokenizer(texts, padding=True, return_tensors="pt")], chosen)
    alone = collect_moments(model, [tokenizer(text, return_tensors="pt") for text in texts], chosen)
    assert list(padded) == [f"{name}.weight" for name in chosen]
    for name in padded:
        assert padded[name].samples == alone[name].samples
        np.testing.assert_allclose(padded[name].blocks, alone[name].blocks, atol=3e-5)
    assert padded["pooler.dense.weight"].samples == 2
    counts = padded["embeddings.word_embeddings.weight"]
    assert counts.blocks.sum() == pytest.approx(1)
    assert counts.blocks[0, tokenizer.pad_token_id].item() == 0


def test_gpt2_and_renamed_weights() -> None:
    model = GPT2Model(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    found = collect_moments(model, [batch], rename=lambda name: f"transformer.{name}")
    mlp = found["transformer.h.0.mlp.c_proj.weight"]
    assert (mlp.inputs_first, mlp.width, mlp.samples) == (True, 32, 3)
    assert found["transformer.wte.weight"].size == 1


def test_a_file_and_back(tmp_path: Path) -> None:
    model = Two()
    found = collect_moments(model, [random(8, 3).float()], block=3)
    found.save(tmp_path / "m.safetensors")
    back = Moments.read(tmp_path / "m.safetensors")
    assert list(back) == list(found)
    for name, one in found.items():
        assert name in back
        np.testing.assert_array_equal(back[name].blocks, one.blocks)
        assert (back[name].width, back[name].samples, back[name].inputs_first) == (one.width, one.samples, False)
    theirs = load_file(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(theirs["first.weight"], found["first.weight"].blocks)


def write(path: Path, blocks: np.ndarray, *, version: int = 1, name: str = "w", **changes: Any) -> Path:
    entry: dict[str, Any] = {"samples": 3, "width": 2, "inputs_first": False} | changes
    told = {"version": version, "weights": {name: entry}}
    save_file({"w": blocks}, path, metadata={"shira_moments": json.dumps(told)})
    return path


GOOD = np.array([[[[2.0, 1.0], [1.0, 2.0]]]])


@pytest.mark.parametrize(
    ("blocks", "changes", "rule"),
    [
        (GOOD, {"version": 3}, "version 3"),
        (GOOD, {"tokens": 1}, "wrong type"),
        (GOOD, {"tokens": True}, "not their frequencies"),
        (np.full((1, 2, 1, 1), 0.4), {"tokens": True}, "not their frequencies"),
        (GOOD, {"inputs": 2}, "inputs in a file of version 1"),
        (GOOD, {"version": 2, "inputs": 2}, "name different weights"),
        (GOOD, {"name": "v"}, "name different weights"),
        (GOOD, {"samples": "3"}, "wrong type"),
        (GOOD, {"inputs_first": 1}, "wrong type"),
        (GOOD, {"samples": 0}, "0 samples"),
        (GOOD, {"width": 3}, "inputs of 3"),
        (GOOD, {"width": 1}, "filled up"),
        (GOOD.astype(np.float16), {}, "float16"),
        (GOOD[0], {}, "not .groups"),
        (GOOD[:, :, :, :1], {}, "not .groups"),
        (GOOD * np.nan, {}, "NaN"),
        (-GOOD, {}, "negative"),
        (np.array([[[[2.0, 1.0], [0.5, 2.0]]]]), {}, "not symmetric"),
        (np.array([[[[2.0, 3.0], [3.0, 2.0]]]]), {}, "above"),
    ],
)
def test_damaged_files(tmp_path: Path, blocks: np.ndarray, changes: dict[str, Any], rule: str) -> None:
    path = write(tmp_path / "m.safetensors", np.ascontiguousarray(blocks), **changes)
    with pytest.raises(SourceError, match=rule) as error:
        Moments.read(path)["w"]
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("inputs", "told", "rule"),
    [
        (np.ones((2, 1, 2)), 3, "not the 3 inputs"),
        (np.ones((2, 1, 2)), "2", "not the '2' inputs"),
        (np.ones((4, 1, 2)), 4, "4 inputs kept of 3"),
        (np.ones((0, 1, 2)), 0, "0 inputs kept of 3"),
        (np.ones((2, 2)), 2, "not .inputs, 1, 2."),
        (np.ones((2, 1, 3)), 2, "not .inputs, 1, 2."),
        (np.ones((2, 2, 2)), 2, "not .inputs, 1, 2."),
        (np.ones((2, 1, 2), np.float16), 2, "inputs of float16"),
        (np.full((2, 1, 2), np.inf), 2, "NaN or infinite"),
    ],
)
def test_damaged_inputs(tmp_path: Path, inputs: np.ndarray, told: Any, rule: str) -> None:
    entry = {"samples": 3, "width": 2, "inputs_first": False, "inputs": told}
    metadata = {"shira_moments": json.dumps({"version": 2, "weights": {"w": entry}})}
    save_file({"w": GOOD, "w#inputs": inputs}, tmp_path / "m.safetensors", metadata=metadata)
    with pytest.raises(SourceError, match=rule) as error:
        Moments.read(tmp_path / "m.safetensors")["w"]
    assert str(tmp_path / "m.safetensors") in str(error.value)


def test_a_file_with_inputs_and_back(tmp_path: Path) -> None:
    found = collect_moments(Two(), [random(8, 3).float()], inputs=4, dtype="float32")
    found.save(tmp_path / "m.safetensors")
    again = Moments.read(tmp_path / "m.safetensors")
    assert list(found) == list(again)
    for name, one in found.items():
        assert one.inputs is not None
        kept = again[name].inputs
        assert kept is not None
        assert kept.dtype == np.float32
        np.testing.assert_array_equal(one.inputs, kept)
        np.testing.assert_array_equal(one.blocks, again[name].blocks)
    embedding = collect_moments(nn.Embedding(6, 4), [torch.tensor([[0, 1, 1], [5, 5, 5]])])
    embedding.save(tmp_path / "tokens.safetensors")
    assert Moments.read(tmp_path / "tokens.safetensors")["weight"].tokens
    theirs = load_file(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(theirs["first.weight#inputs"], found["first.weight"].inputs)


def test_other_files(tmp_path: Path) -> None:
    assert Moments.read(write(tmp_path / "good", GOOD))["w"].samples == 3
    save_file({"w": GOOD}, tmp_path / "plain")
    with pytest.raises(SourceError, match="not a file of moments"):
        Moments.read(tmp_path / "plain")
    (tmp_path / "text").write_text("moments")
    with pytest.raises(FormatError):
        Moments.read(tmp_path / "text")
    save_file({"w": GOOD}, tmp_path / "json", metadata={"shira_moments": "[]"})
    with pytest.raises(FormatError):
        Moments.read(tmp_path / "json")


def test_wide_blocks_are_checked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shira_format.calibration.moments._CELLS", 10)
    x = random(20, 9).numpy()
    square = x.T @ x / 20
    for blocks in (square[None, None], np.stack([square[:3, :3], square[3:6, 3:6], square[6:, 6:]])[None]):
        Moment("w", blocks, 9, 20)
        uneven = blocks.copy()
        uneven[0, -1, -1, 0] *= 0.9
        with pytest.raises(SourceError, match="not symmetric"):
            Moment("w", uneven, 9, 20)


def test_refusals() -> None:
    model = Two()
    x = random(8, 3).float()
    for rule, call in {
        "has no such module": lambda: collect_moments(model, [x], ["third"]),
        "of a Dropout": lambda: collect_moments(model, [x], ["drop"]),
        "'idle': no input": lambda: collect_moments(model, [x], ["idle"]),
        "no batches": lambda: collect_moments(model, []),
        "blocks of 0": lambda: collect_moments(model, [x], block=0),
        "float16": lambda: collect_moments(model, [x], dtype="float16"),  # type: ignore[arg-type]
        "more than": lambda: collect_moments(model, [x], limit=100),
        "more than 0.0 GB": lambda: collect_moments(model, [x], limit=1000, inputs=100),
        "neither may be negative": lambda: collect_moments(model, [x], inputs=-1),
        "'first': an input is NaN": lambda: collect_moments(model, [x * np.nan]),
        "no layer": lambda: collect_moments(nn.ReLU(), [x]),
    }.items():
        with pytest.raises(SourceError, match=rule):
            call()
