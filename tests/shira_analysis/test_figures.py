"""Pictures: what is drawn is what was measured."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shira_analysis.figures import layers, masks, matrices, pictures, spectra, style
from shira_analysis.figures.records import from_csv, to_csv
from shira_analysis.measures.adapter import measure, measure_tensor
from shira_analysis.measures.deltas import DeltaFile, delta_matrix, open_deltas
from shira_analysis.measures.overlap import overlap
from shira_analysis.measures.pairs import measure_pairs
from shira_format.adapter import Adapter
from shira_format.calibration.moments import Moment, Moments
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import SourceError
from shira_format.format import save
from shira_format.lora import LowRank
from shira_format.lora.base import Lora
from shira_format.tensors import SparseTensor, matrix_shape
from tests import models, strategies

QUERY, UP, HEAD = "model.layers.0.self_attn.q_proj.weight", "model.layers.11.mlp.up_proj.weight", "score.weight"


def tensor(name: str, shape: tuple[int, ...], density: float, seed: int) -> SparseTensor:
    random = np.random.default_rng(seed)
    count = max(1, round(density * math.prod(shape)))
    indices = np.sort(random.choice(math.prod(shape), count, replace=False))
    base = np.sin(1.0 + indices).astype(np.float32)  # one base for all
    target = random.standard_normal(count).astype(np.float32)
    return SparseTensor(name, shape, indices, target, base=base)


@pytest.fixture
def files(tmp_path: Path) -> list[DeltaFile]:
    """Two self-contained adapters of one base."""
    for name, seed in (("a", 0), ("b", 10)):
        made = [
            tensor(QUERY, (24, 16), 0.2, seed),
            tensor(UP, (40, 24), 0.1, seed + 1),
            tensor(HEAD, (3, 5), 0.4, seed + 2),
        ]
        save(Adapter(made), tmp_path / f"{name}.st")
    return [open_deltas(tmp_path / f"{name}.st") for name in "ab"]


@pytest.fixture
def axes() -> Any:
    return style.figure(4, 3).subplots()


@st.composite
def any_masks(draw: st.DrawFn) -> SparseTensor:
    shape = draw(strategies.small_shapes().filter(math.prod))
    return SparseTensor("w", shape, draw(strategies.masks(shape)), value_kind="none")


@given(any_masks(), st.integers(1, 40))
def test_cells_of_a_grid_are_the_counts_of_the_dense_mask(mask: SparseTensor, side: int) -> None:
    grid = masks.mask_grid(mask, side)
    rows, columns = matrix_shape(mask.shape)
    dense = np.zeros((rows, columns), np.int64)
    dense.reshape(-1)[mask.indices] = 1
    assert mask.nnz == grid.counts.sum()
    assert (0, rows, 0, columns) == (grid.rows[0], grid.rows[-1], grid.columns[0], grid.columns[-1])
    assert (np.diff(grid.rows) > 0).all()
    assert (np.diff(grid.columns) > 0).all()
    assert max(grid.counts.shape) <= side
    by_hand = np.add.reduceat(np.add.reduceat(dense, grid.rows[:-1]), grid.columns[:-1], axis=1)
    assert (by_hand == grid.counts).all()
    np.testing.assert_allclose(grid.of_rows @ np.diff(grid.rows) / rows, mask.nnz / mask.numel)
    np.testing.assert_allclose(grid.of_columns @ np.diff(grid.columns) / columns, mask.nnz / mask.numel)
    records = grid.records()
    assert mask.nnz == sum(record["entries"] for record in records)
    area = [(r["row_to"] - r["row_from"]) * (r["column_to"] - r["column_from"]) for r in records]
    assert mask.numel == sum(area)
    assert all(r["entries"] == round(r["density"] * size) for r, size in zip(records, area, strict=True))


def test_a_mask_of_any_size_is_drawn_from_its_indices() -> None:
    huge = SparseTensor("w", (2**30, 2**22), [0, 2**22 - 1, 2**52 - 1], value_kind="none")
    grid = masks.mask_grid(huge, 512)
    assert (512, 128) == grid.counts.shape
    assert [(0, 0), (0, 127), (511, 127)] == [tuple(at) for at in np.argwhere(grid.counts).tolist()]


def test_many_entries_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    one = tensor("w", (50, 70), 0.3, 1)
    whole = masks.mask_grid(one).counts
    monkeypatch.setattr(masks, "_STEP", 7)
    assert (whole == masks.mask_grid(one).counts).all()


def test_grids_that_cannot_be(axes: Any) -> None:
    for side in (0, 513):
        with pytest.raises(SourceError, match="1 to 512"):
            masks.mask_grid(tensor("w", (4, 4), 0.5, 0), side)
    with pytest.raises(SourceError, match="tensor 'w' has no elements"):
        masks.mask_grid(SparseTensor("w", (0, 4), np.empty(0, np.int64), value_kind="none"))
    empty = masks.mask_grid(SparseTensor("w", (4, 4), np.empty(0, np.int64), value_kind="none"))
    assert axes is masks.draw_mask(axes, empty)


def test_a_drawn_mask_is_its_densities(axes: Any) -> None:
    grid = masks.mask_grid(tensor("a$b$c\u202e", (100, 37), 0.1, 3), 20)
    assert axes is masks.draw_mask(axes, grid)
    np.testing.assert_allclose(axes.images[0].get_array(), 100 * grid.density)
    assert r"a\$b\$c\u202e" in axes.get_title()
    assert b"\x89PNG" == style.render(axes.figure)[:4]  # dollars are no formula


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("encoder.layer.3.output.dense.weight", ("encoder.layer.", 3)),
        ("model.layers.11.mlp.experts.5.w1.weight", ("model.layers.", 11)),
        ("h.0.attn.c_attn.weight", ("h.", 0)),
        ("0.weight", ("", 0)),
        ("lm_head.weight", ("", None)),
        ("conv2d.weight", ("", None)),
        ("transformer.blocks.7", ("transformer.blocks.", 7)),
    ],
)
def test_block_of(name: str, block: tuple[str, int | None]) -> None:
    assert block == layers.block_of(name)


def test_layers_are_what_was_measured(files: list[DeltaFile], axes: Any) -> None:
    found = measure(files[0].path)
    grid = layers.layer_grid(found.tensors)
    assert ("query", "mlp up", "head") == grid.kinds
    assert ["outside", "model.layers.0", "model.layers.11"] == [grid.block(at) for at in range(3)]
    whole = found.total.norms
    assert whole is not None
    for record in grid.records():
        group = found.kinds[record["kind"]]
        assert (group.tensors, group.mask.nnz, group.mask.numel) == (
            record["tensors"],
            record["entries"],
            record["elements"],
        )
        assert group.mask.density == record["density"]
        assert group.norms is not None
        assert group.norms.energy / whole.energy == pytest.approx(record["energy_share"])
    assert axes is layers.draw_layers(axes, grid, "energy")
    drawn = axes.images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(drawn, grid.values("energy"))
    assert 3 == np.isfinite(drawn).sum()
    assert 100 == pytest.approx(np.nansum(drawn))


def test_layers_of_one_place_add_up() -> None:
    one, two = tensor("h.2.mlp.gate.weight", (4, 4), 0.5, 1), tensor("h.2.x.gate_proj.weight", (8, 4), 0.25, 2)
    three = SparseTensor("h.10.mlp.up_proj.weight", (5, 5), [3], value_kind="none")
    grid = layers.layer_grid([measure_tensor(t) for t in (three, one, two)])
    assert ("2", "10") == grid.blocks  # by number
    assert grid.energy is None
    assert np.isnan(grid.values("energy")).all()
    assert 16 == sum(r["entries"] for r in grid.records() if r["block"] == "h.2")
    assert [None] * len(grid.cells) == [record["energy_share"] for record in grid.records()]


def test_energies_that_float64_cannot_hold() -> None:
    values = np.float64([1e300, 2e300])
    big = [
        SparseTensor(f"h.{i}.wq.weight", (4,), [i], values[i : i + 1], value_kind="delta", dtype=np.float64)
        for i in range(2)
    ]
    found = layers.layer_grid([measure_tensor(t) for t in big]).values("energy")
    np.testing.assert_allclose(found, [[20, 80]])


def test_a_spectrum_is_that_of_the_dense_change(files: list[DeltaFile], axes: Any) -> None:
    curve = spectra.curve_of(files[0], UP)
    dense = delta_matrix(files[0].tensor(UP)).toarray()
    rank = int(np.linalg.matrix_rank(dense))
    np.testing.assert_allclose(curve.values, np.linalg.svd(dense, compute_uv=False)[:rank], rtol=1e-10)
    random = np.random.default_rng(0)
    up, down = (
        random.standard_normal((40, 3)).astype(np.float32),
        random.standard_normal((3, 24)).astype(np.float32),
    )
    lora = Lora([LowRank(UP, (40, 24), up, down)])
    of_lora = spectra.curve_of_lora(lora, UP, "mine")
    product = up.astype(np.float64) @ down.astype(np.float64)
    np.testing.assert_allclose(of_lora.values, np.linalg.svd(product, compute_uv=False)[:3], rtol=1e-6)
    assert axes is spectra.draw_spectra(axes, [curve, of_lora])
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_ydata(), curve.values)
    np.testing.assert_array_equal(second.get_xdata(), [1, 2, 3])
    assert "mine: rank 3" in second.get_label()
    with pytest.raises(SourceError, match="a.st: has no tensor 'x'"):
        spectra.curve_of(files[0], "x")
    with pytest.raises(SourceError, match="mine: the LoRA does not change 'x'"):
        spectra.curve_of_lora(lora, "x", "mine")


def test_matrices_are_those_of_the_pairs(files: list[DeltaFile], axes: Any) -> None:
    joint = [overlap(*(file.tensor(name) for file in files)) for name in files[0].names]
    shared, union = sum(one.shared for one in joint), sum(one.union for one in joint)
    (jaccard, times), (record,) = matrices.overlap_matrices(files)
    assert (shared, union) == (record["shared"], record["either"])
    assert 100 * shared / union == pytest.approx(jaccard.values[0, 1])
    assert shared / sum(one.expected for one in joint) == pytest.approx(times.values[1, 0])
    assert np.isnan(np.diag(jaccard.values)).all()
    dense = [[delta_matrix(file.tensor(name)).toarray() for file in files] for name in files[0].names]
    products = [a.T @ b for a, b in dense]
    (awor, awom), (record,) = matrices.orthogonality_matrices(files)
    zeros = sum(np.count_nonzero(p == 0) for p in products) / sum(p.size for p in products)
    assert zeros == pytest.approx(awor.values[0, 1]) == record["awor"]
    size = math.sqrt(sum(float((p**2).sum()) for p in products))
    assert size == pytest.approx(awom.values[1, 0]) == record["awom"]
    assert axes is matrices.draw_matrix(axes, awor)
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), awor.values)
    assert awor.expected is not None
    both = f"{awor.values[0, 1]:.4f}\n({awor.expected[0, 1]:.4f})"
    assert {both, "–"} == {text.get_text() for text in axes.texts}
    (pair,) = measure_pairs(files, transposed=True)
    assert pair.whole.product is not None
    assert pair.whole.transposed is not None
    for key in (
        "awor",
        "awor_structural",
        "awor_if_uniform",
        "awor_if_independent",
        "awom",
        "awom_if_independent",
    ):
        assert getattr(pair.whole.product, key) == record[key]
    assert awor.expected[1, 0] == pair.whole.product.awor_if_uniform
    (turned, _), (record,) = matrices.orthogonality_matrices(files, transposed=True)
    assert (turned.values[0, 1], record["awom"]) == (pair.whole.transposed.awor, pair.whole.transposed.awom)
    assert "A₁A₂ᵀ" in turned.title


def test_matrices_on_inputs(files: list[DeltaFile], axes: Any) -> None:
    moments = Moments([Moment(QUERY, np.eye(16)[None, None] + 0.5, 16, 9)])
    (_, _, cosines), (record,) = matrices.orthogonality_matrices(files, moments=moments)
    (pair,) = measure_pairs(files, moments)
    met = pair.whole.interference
    assert met is not None
    assert (met.cosine, met.disturbed_second) == (record["inputs_cosine"], record["inputs_disturbed_second"])
    assert met.cosine == cosines.values[1, 0]
    assert record["inputs_disturbed_first_each"] is None
    matrices.draw_matrix(axes, cosines)
    assert (-1, 1) == axes.images[0].get_clim()
    assert len(pictures.orthogonality_picture(files, moments=moments).image) > len(
        pictures.orthogonality_picture(files).image
    )


def test_adapters_without_a_common_weight(files: list[DeltaFile], tmp_path: Path) -> None:
    save(Adapter([tensor("other.weight", (8, 8), 0.2, 3)]), tmp_path / "c.st")
    three = [*files, open_deltas(tmp_path / "c.st")]
    (awor, awom), records = matrices.orthogonality_matrices(three)
    for matrix in (awor, awom):
        assert np.isnan(matrix.values[2]).all()
        assert np.isfinite(matrix.values[0, 1])
    assert [None] * 2 == [record["awor"] for record in records if record["second"] == "c.st"]
    assert b"empty cells: nothing to measure" in pictures.overlap_picture(three, form="svg").image
    assert b"empty cells" not in pictures.overlap_picture(files, form="svg").image


def test_spectra_of_nothing(tmp_path: Path, files: list[DeltaFile], axes: Any) -> None:
    none = SparseTensor(UP, (40, 24), [3], np.float32([0]), value_kind="delta")
    save(Adapter([none]), tmp_path / "zero.st")
    zero = open_deltas(tmp_path / "zero.st")
    with pytest.raises(SourceError, match=r"zero.st: tensor '.*up_proj.weight': the delta is 0"):
        pictures.spectrum_picture([zero])
    curves = [spectra.curve_of(file, UP) for file in (zero, files[0])]
    with pytest.raises(SourceError, match="nothing to draw"):
        spectra.draw_spectra(axes, curves[:1])
    spectra.draw_spectra(axes, curves)
    assert axes.lines[0].get_label().startswith("zero.st: rank 0")
    assert b"\x89PNG" == style.render(axes.figure)[:4]
    assert b"\x89PNG" == pictures.spectrum_picture([zero, files[0]], tensor=UP).image[:4]


def size_of(image: bytes) -> tuple[int, int]:
    """Width and height of a PNG."""
    return int.from_bytes(image[16:20]), int.from_bytes(image[20:24])


def test_many_adapters(files: list[DeltaFile]) -> None:
    many = files * 8
    lines = [tuple(style.line_style(at).values()) for at in range(32)]
    assert 32 == len({(colour, dashes) for colour, _, dashes in lines})
    for image in (
        pictures.mask_picture(many, side=16).image,
        pictures.layers_picture(many).image,
        pictures.spectrum_picture(many).image,
    ):
        width, height = size_of(image)
        assert width <= 2500
        assert height <= 8000
    for picture in (pictures.mask_picture, pictures.layers_picture):
        with pytest.raises(SourceError, match="26 adapters: at most 24 can be drawn"):
            picture(files * 13)
    with pytest.raises(SourceError, match="40 spectra: at most 32 can be distinguished"):
        pictures.spectrum_picture(files * 20)
    with pytest.raises(SourceError, match="62 adapters: at most 60"):
        pictures.overlap_picture(files * 31)


def test_layers_of_several_have_one_scale(
    files: list[DeltaFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(Adapter([tensor(QUERY, (24, 16), 0.9, 0)]), tmp_path / "dense.st")
    both = [files[0], open_deltas(tmp_path / "dense.st")]
    seen: list[Any] = []
    monkeypatch.setattr(pictures, "render", lambda drawn, form: seen.append(drawn) or style.render(drawn, form))
    pictures.layers_picture(both)
    panels = [one for one in seen[0].axes if one.images and one.get_title(loc="left")]
    assert 4 == len(panels)
    grids = [layers.layer_grid(measure(file.path).tensors) for file in both]
    for at, what in enumerate(("density", "energy")):
        top = max(np.nanmax(grid.values(what)) for grid in grids)  # type: ignore[arg-type]
        assert {(0, top)} == {one.images[0].get_clim() for one in panels[at::2]}


@pytest.mark.parametrize("shape", [(8,), (5000, 3), (1, 5000), (1, 1), (2, 3)])
def test_masks_of_odd_shapes(shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However narrow: title above the picture, in the picture, and nothing over anything else."""
    save(Adapter([tensor("model.norm.weight", shape, 0.4, 1)]), tmp_path / "a.st")
    seen: list[Any] = []
    monkeypatch.setattr(pictures, "render", lambda drawn, form: seen.append(drawn) or style.render(drawn, form))
    pictures.mask_picture([open_deltas(tmp_path / "a.st")])
    (drawn,) = seen
    drawn.set_dpi(style.DPI)
    drawn.draw_without_rendering()
    (panel,) = [one for one in drawn.axes if one.get_title()]
    box, above, title = (
        panel.get_window_extent(),
        drawn._suptitle.get_window_extent(),
        panel.title.get_window_extent(),
    )
    assert title.y1 < above.y0
    assert box.y1 < title.y0
    longer, shorter = max(box.width, box.height), min(box.width, box.height)
    assert longer < 4.1 * shorter
    labels = [label.get_window_extent() for label in panel.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(labels))


