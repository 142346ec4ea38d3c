"""Steps, shipped: what is published, what a server does with it, and what is refused."""

from __future__ import annotations

import hashlib
import json
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel
from upath import UPath

import shira_format as shira
from shira_format.errors import BaseMismatch, ShiraError, SourceError
from shira_format.live.weights import ArrayWeight
from shira_format.storage.places import Folder, open_place
from shira_format.sync import Publisher, Subscriber, Update, restore
from tests.sync import Crash, Fragile, Weights, bits, copied, like, some_weights


def step(weights: Weights, number: int) -> None:
    """Change a little of some weights."""
    for name in ("embed.weight", "layer.weight", "layer.weight_scale_inv", "norm.weight"):
        flat = weights[name].reshape(-1)
        flat[number % flat.size] += flat.dtype.type(1 + number)
    weights["norm.num_batches_tracked"][...] = number


def run(where: Any, versions: int, **options: Any) -> tuple[Publisher, Weights, list[dict[str, bytes]]]:
    """A publisher with some versions, the weights, and the bits of each version."""
    weights = some_weights()
    publisher = Publisher(weights, where, **options)
    states = [bits(weights)]
    for number in range(1, versions):
        step(weights, number)
        publisher.publish()
        states.append(bits(weights))
    return publisher, weights, states


def held(state: dict[str, bytes], weights: Weights) -> Weights:
    """Weights of their own with the bits of a version."""
    return {name: np.frombuffer(state[name], one.dtype).reshape(one.shape).copy() for name, one in weights.items()}


def files(where: Path, pattern: str) -> list[Path]:
    return sorted(where.glob(pattern))


# What is at the place


def test_what_a_place_holds(tmp_path: Path) -> None:
    """Read with nothing but the guide's words: JSON, digests, and the files by the commands that everybody has."""
    _, _, states = run(tmp_path, 4, snapshot_every=2)
    lines = [json.loads(path.read_bytes()) for path in files(tmp_path, "index/*.json")]
    assert [0, 1, 2, 3] == [line["version"] for line in lines]
    assert ["0000000000.json", "0000000003.json"] == [files(tmp_path, "index/*")[at].name for at in (0, -1)]
    assert [False, True, True, True] == ["patch" in line for line in lines]
    assert [True, False, True, False] == ["snapshot" in line for line in lines]
    structure = json.loads((tmp_path / "structure.json").read_bytes())
    for before, line in zip(lines, lines[1:], strict=False):
        assert (before["version"], before["state"]) == (line["base_version"], line["base_state"])
        assert "plain" == line["patch"]["encoding"]
    for line, state in zip(lines, states, strict=True):
        rows = sorted([t["name"], t["dtype"], t["shape"], hashlib.sha256(state[t["name"]]).hexdigest()] for t in structure["tensors"])  # fmt: skip
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        assert line["state"] == hashlib.sha256(text.encode()).hexdigest()
        for kind in ("patch", "snapshot"):
            if kind in line:
                data = (tmp_path / line[kind]["file"]).read_bytes()
                assert (len(data), hashlib.sha256(data).hexdigest()) == (line[kind]["bytes"], line[kind]["sha256"])
    base = tmp_path / lines[2]["snapshot"]["file"]
    shira.shira_to_full(tmp_path / lines[3]["patch"]["file"], base, tmp_path / "full")
    assert states[3] == bits(shira.open_checkpoint(tmp_path / "full"))


