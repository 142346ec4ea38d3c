"""All pairs of a set of adapters, in files, and what the command prints of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shira_analysis.measures.deltas import delta_matrix, open_deltas
from shira_analysis.measures.interference import interference
from shira_analysis.measures.orthogonality import orthogonality
from shira_analysis.measures.overlap import Overlap, overlap
from shira_analysis.measures.pairs import measure_pairs
from shira_cli.measure import main
from shira_format.adapter import Adapter
from shira_format.calibration.moments import Moment, Moments
from shira_format.errors import BaseMismatch, SourceError
from shira_format.format import save
from shira_format.tensors import SparseTensor

NAMES = {
    "model.layers.0.self_attn.q_proj.weight": (6, 5),
    "model.layers.1.self_attn.q_proj.weight": (6, 5),
    "model.layers.0.mlp.down_proj.weight": (5, 8),
    "model.layers.0.mlp.conv.weight": (4, 3, 2, 2),
    "model.norm.weight": (7,),
}


def tensor(name: str, shape: tuple[int, ...], seed: int) -> SparseTensor:
    random = np.random.default_rng(seed)
    size = int(np.prod(shape))
    indices = np.sort(random.choice(size, size // 2, replace=False))
    base = np.sin(1.0 + indices).astype(np.float32)  # one base for all
    return SparseTensor(
        name, shape, indices, base + random.standard_normal(indices.size).astype(np.float32), base=base
    )


def adapter(seed: int, *without: str) -> Adapter:
    return Adapter(tensor(n, s, 10 * seed + i) for i, (n, s) in enumerate(NAMES.items()) if n not in without)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    first, second = list(NAMES)[:2]
    for name, one in {"a": adapter(1), "b": adapter(2, first), "c": adapter(3, second)}.items():
        save(one, folder / f"{name}.st")
    moments = []
    for name, width in ((first, 5), (list(NAMES)[3], 12)):
        x = np.random.default_rng(width).standard_normal((30, width)) + 1
        moments.append(Moment(name, (x.T @ x / 30)[None, None], width, 30))
    Moments(moments).save(folder / "moments.safetensors")
    return folder


def test_adapters_of_two_bases_are_refused(tmp_path: Path) -> None:
    """What they hold of the base tells it, where their entries meet."""
    shape, values = (4, 4), np.float32([3, 4])
    for name, indices, base in (("a", [1, 5], [1, 2]), ("b", [5, 9], [7, 8]), ("c", [0, 9], [7, 8])):
        made = SparseTensor("w", shape, indices, values, base=np.float32(base))
        save(Adapter([made]), tmp_path / f"{name}.st")
    files = [open_deltas(tmp_path / f"{name}.st") for name in "abc"]
    with pytest.raises(
        BaseMismatch,
        match=r"a.st and .*b.st: tensor 'w': the base values differ, first at flat index 5: these are not",
    ):
        measure_pairs(files)
    (pair,) = measure_pairs([files[0], files[2]])  # nothing speaks against it
    assert 0 == pair.whole.overlap.shared
    bad = SparseTensor("w", shape, [5], np.float32([np.inf]), base=np.float32([2]))
    save(Adapter([bad]), tmp_path / "bad.st")
    with pytest.raises(SourceError, match=r"bad.st: tensor 'w': the delta at flat index 5 is NaN or infinite"):
        measure_pairs([files[2], open_deltas(tmp_path / "bad.st")])
    (pair,) = measure_pairs([files[1], files[1]])
    assert 1 == pair.whole.overlap.jaccard


def opened(folder: Path, names: str = "abc") -> list:
    return [open_deltas(folder / f"{name}.st") for name in names]


def test_each_tensor_is_measured_as_by_hand(folder: Path) -> None:
    moments = Moments.read(folder / "moments.safetensors")
    pairs = measure_pairs(opened(folder), moments, transposed=True, spectral=True)
    assert [(Path(p.first).stem, Path(p.second).stem) for p in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    files = dict(zip("abc", opened(folder), strict=True))
    for pair in pairs:
        sides = [files[Path(path).stem] for path in (pair.first, pair.second)]
        assert {one.name for one in pair.tensors} == {*sides[0].names, *sides[1].names}
        for one in pair.tensors:
            a, b = (file.tensor(one.name) if one.name in file.names else None for file in sides)
            found = one.measures
            assert found.overlap == overlap(a, b)
            if a is None or b is None or len(one.shape) < 2:
                assert (found.product, found.transposed, found.interference) == (None, None, None)
                continue
            matrices = delta_matrix(a), delta_matrix(b)
            assert found.product == orthogonality(*matrices, spectral=True)
            assert found.transposed == orthogonality(*matrices, transposed=True, spectral=True)
            fed = interference(*matrices, moments[one.name]) if one.name in moments else None
            assert (found.interference, found.fed) == (fed, int(fed is not None))


def test_kinds_and_the_whole_are_sums(folder: Path) -> None:
    pair = measure_pairs(opened(folder, "ab"))[0]
    whole, kinds = pair.whole, pair.kinds
    assert (whole.tensors, whole.both, kinds["query"].tensors, kinds["query"].both) == (5, 4, 2, 1)
    assert list(kinds) == ["query", "mlp down", "norm", "conv"]
    assert whole.overlap.shared == sum(one.measures.overlap.shared for one in pair.tensors)
    products = [one.measures.product for one in pair.tensors if one.measures.product is not None]
    assert len(products) == 3
    assert whole.product is not None
    assert whole.product.cells == sum(one.cells for one in products) == 25 + 64 + 144
    assert whole.product.awom == pytest.approx(np.sqrt(sum(one.awom**2 for one in products)))
    assert sum((kind.overlap for kind in kinds.values()), Overlap()).shared == whole.overlap.shared
    assert (whole.transposed, whole.interference, whole.fed) == (None, None, 0)


def test_dense_oracle_of_a_whole_pair(folder: Path) -> None:
    """The paper's table 13, and a product of convolutions in their matrix view."""
    first, second = opened(folder, "ab")
    dense = {}
    for name, shape in NAMES.items():
        for key, file in (("a", first), ("b", second)):
            flat = np.zeros(int(np.prod(shape)))
            if name in file.names:
                one = file.tensor(name)
                assert one.base is not None
                flat[one.indices] = one.values.astype(float) - one.base.astype(float)
            dense[key, name] = flat.reshape(shape[0], -1)
    pair = measure_pairs([first, second])[0]
    a, b = (np.concatenate([dense[key, name].ravel() for name in NAMES]) for key in "ab")
    assert pair.whole.overlap.distances == pytest.approx([np.linalg.norm(x) for x in (a - b, a, b)])
    conv = next(one for one in pair.tensors if one.kind == "conv")
    product = dense["a", conv.name].T @ dense["b", conv.name]
    assert conv.measures.product is not None
    assert (conv.measures.product.cells, conv.measures.product.awom) == pytest.approx(
        (144, np.linalg.norm(product))
    )