def test_names_are_told_apart() -> None:
    assert ["a", "b"] == style.distinct_labels(["a", "b"], 10)
    long = [f"{'x' * 50}{letter}{'y' * 80}.st" for letter in "ab"]
    assert ["…a…", "…b…"] == style.distinct_labels(long, 20)
    same = ["z" * 99, "z" * 99]
    assert 1 == len(set(style.distinct_labels(same, 20)))
    odd = ["p" * 40 + "1" + "q" * 90 + "1", "p" * 40 + "2" + "q" * 90 + "1", "p" * 40 + "1" + "q" * 90 + "2"]
    assert 3 == len(set(style.distinct_labels(odd, 12)))


def test_a_pair_takes_two_of_one_base(files: list[DeltaFile], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="two adapters"):
        matrices.overlaps(files[:1])
    save(Adapter([tensor(UP, (4, 4), 0.5, 0)]), tmp_path / "c.st")
    with pytest.raises(
        SourceError, match=r"a.st and .*c.st: tensor 'model.layers.11.mlp.up_proj.weight' has the shape"
    ):
        matrices.overlaps([files[0], open_deltas(tmp_path / "c.st")])


CELLS = st.none() | st.integers() | st.floats(allow_nan=False) | st.text("ab,;\"'\n", min_size=1)