def test_a_step_without_changes_is_a_version(tmp_path: Path) -> None:
    publisher, weights, _ = run(tmp_path, 1)
    assert (1, 0, 0) == ((done := publisher.publish()).version, done.entries, done.whole)
    model = copied(weights)
    server = Subscriber(model, tmp_path)
    assert Update(1, None) == server.update()
    assert not server.update().changed


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_server_follows_and_goes_back(where: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").store.clear()
    place: Any = tmp_path / "run" if where == "folder" else "memory://run"
    weights = some_weights()
    model = copied(weights)
    server = Subscriber(model, place, history=2)
    assert Update(None, None) == server.update()
    publisher = Publisher(weights, place)
    assert Update(0, None) == server.update()
    states = [bits(weights)]
    for number in range(1, 5):
        step(weights, number)
        published = publisher.publish()
        states.append(bits(weights))
        found = server.update()
        assert (number, number - 1, 1, 4, 1) == (
            found.version,
            found.before,
            found.patches,
            found.entries,
            found.whole,
        )
        assert published.nbytes == found.nbytes
        assert states[number] == bits(model)
    for number in (3, 2):
        assert Update(number, number + 1, undone=1) == server.back()
        assert states[number] == bits(model)
    with pytest.raises(BaseMismatch, match="no earlier update is held"):
        server.back()
    assert (1, None, 1) == ((found := server.update(1)).version, found.before and None, found.patches)
    assert 0 == found.snapshot  # no undo leads there
    assert states[1] == bits(model)
    found = server.update()
    assert (4, 1, 3) == (found.version, found.before, found.patches)  # three in one
    assert states[4] == bits(model)
    server.verify()
    assert not files(tmp_path, "run/**/.*")


def test_an_update_may_start_with_an_undo(tmp_path: Path) -> None:
    publisher, weights, states = run(tmp_path, 2)
    model = like(weights)
    server = Subscriber(model, tmp_path, history=3)
    server.update()
    for number in (2, 3):
        step(weights, number)
        publisher.publish()
        states.append(bits(weights))
    server.update()
    found = server.update(2)
    assert (2, 3, 1, 1) == (found.version, found.before, found.undone, found.patches)
    assert states[2] == bits(model)
    server.update(3)
    first = files(tmp_path, "patches/0000000002*")[0]
    first.write_bytes(first.read_bytes()[:-1])
    before = bits(model)
    server.update(1)
    assert states[1] == bits(model)
    with pytest.raises(SourceError, match="written in part"):
        server.update(3)
    assert states[1] == bits(model) != before


def test_what_fails_after_an_undo_is_done_again(tmp_path: Path) -> None:
    publisher, weights, states = run(tmp_path, 4)
    model = held(states[1], weights)
    server = Subscriber(model, tmp_path)
    server.update()
    (patch,) = files(tmp_path, "patches/0000000002*")
    patch.unlink()
    for snapshot in files(tmp_path, "snapshots/*"):
        snapshot.unlink()
    with pytest.raises(SourceError, match=r"0000000002-.*: is missing"):
        server.update(2)
    assert (3, states[3]) == (server.version, bits(model))
    server.back()
    assert (1, states[1]) == (server.version, bits(model))
    del publisher


def test_late_servers_take_the_way_of_fewest_bytes(tmp_path: Path) -> None:
    publisher, weights, states = run(tmp_path, 12)
    together = publisher.compose(1)
    assert (11, 1) == (together.version, together.base_version)
    with pytest.raises(SourceError, match="is there already"):
        publisher.compose(1)
    with pytest.raises(SourceError, match="no steps to compose"):
        publisher.compose(10)
    model = like(weights)
    server = Subscriber(model, tmp_path, version=None)
    server.update(1)
    found = server.update()
    assert (11, 1, together.nbytes) == (found.version, found.patches, found.nbytes)
    assert states[11] == bits(model)
    found = server.update(10)  # by way of what is held
    assert (10, 1, 9) == (found.version, found.undone, found.patches)
    assert states[10] == bits(model)


def test_a_version_that_is_known_is_not_compared(tmp_path: Path) -> None:
    _, weights, states = run(tmp_path, 3)
    model = held(states[1], weights)
    server = Subscriber(model, tmp_path, version=1)
    model["embed.weight"][-1, -1] += 1  # which the patch does not touch
    assert (2, 1) == ((found := server.update()).version, found.patches)
    with pytest.raises(BaseMismatch, match="differs from version 2"):
        server.verify()
    other = Subscriber(model, tmp_path, version=7)
    with pytest.raises(SourceError, match="has no version 7; versions: 0 to 2"):
        other.update()


def test_memory_is_that_of_the_patch(tmp_path: Path) -> None:
    weights = {
        f"layer.{n}.weight": np.random.default_rng(n).standard_normal((1024, 1024)).astype(np.float32)
        for n in range(6)
    }
    model = copied(weights)
    publisher, server = Publisher(weights, tmp_path), Subscriber(model, tmp_path, threads=1)
    server.update()
    for array in weights.values():
        array[::100, ::10] += 1
    published = publisher.publish()
    tracemalloc.start()
    server.update()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bits(weights) == bits(model)
    assert published.entries == 6 * 11 * 103
    assert peak < 40 * published.entries + (1 << 20) < sum(array.nbytes for array in weights.values()) / 10


# Models


class Tied(nn.Module):
    """An embedding and a head that share one weight, a buffer that is saved, and one that is not."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 12, bias=False)
        self.register_buffer("positions", torch.arange(12.0), persistent=False)
        if tied:
            self.head.weight = self.embed.weight


def tensor_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()}  # fmt: skip


def train(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    out = model.head(model.norm(model.embed(torch.arange(12))))
    out.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_and_buffers(tied: bool, tmp_path: Path) -> None:
    """Tied weights are published once, and reach each of their names; buffers that are not saved are not published."""
    torch.manual_seed(0)
    trained, served = Tied(), Tied(tied=tied)
    publisher, server = Publisher(trained, tmp_path, snapshot_every=2), Subscriber(served, tmp_path)
    assert 0 == server.update().snapshot
    for _ in range(3):
        train(trained)
        publisher.publish()
        server.update()
        assert tensor_bits(trained) == tensor_bits(served)
    structure = json.loads((tmp_path / "structure.json").read_bytes())
    assert {"head.weight": "embed.weight"} == structure["tied"]
    assert {"embed.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} == {
        tensor["name"] for tensor in structure["tensors"]
    }  # fmt: skip
    assert torch.equal(torch.arange(12.0), served.positions)
    server.back()
    server.verify()
    if not tied:
        with torch.no_grad():
            served.head.weight[0, 0] += 1
        with pytest.raises(BaseMismatch, match="differs from version"):
            server.verify()


def test_a_server_may_have_but_the_second_name(tmp_path: Path) -> None:
    trained = Tied()
    publisher = Publisher(trained, tmp_path)
    weights = {name: tensor.clone() for name, tensor in trained.state_dict().items() if name != "embed.weight"}
    server = Subscriber(weights, tmp_path)
    server.update()
    train(trained)
    publisher.publish()
    assert 1 == server.update().patches
    assert torch.equal(trained.embed.weight, weights["head.weight"])


def test_weights_that_are_published_apart_and_tied_in_the_model(tmp_path: Path) -> None:
    """They are followed as long as they are equal."""
    weights = {
        "a.weight": np.zeros((4, 4), np.float32),
        "b.weight": np.zeros((4, 4), np.float32),
        "c": np.ones(3, np.float32),
    }
    one = np.ones((4, 4), np.float32)
    model = {"a.weight": one, "b.weight": one, "c": np.zeros(3, np.float32)}
    publisher, server = Publisher(weights, tmp_path), Subscriber(model, tmp_path)
    assert 0 == server.update().snapshot
    for name in ("a.weight", "b.weight"):
        weights[name][1, 2] = 7
    publisher.publish()
    server.update()
    assert bits(weights) == bits(model)
    weights["a.weight"][0, 0], before = 3, bits(model)
    publisher.publish()
    with pytest.raises(
        BaseMismatch, match=r"'a\.weight' and 'b\.weight' are one in the model.*do not change alike"
    ):
        server.update()
    assert (1, before) == (server.version, bits(model))
    other = Subscriber(model, tmp_path)
    model["c"][0] = 9  # of no version
    with pytest.raises(BaseMismatch, match="are one in the model"):
        other.update()
    assert before != bits(model)  # but for what was just written, nothing was
    model["c"][0] = 1
    assert before == bits(model)


def test_a_tie_that_ends_is_another_structure(tmp_path: Path) -> None:
    Publisher(Tied(), tmp_path)
    with pytest.raises(
        BaseMismatch, match=r"'head\.weight' is published as nothing, the model has F32\[12, 6\]: publish it"
    ):
        Publisher(Tied(tied=False), tmp_path)


def test_codes_and_their_scales_change_together(tmp_path: Path) -> None:
    """Between two requests, whatever other threads do: codes of float8 are of the same version as their scales."""
    random = np.random.default_rng(0)
    weights = {
        f"{n}.weight": random.standard_normal((256, 256)).astype(ml_dtypes.float8_e4m3fn) for n in range(8)
    } | {f"{n}.weight_scale_inv": np.ones((2, 2), np.float32) for n in range(8)}
    model = copied(weights)
    publisher, server = Publisher(weights, tmp_path), Subscriber(model, tmp_path)
    server.update()
    seen: list[int] = []
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            with server.serving() as version:
                found = {float(model[f"{n}.weight"][n, n]) for n in range(8)} | {
                    float(model[f"{n}.weight_scale_inv"][0, 0]) for n in range(8)
                }
            if version:
                assert {float(version)} == found
                seen.append(version)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for number in range(1, 9):
            for n in range(8):
                weights[f"{n}.weight"][n, n] = number
                weights[f"{n}.weight_scale_inv"][0, 0] = number
            publisher.publish()
            server.update()
            while number not in seen and thread.is_alive():
                pass
    finally:
        done.set()
        thread.join()
    assert set(range(1, 9)) == set(seen)
    assert bits(weights) == bits(model)


def test_names_with_a_prefix_and_a_head_that_is_not_published(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16)  # fmt: skip
    torch.manual_seed(0)
    trained = BertModel(config, add_pooling_layer=False).to(torch.bfloat16)
    served = BertForSequenceClassification(config).to(torch.bfloat16)
    head = served.classifier.weight.detach().clone()
    publisher = Publisher(trained, tmp_path)
    for options in ({}, {"prefix": "bert."}, {"rename": lambda name: f"bert.{name}"}):
        server = Subscriber(served, tmp_path, **options)
        server.update()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.view(-1)[::7] += 0.1
        publisher.publish()
        assert 1 == server.update().patches
        got = {
            name.removeprefix("bert."): found
            for name, found in tensor_bits(served).items()
            if name.startswith("bert.")
        }
        assert {name: got[name] for name in tensor_bits(trained)} == tensor_bits(trained)
    assert torch.equal(head, served.classifier.weight)


def test_weights_that_lie_otherwise_in_memory(tmp_path: Path) -> None:
    """Transposed arrays and channels-last tensors are published and followed by what they are, not by how they lie."""
    random = np.random.default_rng(0)
    weights = {"a": np.asfortranarray(random.standard_normal((40, 30)).astype(ml_dtypes.bfloat16)), "b": random.standard_normal((9, 8)).astype(np.float32)[::2, ::-1]}  # fmt: skip
    plain = {name: np.ascontiguousarray(np.zeros_like(array)) for name, array in weights.items()}
    publisher, server = Publisher(weights, tmp_path / "a"), Subscriber(plain, tmp_path / "a")
    server.update()
    weights["a"][3, 4], weights["b"][2, 1] = 9, 8
    publisher.publish()
    server.update()
    assert bits(weights) == bits(plain)
    with_layout = {"w": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)}
    model = {"w": torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last)}
    publisher, server = Publisher(with_layout, tmp_path / "b"), Subscriber(model, tmp_path / "b")
    server.update()
    with_layout["w"][1, 2, 3, 4] = 5
    publisher.publish()
    server.update()
    assert torch.equal(with_layout["w"], model["w"])


def test_checkpoints_are_published(tmp_path: Path) -> None:
    weights = {name: array for name, array in some_weights().items() if "weight" not in name}
    paths = []
    for number in range(3):
        weights["norm.running_mean"][number] = number
        save_file(weights, path := tmp_path / f"step-{number}.safetensors")
        paths.append(path)
    publisher = Publisher(paths[0], tmp_path / "run")
    for path in paths[1:]:
        publisher.publish(path)
    assert 2 == restore(tmp_path / "run", tmp_path / "out")
    assert bits(load_file(paths[2])) == bits(load_file(tmp_path / "out" / "model.safetensors"))
    assert 1 == restore(tmp_path / "run", tmp_path / "out", version=1, force=True)
    assert bits(load_file(paths[1])) == bits(load_file(tmp_path / "out" / "model.safetensors"))
    with pytest.raises(SourceError, match="exists; --force"):
        restore(tmp_path / "run", tmp_path / "out")
    with pytest.raises(SourceError, match="has no version 9"):
        restore(tmp_path / "run", tmp_path / "other", version=9)
    with pytest.raises(SourceError, match="nothing is published there"):
        restore(tmp_path / "nowhere", tmp_path / "other")
    assert not (tmp_path / "other").exists()


# What fails


def test_what_is_not_the_version_is_refused(tmp_path: Path) -> None:
    """Somebody else wrote to the model: at entries of the patch it is found before anything is written, elsewhere on request."""
    publisher, weights, _ = run(tmp_path, 1)
    model = copied(weights)
    server, careful = Subscriber(model, tmp_path), Subscriber(model, tmp_path, verify="all")
    server.update()
    careful.update()
    step(weights, 1)
    publisher.publish()
    model["norm.weight"][1] += 1
    before = bits(model)
    for one in (server, careful):
        with pytest.raises(BaseMismatch, match=r"'norm\.weight'.*other values"):
            one.update()
    model["norm.weight"][1] -= 1
    model["mask"][0, 0] ^= True
    before = bits(model)
    with pytest.raises(BaseMismatch, match="differs from version 1"):
        careful.update()
    assert (0, before) == (careful.version, bits(model))
    assert 1 == server.update().version
    model["embed.weight"].reshape(-1)[1] += 1
    before = bits(model)
    with pytest.raises(BaseMismatch, match=r"'embed\.weight': changed after version 1"):
        server.back()
    assert (1, before) == (server.version, bits(model))


def test_a_snapshot_that_was_written_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, weights, states = run(tmp_path, 1)
    model = like(weights)
    server = Subscriber(model, tmp_path)
    fill = ArrayWeight.fill

    def failing(weight: ArrayWeight, values: Any) -> None:
        if weight.dtype == np.float64:
            raise MemoryError
        fill(weight, values)

    monkeypatch.setattr(ArrayWeight, "fill", failing)
    with pytest.raises(MemoryError):
        server.update()
    monkeypatch.undo()
    assert server.version is None
    with pytest.raises(BaseMismatch, match="written in part only"), server.serving():
        pass
    assert 0 == server.update().snapshot
    with server.serving() as version:
        assert (0, states[0]) == (version, bits(model))


def test_a_missing_version(tmp_path: Path) -> None:
    _, weights, states = run(tmp_path, 7, snapshot_every=5)
    model = held(states[1], weights)
    server = Subscriber(model, tmp_path)
    (tmp_path / "index" / "0000000003.json").unlink()
    assert 5 == server.update().snapshot  # the snapshot after the gap
    assert states[6] == bits(model)
    with pytest.raises(
        SourceError, match="nothing leads from version 6 to version 4: version 3 is missing, and no snapshot"
    ):
        server.update(4)
    with pytest.raises(SourceError, match="has no version 3; versions: 0 to 6"):
        server.update(3)
    assert (6, states[6]) == (server.version, bits(model))


LINES = {
    "not JSON": (lambda raw: "{", "the JSON object is not closed"),
    "of a later version": (lambda raw: json.dumps(raw | {"shira_sync": 2}), "this reader knows 1"),
    "of another version": (lambda raw: json.dumps(raw | {"version": 2, "base_version": 1}), "is the line of"),
    "without a digest": (lambda raw: json.dumps({k: v for k, v in raw.items() if k != "state"}), "is no line"),
    "of nothing": (lambda raw: json.dumps({k: v for k, v in raw.items() if k != "patch"}), "is no line"),
    "of a later base": (lambda raw: json.dumps(raw | {"base_version": 5}), "is no line"),
    "with a number that is none": (lambda raw: json.dumps(raw | {"version": True}), "is no line"),
    "that leads elsewhere": (lambda raw: json.dumps(raw | {"patch": raw["patch"] | {"file": "patches/../../0000000001.st"}}), "is no line"),
    "that leads to a folder": (lambda raw: json.dumps(raw | {"patch": raw["patch"] | {"file": "/etc/passwd"}}), "is no line"),
    "that contradicts another": (lambda raw: json.dumps(raw | {"base_state": "0" * 64}), "is another one than in"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LINES)
def test_a_line_that_is_damaged(kind: str, tmp_path: Path) -> None:
    _, weights, states = run(tmp_path, 2)
    model = held(states[0], weights)
    path = tmp_path / "index" / "0000000001.json"
    change, message = LINES[kind]
    path.write_text(change(json.loads(path.read_text())) + "\n")
    with pytest.raises(SourceError, match=message) as caught:
        Subscriber(model, tmp_path).update()
    assert "index/0000000001.json" in str(caught.value)
    assert states[0] == bits(model)
    with pytest.raises(SourceError, match=message):
        Publisher(weights, tmp_path)


def test_a_line_that_is_written_in_part(tmp_path: Path) -> None:
    """The newest is no version yet, and the next publisher writes it; an older one is damage."""
    _, weights, states = run(tmp_path, 3)
    server = Subscriber(model := like(weights), tmp_path)
    path = tmp_path / "index" / "0000000002.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert 1 == server.update().version
    assert states[1] == bits(model)
    publisher = Publisher(weights, tmp_path)
    assert 1 == publisher.version
    assert 2 == publisher.publish().version
    assert (2, states[2]) == (server.update().version, bits(model))
    path = tmp_path / "index" / "0000000001.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"0000000001\.json: "):
        Subscriber(like(weights), tmp_path).update()


def test_a_patch_that_is_none(tmp_path: Path) -> None:
    """A file of the right digest that is no patch of published tensors."""
    _, weights, states = run(tmp_path, 2)
    path = tmp_path / "index" / "0000000001.json"
    raw = json.loads(path.read_text())
    norm = np.frombuffer(states[0]["norm.weight"], np.float32)
    at, new = np.arange(2), np.float32([1, 2])
    adapters = {
        "is not published": shira.Adapter([shira.SparseTensor("other", (8,), at, new, base=norm[:2])]),
        "in this dtype and shape": shira.Adapter([shira.SparseTensor("norm.weight", (2, 4), at, new, base=norm[:2])]),
        "has deltas": shira.Adapter([shira.SparseTensor("norm.weight", (8,), at, new, value_kind="delta")]),
        "has strength 0.5": shira.Adapter([shira.SparseTensor("norm.weight", (8,), at, new, base=norm[:2])], manifest={"alpha": 0.5}),
        "what was there before": shira.Adapter(dense=[shira.DenseTensor("norm.weight", norm + 1)]),
        "other values": shira.Adapter([shira.SparseTensor("norm.weight", (8,), at, new, base=norm[2:4])]),
    }  # fmt: skip
    for message, adapter in adapters.items():
        file = tmp_path / raw["patch"]["file"]
        shira.save(adapter, file)
        data = file.read_bytes()
        found = raw["patch"] | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path.write_text(json.dumps(raw | {"patch": found}) + "\n")
        model = held(states[0], weights)
        with pytest.raises(BaseMismatch, match=message):
            Subscriber(model, tmp_path).update()
        assert states[0] == bits(model)


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    _, weights, _ = run(tmp_path, 2)
    cases = {
        r"published as F32\[8\], the model has F16\[8\]": weights | {"norm.weight": np.zeros(8, np.float16)},
        r"published as F32\[8\], the model has F32\[9\]": weights | {"norm.weight": np.zeros(9, np.float32)},
        r"names like .*prefix=": {name: array for name, array in weights.items() if name != "norm.weight"},
    }
    for message, model in cases.items():
        own = copied(model)
        before = bits(own)
        with pytest.raises(BaseMismatch, match=message):
            Subscriber(own, tmp_path).update()
        assert before == bits(own)
        with pytest.raises(BaseMismatch, match=r"publish it to another place"):
            Publisher(model, tmp_path)
    with pytest.raises(BaseMismatch, match="is a list"):
        Publisher({"w": [1.0]}, tmp_path / "other")
    with pytest.raises(BaseMismatch, match="no tensors to publish"):
        Publisher({}, tmp_path / "other")
    with pytest.raises(TypeError, match="is not a model"):
        Publisher([1], tmp_path / "other")
    for bad in ({"encoding": "smoke signals"}, {"snapshot_every": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Publisher(weights, tmp_path, **bad)
    with pytest.raises(TypeError, match="prefix or rename"):
        Subscriber(weights, tmp_path, prefix="a", rename=str)
    with pytest.raises(ValueError, match="history"):
        Subscriber(weights, tmp_path, history=-1)


def test_adapters_go_off_before_an_update(tmp_path: Path) -> None:
    publisher, weights, states = run(tmp_path, 1)
    model = copied(weights)
    server = Subscriber(model, tmp_path)
    server.update()
    step(weights, 1)
    publisher.publish()
    switcher = shira.Switcher(model)
    at = np.array([1])
    switcher.load(
        shira.Adapter(
            [shira.SparseTensor("norm.weight", (8,), at, np.float32([5]), base=model["norm.weight"][at])]
        )
    )
    with pytest.raises(BaseMismatch, match="other values"):
        server.update()
    switcher.revert()
    assert states[0] == bits(model)
    server.update()
    assert bits(weights) == bits(model)


# Publishers


def test_a_restarted_publisher_goes_on(tmp_path: Path) -> None:
    """From the newest version, which it verifies, whatever its model holds; its copy may be in a file."""
    _, weights, states = run(tmp_path / "run", 3, copy=tmp_path / "copy.safetensors")
    assert states[2] == bits(shira.open_checkpoint(tmp_path / "copy.safetensors"))
    raw = bytearray((tmp_path / "copy.safetensors").read_bytes())
    raw[-3] ^= 1
    (tmp_path / "copy.safetensors").write_bytes(raw)
    other = some_weights(7)
    publisher = Publisher(other, tmp_path / "run", copy=tmp_path / "copy.safetensors")
    assert 2 == publisher.version
    assert states[2] == bits(shira.open_checkpoint(tmp_path / "copy.safetensors"))
    assert 3 == publisher.publish().version
    model = like(weights)
    assert 3 == Subscriber(model, tmp_path / "run").update().version
    assert bits(other) == bits(model)
    save_file({"w": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match="exists, and has other tensors"):
        Publisher(other, tmp_path / "run", copy=tmp_path / "other.safetensors")


def test_a_version_that_cannot_be_restored_stops_a_publisher(tmp_path: Path) -> None:
    run(tmp_path, 2)
    (patch,) = files(tmp_path, "patches/*")
    raw = bytearray(patch.read_bytes())
    raw[-1] ^= 1
    patch.write_bytes(raw)
    with pytest.raises(SourceError, match=rf"{patch.name}: damaged"):
        Publisher(some_weights(3), tmp_path)


def test_of_two_publishers_the_slower_one_is_refused(tmp_path: Path) -> None:
    first, weights, states = run(tmp_path, 2)
    second = Publisher(weights, tmp_path)
    step(weights, 2)
    second.publish()
    for _ in range(2):
        with pytest.raises(
            SourceError, match="another publisher wrote version 2: this one, at version 1, is refused"
        ):
            first.publish()
    model = like(weights)
    Subscriber(model, tmp_path).update()
    assert bits(weights) == bits(model)
    assert 2 == len(files(tmp_path, "patches/*"))
    assert 3 == second.publish().version
    del states


def test_of_two_publishers_in_the_same_instant_one_is_refused(tmp_path: Path) -> None:
    """Both have seen that they may: the line can be made but once."""
    weights = some_weights()
    publishers = [Publisher(weights, Slow(Folder(tmp_path)))]
    publishers.append(Publisher(weights, Slow(Folder(tmp_path))))
    step(weights, 1)
    results: list[Any] = []
    meeting = threading.Barrier(2)
    for publisher in publishers:
        publisher._place.meeting = meeting  # type: ignore[attr-defined]

    def publish(publisher: Publisher) -> None:
        try:
            results.append(publisher.publish())
        except ShiraError as error:
            results.append(error)

    threads = [threading.Thread(target=publish, args=(one,)) for one in publishers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (refused,) = (one for one in results if isinstance(one, SourceError))
    assert "another publisher wrote version 1" in str(refused)
    assert 1 == len(files(tmp_path, "patches/*"))
    model = like(weights)
    assert 1 == Subscriber(model, tmp_path).update().version
    assert bits(weights) == bits(model)


class Slow(Folder):
    """A folder in which both publishers wait for each other before they make a line."""

    meeting: threading.Barrier | None = None

    def __init__(self, folder: Folder) -> None:
        super().__init__(Path(folder.label))

    def create(self, name: str, data: bytes) -> None:
        if self.meeting is not None:
            self.meeting.wait(30)
        super().create(name, data)


def test_a_client_that_writes_twice_refuses_itself(tmp_path: Path) -> None:
    """The first try was answered by a lost connection, the second by "exists": the line is there, and ours."""

    class Twice(Folder):
        def create(self, name: str, data: bytes) -> None:
            super().create(name, data)
            if name.startswith("index"):
                super().create(name, data)

    weights = some_weights()
    publisher = Publisher(weights, Twice(tmp_path))
    step(weights, 1)
    assert 1 == publisher.publish().version
    assert 2 == publisher.publish().version


def test_pruning_keeps_what_is_needed(tmp_path: Path) -> None:
    publisher, weights, states = run(tmp_path, 8, snapshot_every=3)
    (tmp_path / "patches" / "0000000004-dead.st").write_bytes(b"of a publisher that died")
    (tmp_path / "patches" / "0000000008-alive.st").write_bytes(b"of a version that is being written")
    (tmp_path / "patches" / "notes.txt").write_bytes(b"not ours")
    publisher.prune(5)
    assert ["3", "4", "5", "6", "7"] == [path.stem.lstrip("0") for path in files(tmp_path, "index/*")]
    assert ["3", "4", "5", "6", "7", "8"] == [
        path.name.partition("-")[0].lstrip("0") for path in files(tmp_path, "patches/0*")
    ]
    assert (tmp_path / "patches" / "notes.txt").exists()
    assert 2 == len(files(tmp_path, "snapshots/*"))
    model = held(states[0], weights)
    server = Subscriber(model, tmp_path)
    assert 6 == server.update().snapshot
    assert states[7] == bits(model)
    with pytest.raises(SourceError, match="no snapshot of version 2 or before it"):
        publisher.prune(2)
    assert 8 == publisher.publish().version


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_places(where: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").store.clear()
    place = open_place(tmp_path / "run" if where == "folder" else UPath("memory://run"))
    assert place is open_place(place)
    assert [] == place.names("a")
    for missing in (lambda: place.read("a/b"), lambda: place.local("a/b").__enter__()):
        with pytest.raises(FileNotFoundError):
            missing()
    place.create("a/b", b"one")
    with pytest.raises(FileExistsError):
        place.create("a/b", b"two")
    with place.writing("a/c") as path:
        path.write_bytes(b"three")
    with pytest.raises(ZeroDivisionError), place.writing("a/d") as path:
        raise ZeroDivisionError
    assert ["b", "c"] == place.names("a")
    with place.local("a/c") as path:
        assert b"three" == path.read_bytes()
    assert b"one" == place.read("a/b")
    place.remove("a/b")
    place.remove("a/b")
    assert ["c"] == place.names("a")


def test_a_folder_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: Any) -> None:
        raise PermissionError("not supported")

    monkeypatch.setattr("os.link", no_link)
    place = Folder(tmp_path)
    place.create("a/b", b"one")
    with pytest.raises(FileExistsError):
        place.create("a/b", b"two")
    assert ["b"] == [path.name for path in (tmp_path / "a").iterdir()]


@pytest.mark.parametrize("written", [True, False])
def test_a_store_that_refuses_in_words_of_its_own(written: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or loses the connection: if the file is there, that is what is told, and the publisher looks whose it is."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    weights = some_weights()
    publisher = Publisher(weights, "memory://run")
    pipe = type(memory).pipe_file

    def failing(self: Any, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        if written:
            pipe(self, path, value, mode)
        raise TimeoutError("412")

    monkeypatch.setattr(type(memory), "pipe_file", failing)
    if written:
        assert 1 == publisher.publish().version
    else:
        with pytest.raises(SourceError, match=r"memory://run/index/0000000001\.json: 412"):
            publisher.publish()
    monkeypatch.undo()
    assert (2 if written else 1) == publisher.publish().version
    Subscriber(model := like(weights), "memory://run").update()
    assert bits(weights) == bits(model)


def test_compact_patches(tmp_path: Path) -> None:
    """Entries that follow from what was there before are not stored; late servers tell them from each patch's own base."""
    weights = {"w": np.random.default_rng(0).standard_normal((200, 100)).astype(np.float32)}
    start = copied(weights)
    plain, compact = Publisher(weights, tmp_path / "a"), Publisher(weights, tmp_path / "b", encoding="compact")
    states = [bits(weights)]
    for _ in range(3):
        flat = weights["w"].reshape(-1)
        flat[np.argsort(-np.abs(flat))[:700]] *= -0.5  # the largest, which are others after each step
        done = [publisher.publish() for publisher in (plain, compact)]
        assert done[0].nbytes > done[1].nbytes + 500
        states.append(bits(weights))
    lines = [json.loads(path.read_bytes()) for path in files(tmp_path, "b/index/*.json")]
    assert ["compact"] * 3 == [line["patch"]["encoding"] for line in lines[1:]]
    model = copied(start)
    server = Subscriber(model, tmp_path / "b")
    server.update(1)
    assert states[1] == bits(model)
    assert (3, 2) == ((found := server.update()).version, found.patches)
    assert states[3] == bits(model)
    server.back()
    assert states[1] == bits(model)
    assert 3 == Publisher(weights, tmp_path / "b", encoding="compact").version
    assert 1 == restore(tmp_path / "b", tmp_path / "out", version=1)
    assert states[1] == bits(shira.open_checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("how", ["before", "after", "torn"])
@pytest.mark.parametrize("dies", [False, True], ids=["goes on", "dies"])
def test_a_crash_at_each_access(how: str, dies: bool, tmp_path: Path) -> None:
    """Of a step with a snapshot; whoever goes on then publishes what the weights are, and servers get it."""
    for at in range(20):
        place = Fragile(open_place(tmp_path / f"{at}"))
        weights = some_weights()
        publisher, server = Publisher(weights, place, snapshot_every=1), Subscriber(model := like(weights), place)
        server.update()
        step(weights, 1)
        crashed = False
        try:
            with place.failing(at, how):
                publisher.publish()
        except Crash:
            crashed = True
        listed = len(place.place.names("index"))
        torn = how == "torn" and crashed and listed == 2  # half of the line is there
        if dies or torn:
            publisher = Publisher(weights, place, snapshot_every=1)
        assert listed - torn == publisher.publish().version
        found = server.update()
        assert publisher.version == found.version
        assert bits(weights) == bits(model)
        server.verify()
        if not crashed:
            break
    assert 5 <= at < 20


MOVED: dict[str, Any] = {
    "gone": lambda weights: weights.pop("layer.weight"),
    "cut": lambda weights: weights.update({"layer.weight": weights["layer.weight"][:1]}),
    "turned": lambda weights: weights.update({"layer.weight": weights["layer.weight"].T}),
    "cast": lambda weights: weights.update({"layer.weight": weights["layer.weight"].astype(np.float64)}),
}


@pytest.mark.parametrize("case", MOVED)
@pytest.mark.parametrize("then", ["back", "update", "verify"])
def test_a_tensor_that_is_another_one_after_an_update(case: str, then: str, tmp_path: Path) -> None:
    publisher, weights, states = run(tmp_path, 2)
    live = held(states[0], weights)
    subscriber = Subscriber(live, tmp_path)
    subscriber.update()
    MOVED[case](live)
    before = bits(live)
    step(weights, 2)
    publisher.publish()
    with pytest.raises(BaseMismatch, match=r"layer\.weight"):
        getattr(subscriber, then)()
    assert before == bits(live)