def test_masks_have_an_overlap_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        random = np.random.default_rng(seed)
        mask = SparseTensor(
            "w", (6, 5), np.sort(random.choice(30, 9, replace=False)), value_kind="none", dtype=np.float32
        )
        save(Adapter([mask]), tmp_path / f"{name}.st")
    pair = measure_pairs(opened(tmp_path, "ab"))[0]
    assert (pair.whole.both, pair.whole.product, pair.whole.overlap.cosine) == (1, None, None)
    assert pair.whole.overlap.first == 9


def test_refusals(folder: Path) -> None:
    with pytest.raises(SourceError, match="at least two"):
        measure_pairs(opened(folder, "a"))
    other = Moments([Moment("lm_head.weight", np.ones((1, 1, 1, 1)), 1, 1)])
    with pytest.raises(SourceError, match=r"none of the adapted.*'lm_head.weight'"):
        measure_pairs(opened(folder, "ab"), other)
    wrong = Moments([Moment(next(iter(NAMES)), np.ones((1, 1, 1, 1)), 1, 1)])
    with pytest.raises(SourceError, match="have 1 inputs"):
        measure_pairs(opened(folder, "ac"), wrong)


def test_progress_names_each_weight(folder: Path) -> None:
    seen: list[str] = []
    measure_pairs(opened(folder), progress=seen.append)
    assert sorted(seen) == sorted(NAMES)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture) -> None:
    files = [str(folder / f"{name}.st") for name in "abc"]
    options = ["--moments", str(folder / "moments.safetensors"), "--transposed", "--spectral"]
    assert main([*files, *options, "--tensors"]) == 0
    text = capsys.readouterr().out
    assert text.count("4 of 5 tensors in both") == 2
    assert text.count("3 of 5 tensors in both") == 1
    assert [3, 3] == [text.count(f"\n{product} ") for product in ("A1^T A2", "A1 A2^T")]
    assert 3 == text.count("disturbed 1, 2\n")
    assert 6 == text.count("by chance  spectral ")
    assert text.count("largest cosine on inputs ") == 3
    assert main([*files, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["pairs"]
    pairs = measure_pairs(
        opened(folder), Moments.read(folder / "moments.safetensors"), transposed=True, spectral=True
    )
    assert found == json.loads(json.dumps([pair.as_json() for pair in pairs]))
    assert found[1]["whole"]["interference"]["cosine"] == pairs[1].whole.interference.cosine  # type: ignore[union-attr]