@given(st.lists(st.fixed_dictionaries({"one": CELLS, "two": CELLS}), min_size=1))
def test_csv_comes_back(records: list[dict[str, Any]]) -> None:
    assert records == from_csv(to_csv(records))
    assert [] == from_csv(to_csv([]))


def test_all_pictures_and_their_numbers(files: list[DeltaFile]) -> None:
    before = dict(mpl.rcParams)
    made = {
        "mask": pictures.mask_picture(files, side=16),
        "layers": pictures.layers_picture(files),
        "spectrum": pictures.spectrum_picture(files),
        "overlap": pictures.overlap_picture(files),
        "orthogonality": pictures.orthogonality_picture(files),
    }
    assert before == dict(mpl.rcParams)
    for picture in made.values():
        assert b"\x89PNG\r\n\x1a\n" == picture.image[:8]
        assert len(picture.image) > 5000
        assert picture.records == from_csv(to_csv(picture.records))
    assert made["mask"].image == pictures.mask_picture(files, side=16).image  # the same numbers, the same bytes
    drawn = [r for r in made["mask"].records if r["adapter"] == "b.st"]
    assert files[1].file.manifest.tensors[UP].nnz == sum(record["entries"] for record in drawn)
    assert {UP} == {record["tensor"] for record in drawn}
    assert ET.fromstring(pictures.overlap_picture(files, form="svg").image).tag.endswith("svg")
    with pytest.raises(SourceError, match="b.st: has no sparse tensor 'x'"):
        pictures.mask_picture([files[1]], "x")


