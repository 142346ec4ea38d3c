"""The page on a merge: well formed, right, safe, and readable on desktop and phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from shira_analysis.merging.analysis import analyse_merge
from shira_analysis.reports.html.merge_page import merge_page
from shira_format.adapter import Adapter
from shira_format.calibration.moments import Moment, Moments
from shira_format.convert import lora_to_shira
from shira_format.format import save
from shira_format.merging import Merge, open_merge
from shira_format.tensors import DenseTensor, SparseTensor
from tests import browser, models
from tests.shira_analysis.test_html import EVIL, parsed
from tests.shira_analysis.test_merge_analysis import QUERY, merges, of_deltas, struct


@given(merges())
def test_any_merge_has_a_page(job: Merge) -> None:
    report = analyse_merge(job, alternatives=["linear", "overwrite"])
    found = parsed(merge_page(report))
    text = found.text
    assert all(" ".join(warning.split()) in text for warning in report.warnings())
    assert "nan" not in text.lower().split()
    assert "After: what is left of each adapter?" in text
    assert ("One adapter alone" in text) == (len(job.inputs) == 1)


def test_the_page() -> None:
    report = analyse_merge(of_deltas([[1, 1, 0, 0]], [[0, -2, 2, 0]], method="overwrite", max_density=0.75))
    text = parsed(merge_page(report)).text
    assert "Merge report: adapter 1 and adapter 2" in text
    assert (
        "method overwrite options priority = last adapter 1 weight 1 adapter 2 weight 1 density limit 75.00 %"
        in text
    )
    assert "adapter 1 loses 50.00 % of its energy: 1 of its 2 entries are dropped." in text
    assert "share 1 entries" in text
    assert "adapter 1 1 2 1 50.00 % 450.00 %" in text
    assert "adapter 2 1 2 0 0.00 % 0.00 %" in text
    (pair,) = report.pairs
    assert pair.pair.whole.product is not None
    assert (
        f"{QUERY} 1 1 1 100.00 % {pair.pair.whole.overlap.cosine:+.3f} {pair.pair.whole.product.awor:.4f}" in text
    )
    assert "refuse tensor 'h.0.q_proj.weight': adapter 2 and adapter 1 set 1 entries to different values" in text
    chosen = f"overwrite (chosen) {100 * (report.chosen.kept or 0):.2f} % -350.00 %"
    assert chosen in text
    assert "kept = 1 − sum of ‖r − wᵢ dᵢ‖²" in text


def test_lemmas_in_cells() -> None:
    tensors = [struct((4, 4), [row], row) for row in (1, 2)]
    report = analyse_merge(open_merge([Adapter([tensor]) for tensor in tensors]), alternatives=[])
    (one,) = report.pairs[0].lemmas.tensors
    text = parsed(merge_page(report)).text
    assert f"no {one.margin:.3g} applies {one.bound_margin:.3g}" in text
    assert "1 − AWOR" not in text
    assert "AWOR ≤ density(I) + density(S1) + density(S2) holds with a margin" in text
    report = analyse_merge(of_deltas([[1, 1], [0, 0]], [[0, 0], [1, 2]]), alternatives=[])
    assert "applies 0 no –" in parsed(merge_page(report)).text


def test_moments_and_a_refusal() -> None:
    moments = Moments([Moment(QUERY, np.ones((1, 1, 2, 2)), 2, 30, inputs=np.ones((30, 1, 2)))])
    report = analyse_merge(of_deltas([[1, 2]], [[3, 0]], method="refuse"), moments)
    text = parsed(merge_page(report)).text
    assert "cosine on inputs" in text
    assert "+1.000 100.00 % (100.00 %) 100.00 % (100.00 %)" in text
    assert "The merge is refused: tensor 'h.0.q_proj.weight': adapter 2 and adapter 1 set 1 entries" in text
    assert "Disturbed, by kind of layer" not in text


def evil(folder: Path) -> list[Path]:
    """Adapters whose every text is an attack."""
    paths = []
    for number in (1, 2):
        delta = np.full(2, number, np.float32)
        made = SparseTensor(f"h.1.{EVIL}", (6, 4), [1, 5 + number], delta, base=np.zeros(2, np.float32))
        path = folder / f"<b>evil&{number}.st"
        save(Adapter([made], dense=[DenseTensor(f"w{EVIL}", np.float32([1]))]), path)
        paths.append(path)
    return paths


def test_text_of_strangers_is_text(tmp_path: Path) -> None:
    job = open_merge(evil(tmp_path), method="refuse", layers=[("<b>|script", {})])
    source = merge_page(analyse_merge(job))
    found = parsed(source)
    assert "<b>" not in source
    assert "\u202e" not in source
    assert found.text.count("<script>document.title='owned';fetch('http://example.org/')</script>") == 3


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium to look at pages with: apt-get install chromium, or SHIRA_BROWSER")
    with browser.browser(program, tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of three real adapters, and of ones that attack."""
    folder = tmp_path_factory.mktemp("pages")
    for name, count in (("spam", 0.01), ("genre", 0.01), ("spam", 0.001)):
        lora_to_shira(models.LORAS / name, models.minilm(), folder / f"{name}-{count}.st", density=count, self_contained=True)  # fmt: skip
    jobs = [
        open_merge(sorted(folder.glob("*.st")), method="ties", weights=[0.7, 0.5, 1], max_density=0.01),
        open_merge(evil(folder)),
    ]
    for number, job in enumerate(jobs):
        (folder / f"{number}.html").write_text(merge_page(analyse_merge(job)), "utf-8")
    return sorted(folder.glob("*.html"))


@pytest.mark.parametrize("number", [0, 1], ids=["real", "evil"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(width: int, dark: bool, number: int, chromium: browser.Browser, pages: list[Path]) -> None:
    chromium.open(pages[number], width, dark=dark)
    assert [] == chromium.complaints()
    assert [pages[number].as_uri()] == chromium.requests()
    assert str(chromium.value("document.title")).startswith("Merge report: ")
    assert chromium.value("document.querySelectorAll('details').forEach(d => d.open = true) || document.querySelectorAll('details').length") > 1  # fmt: skip
    assert width == chromium.value("innerWidth")
    assert width == chromium.value("document.documentElement.scrollWidth")
    # No column so narrow that words break into single letters.
    assert 40 < chromium.value("Math.min(...[...document.querySelectorAll('th,dd,dt')].filter(e => e.offsetWidth).map(e => e.offsetWidth))")  # fmt: skip
    assert ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)") == chromium.value(
        "getComputedStyle(document.body).backgroundColor"
    )
    picture = chromium.picture()
    assert b"\x89PNG" == picture[:4]
    assert width == int.from_bytes(picture[16:20], "big")