def test_a_picture_of_the_real_model() -> None:
    base = open_checkpoint(models.minilm())
    assert base  # the names of a real model have places in a grid
    places = {layers.block_of(name) for name in base}
    assert {("encoder.layer.", number) for number in range(6)} | {("", None)} == places


@pytest.mark.parametrize(
    ("value", "count", "written"),
    [
        (1, 2, "1.0"), (0.6, 2, "0.60"), (16, 2, "16"), (99.7, 2, "100"), (100, 2, "100"), (20, 3, "20.0"), (1.5, 3, "1.50"),
        (999.7, 3, "1000"), (54321, 3, "54321"), (1234567, 3, "1.23e+06"), (1.234e-7, 3, "1.23e-07"), (0, 2, "0.0"),
    ],
)  # fmt: skip
def test_digits(value: float, count: int, written: str) -> None:
    assert written == style.digits(value, count)


@pytest.mark.parametrize("scale", ["viridis", "cividis"])
def test_numbers_on_a_scale_of_colours_are_legible(scale: str) -> None:
    for colour in mpl.colormaps[scale](np.linspace(0, 1, 256)):
        red, green, blue, _ = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        contrast = (luminance + 0.05) / 0.05 if style.text_colour(colour) == "black" else 1.05 / (luminance + 0.05)
        assert contrast >= 4.5  # what WCAG asks of text


def test_no_two_titles_of_masks_overlap(
    files: list[DeltaFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tall = tensor("model.layers.3.block_sparse_moe.gate_and_up_projection.weight", (400, 40), 0.1, 5)
    paths = [tmp_path / f"{letter * 30}.st" for letter in "knu"]
    for path in paths:
        save(Adapter([tall]), path)
    seen: list[Any] = []
    monkeypatch.setattr(pictures, "render", lambda drawn, form: seen.append(drawn) or style.render(drawn, form))
    pictures.mask_picture([open_deltas(path) for path in paths])
    (drawn,) = seen
    panels = [one for one in drawn.axes if one.get_title()]
    boxes = [one.title.get_window_extent() for one in panels]
    assert 3 == len(boxes)
    for left, right in itertools.pairwise(boxes):
        assert left.x1 < right.x0
    assert 0 < drawn._suptitle.get_window_extent().x0
    assert boxes[0].x0 > 0


def test_long_and_odd_names() -> None:
    assert "a\\nb" == style.short_label("a\nb")
    assert 60 == len(style.short_label("x" * 99))
    assert style.short_label("layers.17." + "x" * 99 + ".weight").endswith(".weight")
    assert r"\$x\$" == style.short_label("$x$")
