"""The report as a page: well formed, right, and safe to open whatever the adapter says of itself."""

from __future__ import annotations

import html.parser
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from safetensors.numpy import save_file

from shira_analysis.measures.adapter import measure
from shira_analysis.measures.deltas import open_deltas
from shira_analysis.measures.pairs import measure_pairs
from shira_analysis.reports.html import adapters, page, report, words
from shira_analysis.reports.html import files as of_files
from shira_analysis.reports.html.adapter_facts import AdapterFacts, read_facts
from shira_analysis.reports.html.adapters import adapters_page
from shira_cli import inspect
from shira_format._core.arrays import array_digest
from shira_format.adapter import Adapter
from shira_format.calibration.moments import Moment, Moments
from shira_format.entries.inspection import describe
from shira_format.errors import FormatError
from shira_format.format import AdapterFile, save
from shira_format.tensors import DenseTensor, SparseTensor
from tests import browser, strategies

Capture = pytest.CaptureFixture[str]
VOID = {"meta", "link", "img", "br", "hr", "input"}
QUERY, UP, LONG = "h.0.q_proj.weight", "h.1.up_proj.weight", "h.1." + "very_long_name_" * 12 + "weight"
EVIL = "<script>document.title='owned';fetch('http://example.org/')</script>\"'><img src=http://example.org/x onerror=alert(1)>&amp;\u202e"


class Page(html.parser.HTMLParser):
    """A page as elements and text; fails on tags that do not fit together."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert [] == self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def parsed(source: str) -> Page:
    """The page, which needs nothing but itself."""
    found = Page(source)
    assert source.startswith("<!DOCTYPE html>")
    assert not {"script", "iframe", "object", "embed", "form", "base", "svg"} & {tag for tag, _ in found.tags}
    for tag, attributes in found.tags:
        assert not [key for key in attributes if key.startswith("on")], tag
        for key in ("src", "href", "action", "data", "srcset"):
            assert (attributes.get(key) or "data:").startswith("data:") or key == "href"
    ways = [attributes["href"] or "" for tag, attributes in found.tags if tag == "a"]
    places = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert {way[1:] for way in ways} <= set(places)
    assert all(way.startswith("#") for way in ways)
    assert len(places) == len(set(places))
    assert ["data:,"] == [attributes["href"] for tag, attributes in found.tags if tag == "link"]
    style = source.split("<style>")[1].split("</style>", maxsplit=1)[0]
    assert "url(" not in style
    assert "@import" not in style
    return found


def looked(path: Path, **more: Any) -> AdapterFacts:
    return read_facts(open_deltas(path), describe(AdapterFile(path)) | more)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two self-contained adapters, of which the second has a name that no line can hold."""
    random = np.random.default_rng(0)
    for number, name in enumerate("ab"):
        made = []
        for weight, shape in ((QUERY, (24, 16)), (UP if not number else LONG, (40, 24)), ("wte.weight", (50, 24))):
            indices = np.sort(random.choice(shape[0] * shape[1], 30, replace=False))
            base = np.sin(1.0 + indices).astype(np.float32)  # one base for both
            target = random.standard_normal(30).astype(np.float32)
            made.append(SparseTensor(weight, shape, indices, target, base=base))
        manifest = {"selection": {"rule": "top-k", "scope": "tensor", "density": 0.01, "energy_kept": 0.14}}
        whole = [DenseTensor("norm.bias", np.float32([1, 2]))]
        save(Adapter(made, dense=whole, manifest=manifest), tmp_path / f"{name}.st")
    return [tmp_path / "a.st", tmp_path / "b.st"]


def test_one_adapter(files: list[Path]) -> None:
    one = looked(files[0])
    found = parsed(adapters_page([one]))
    text = found.text
    assert "Adapter report: a.st" in text
    assert (
        "This adapter sets 90 of the 2,544 elements of 3 weights (3.54 %); all others keep the base's values"
        in text
    )
    assert "1 further tensor is replaced as a whole." in text
    assert "It can be undone: the file holds the base's values" in text
    assert "It keeps only 14 % of the original change's energy: expect a much weaker effect" in text
    assert "It names no licence." in text
    assert "It keeps 1 % of the entries of each tensor, the largest changes." in text
    measured = measure(files[0])
    assert measured.total.norms is not None
    norms = measured.kinds["mlp up"].norms
    assert norms is not None
    assert (
        f"mlp up {100 * measured.kinds['mlp up'].mask.density:.3g} % {100 * norms.energy / measured.total.norms.energy:.3g} %"
        in text
    )
    (image,) = [attributes for tag, attributes in found.tags if tag == "img"]
    assert (image["src"] or "").startswith("data:image/png;base64,")
    assert "Positions of the 30 entries of h.0.q_proj.weight" in (image["alt"] or "")
    assert "Do they interfere with each other?" not in text


def test_pairs(files: list[Path]) -> None:
    text = parsed(adapters_page([looked(path) for path in files])).text
    (pair,) = measure_pairs([open_deltas(path) for path in files])
    common, product = pair.whole.overlap, pair.whole.product
    assert product is not None
    assert f"a.st and b.st both change 2 weights, and share {common.shared} entries" in text
    assert (
        f"The cosine of the two changes is {common.cosine:+.3f}: as changes of the weights they are nearly" in text
    )
    zeros = (product.awor, product.awor_structural, product.awor_if_uniform, product.awor_if_independent)
    shown = " ".join(f"{share:.4f}" for share in zeros)
    assert f"{shown} {product.awom:.3g} {product.awom_if_independent:.3g}" in text
    assert (
        "One of them replaces 1 tensor as a whole that the other replaces or changes as well: norm.bias." in text
    )
    assert "collect their moments with shira-moments and pass them with --moments" in text


def test_pairs_on_inputs(files: list[Path], tmp_path: Path, capsys: Capture) -> None:
    """With moments, the page also shows how the two interfere on the layers' inputs."""
    made = np.random.default_rng(1).standard_normal((30, 16))
    query = Moment(QUERY, (made.T @ made / 30)[None, None], 16, 30, inputs=made[:, None])
    table = Moment("wte.weight", np.full((1, 50, 1, 1), 0.02), 50, 10, True, tokens=True)
    (pair,) = measure_pairs([open_deltas(path) for path in files], Moments([query, table]))
    met = pair.whole.interference
    assert met is not None
    assert met.cosine is not None
    assert met.disturbed_first is not None
    assert met.disturbed_first_each is not None
    each = [one.measures.interference.cosine for one in pair.tensors if one.measures.interference is not None]
    least, largest = min(one for one in each if one is not None), max(one for one in each if one is not None)
    Moments([query, table]).save(tmp_path / "moments.safetensors")
    out = tmp_path / "report.html"
    assert 0 == run(*files, "--html", out, "--moments", tmp_path / "moments.safetensors")
    text = parsed(out.read_text("utf-8")).text
    assert (
        f"{met.cosine:+.3f} {least:+.3f} {largest:+.3f} {100 * met.disturbed_first:.3g} % (at each input {100 * met.disturbed_first_each:.3g} %)"
        in text
    )
    assert "collect their moments with shira-moments and pass them with --moments" not in text
    # Of another model they are refused before anything is written.
    Moments([Moment("other", np.ones((1, 1, 1, 1)), 1, 1)]).save(tmp_path / "others.safetensors")
    capsys.readouterr()
    assert 1 == run(*files, "--html", out, "--force", "--moments", tmp_path / "others.safetensors")
    assert (
        "the moments cover none of the adapted weights; they cover 'other', for example" in capsys.readouterr().err
    )
    assert text == parsed(out.read_text("utf-8")).text
    for wrong in ((files[0], "--html", out), (*files,)):
        with pytest.raises(SystemExit, match="2"):
            run(*wrong, "--moments", tmp_path / "moments.safetensors")


def test_words_on_pairs_that_add_up_or_cancel(tmp_path: Path) -> None:
    base = np.float32([1, 2, 3])
    for name, target in (("a", [2, 3, 4]), ("b", [2, 3, 5]), ("c", [0, 1, 2])):
        save(
            Adapter([SparseTensor("w", (3, 2), [0, 2, 5], np.float32(target), base=base)]), tmp_path / f"{name}.st"
        )
    save(Adapter([SparseTensor("v", (3, 2), [0], base[:1], base=base[1:2])]), tmp_path / "d.st")
    text = parsed(adapters_page([looked(tmp_path / f"{name}.st") for name in "abcd"])).text
    assert "The cosine of the two changes is -1.000: applied together, they partly cancel each other." in text
    assert (
        "Their signs agree at 100 % of the shared entries. The cosine of the two changes is +0.943: applied together, they amplify"
        in text
    )
    assert "a.st and d.st change no weight in common: they cannot interfere within a layer." in text


def test_adapters_of_two_bases_are_not_compared(tmp_path: Path, files: list[Path]) -> None:
    save(
        Adapter([SparseTensor(QUERY, (2, 2), [1], np.ones(1, np.float32), base=np.zeros(1, np.float32))]),
        tmp_path / "c.st",
    )
    text = parsed(adapters_page([looked(files[0]), looked(tmp_path / "c.st"), looked(files[1])])).text
    assert "a.st and c.st cannot be compared:" in text
    assert "c.st and b.st cannot be compared:" in text
    assert "these are not adapters of one base" in text
    # That spoils nothing for the others.
    assert "a.st and b.st both change 2 weights" in text
    assert "A₁ᵀA₂" in text


def test_what_is_not_known_of_one_spoils_nothing_for_others(tmp_path: Path, files: list[Path]) -> None:
    bad = SparseTensor(QUERY, (24, 16), [1, 5], np.float32([1, np.inf]), base=np.float32([0, 0]))
    save(Adapter([bad]), tmp_path / "bad.st")
    text = parsed(adapters_page([looked(path) for path in (*files, tmp_path / "bad.st")])).text
    assert (
        "Not all changes of bad.st are known (see above): only the positions of the entries are compared." in text
    )
    (pair,) = measure_pairs([open_deltas(path) for path in files])
    assert pair.whole.product is not None
    assert f"a.st and b.st {pair.whole.product.awor:.4f}" in text
    assert "a.st and bad.st both change 1 weight" in text


def test_many_pairs_have_their_tables_first(tmp_path: Path, files: list[Path]) -> None:
    random = np.random.default_rng(0)
    paths = [*files]
    base = np.float32([1, 2, 3])
    for number in range(3):
        target = random.standard_normal(3).astype(np.float32)
        made = SparseTensor("other.weight", (4, 4), [1, 5, 9 + number], target, base=base)
        save(Adapter([made]), tmp_path / f"{number}.st")
        paths.append(tmp_path / f"{number}.st")
    save(Adapter([SparseTensor(QUERY, (2, 2), [1], base[:1], base=base[1:2])]), tmp_path / "strange.st")
    source = adapters_page([looked(path) for path in (*paths, tmp_path / "strange.st")])
    text = parsed(source).text
    assert "a.st and strange.st cannot be compared:" in text
    assert "9 pairs of 15 change no weight in common, and are not in the tables." in text
    assert source.index("<table") < source.index("13 pairs in words")
    assert "0.st and 1.st both change 1 weight" in text
    table = source.split('<section id="pairs">')[1].split("</table>", maxsplit=1)[0]
    assert 1 + 4 == table.count("<tr>")


def test_deltas_need_no_base_to_be_measured(tmp_path: Path, capsys: Capture) -> None:
    save(
        Adapter([SparseTensor("w", (3, 2), [0, 5], np.float32([1, 2]), value_kind="delta")]),
        tmp_path / "deltas.st",
    )
    text = parsed(adapters_page([looked(tmp_path / "deltas.st")])).text
    assert "This adapter adds deltas to 2 of the 6 elements of 1 weight" in text
    assert "It can be scaled, measured and merged without the base" in text
    assert 0 == run(tmp_path / "deltas.st")
    shown = capsys.readouterr().out
    assert "undo            needs the base" in shown
    assert "scale, measure  from the file alone" in shown
    assert "in 1 tensor;" in shown


def test_what_one_tensor_has_is_all(tmp_path: Path) -> None:
    save(Adapter([SparseTensor("w", (3, 2), [0], np.float32([2]), base=np.float32([1]))]), tmp_path / "a.st")
    source = adapters_page([looked(tmp_path / "a.st")])
    assert "1e+02" not in source
    assert "<td>100 %</td>" in source


def test_without_the_base(tmp_path: Path, files: list[Path]) -> None:
    target = np.float32([2])
    needy = SparseTensor(QUERY, (24, 16), [1], target, base_digest=array_digest(target))
    loose = SparseTensor("wte.weight", (50, 24), [1], target, value_kind="delta")
    save(Adapter([needy, loose]), tmp_path / "needy.st")
    text = parsed(adapters_page([looked(tmp_path / "needy.st"), looked(files[0])])).text
    assert "The file does not hold the base's values. To undo it, keep the values that it overwrites" in text
    assert "The size of its changes is not shown" in text
    assert (
        "1 tensor (wte.weight) is without a digest of the base's values: a wrong base will not be detected" in text
    )
    assert "The file does not name its base model." in text
    assert "only the positions of the entries are compared" in text


def test_a_mask_and_a_patch(tmp_path: Path) -> None:
    save(
        Adapter([SparseTensor("w", (4, 4), [1, 5], value_kind="none")], manifest={"mask": {"rule": "rand"}}),
        tmp_path / "mask.st",
    )
    text = parsed(adapters_page([looked(tmp_path / "mask.st")])).text
    assert "This is a mask: it marks 2 of the 16 elements of 1 weight (12.5 %), and holds no values." in text
    assert "Its mask follows the rule rand." in text
    one = SparseTensor("w", (4, 4), [1], np.float32([1]), base_digest=array_digest(np.float32([0])))
    save(Adapter([one], manifest={"selection": {"rule": "exact"}}), tmp_path / "patch.st")
    text = parsed(adapters_page([looked(tmp_path / "patch.st")])).text
    assert "This is an exact patch: it sets every entry that differs between two checkpoints, 1 of the 16" in text
    assert "It holds the whole change." in text


def test_changes_that_cannot_be_measured(tmp_path: Path) -> None:
    bad = SparseTensor("w", (4, 4), [1, 5], np.float32([1, np.inf]), base=np.float32([0, 0]))
    save(Adapter([bad]), tmp_path / "a.st")
    text = parsed(adapters_page([looked(tmp_path / "a.st")])).text
    assert "A change cannot be measured: tensor 'w': the delta at flat index 5 is NaN or infinite." in text


def test_other_warnings(tmp_path: Path) -> None:
    full = SparseTensor("w", (2,), [0, 1], np.ones(2, np.float32), base=np.zeros(2, np.float32))
    none = SparseTensor("v", (2,), np.empty(0, np.int64), np.empty(0, np.float32), base=np.empty(0, np.float32))
    save(Adapter([full, none], manifest={"license": "MIT", "removed": ["old"]}), tmp_path / "a.st")
    one = looked(tmp_path / "a.st", base={"path": "my-model", "fits": False, "reasons": ["no 'w'", "no 'v'"]})
    assert [
        "It does not fit the base my-model: no 'w' (and 1 more).",
        "1 tensor (v) is without entries: nothing changes there.",
        "It sets 50\u00a0% of the elements: it is not sparse, and not much smaller than the weights.",
        "It removes tensors from the model: old.",
    ] == words.warnings(one)
    fits = looked(tmp_path / "a.st", base={"path": "my-model", "fits": True, "reasons": []}, verified=True)
    text = parsed(adapters_page([fits])).text
    assert "It fits my-model by names, shapes, dtypes" in text
    assert "all digests and rules" in text


def evil(folder: Path) -> Path:
    """A file whose every text is an attack."""
    made = SparseTensor(f"h.1.{EVIL}", (6, 4), [1, 7], np.ones(2, np.float32), base=np.zeros(2, np.float32))
    manifest = {
        "base_model": {"id": EVIL, "revision": EVIL},
        "source": {"kind": EVIL, "dialect": EVIL, "files": [{"name": EVIL}]},
        "selection": {"rule": EVIL, "scope": EVIL, "density": 0.5, "energy_kept": 0.1},
        "fit": {
            "method": EVIL,
            "kept": EVIL,
            "options": {"steps": EVIL},
            "inputs": {"fitted": 3, "name": EVIL},
            "effect": {
                "r2": 0.4,
                "low": EVIL,
                "high": None,
                "kl": True,
                "inputs": 2,
                "layers": {EVIL: 0.5, "x": EVIL},
            },
            "plain": EVIL,
        },
        "mask": {"rule": EVIL},
        "license": EVIL,
        "description": EVIL,
        "writer": EVIL,
        "removed": [EVIL],
    }
    path = folder / "<b>evil&.st"
    save(Adapter([made], dense=[DenseTensor(f"w{EVIL}", np.float32([1]))], manifest=manifest), path)
    return path


def test_text_of_strangers_is_text(tmp_path: Path) -> None:
    path = evil(tmp_path)
    source = adapters_page([looked(path), looked(path)])
    found = parsed(source)
    assert "<b>" not in source
    assert "\u202e" not in source
    assert found.text.count("<script>document.title='owned';fetch('http://example.org/')</script>") > 20
    assert 2 == sum(tag == "img" for tag, _ in found.tags)
    (policy,) = [
        a["content"] for tag, a in found.tags if tag == "meta" and "Content-Security-Policy" == a.get("http-equiv")
    ]
    assert (policy or "").startswith("default-src 'none';")


@given(strategies.adapters())
def test_any_adapter_has_a_page(adapter: Adapter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.st")
        save(adapter, path)
        one = looked(path)
        parsed(adapters_page([one, one]))


def test_names_are_shown_without_what_cannot_be_seen() -> None:
    assert "a&lt;b&gt; &amp; &quot;&#x27;\\n\\u202e\\ud800" == page.text("a<b> & \"'\n\u202e\ud800")


def run(*arguments: str | Path) -> int:
    return inspect.main([str(argument) for argument in arguments])


def test_the_command(files: list[Path], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "report.html"
    assert 0 == run(*files, "--html", out, "--verify", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert [str(path) for path in files] == [info["file"] for info in printed["files"]]
    text = parsed(out.read_text("utf-8")).text
    assert "Adapter report: 2 adapters" in text
    assert "Do they interfere with each other?" in text
    before = out.read_bytes()
    assert 1 == run(files[0], "--html", out)
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert before == out.read_bytes()
    assert 0 == run(files[0], "--html", out, "--force", "--include", "q_proj", "--sort", "name")
    shown = capsys.readouterr()
    assert f"{out}: written\n" == shown.err
    assert " 1 tensor tensor kind dtype" in parsed(out.read_text("utf-8")).text


def test_the_command_and_a_base(tmp_path: Path, capsys: Capture) -> None:
    base = np.arange(6, dtype=np.float32).reshape(3, 2)
    save_file({"w": base}, tmp_path / "base.safetensors")
    save_file({"w": base + 1}, tmp_path / "other.safetensors")
    one = SparseTensor("w", (3, 2), [1, 4], np.float32([5, 5]), base_digest=array_digest(np.float32([1, 4])))
    save(Adapter([one]), tmp_path / "a.st")
    out = tmp_path / "r.html"
    assert 0 == run(tmp_path / "a.st", "--html", out, "--base", tmp_path / "base.safetensors")
    text = parsed(out.read_text("utf-8")).text
    assert "The size of its changes is not shown" not in text
    assert "Of its energy, 100 % is in layers" in text
    assert 1 == run(tmp_path / "a.st", "--html", out, "--base", tmp_path / "other.safetensors", "--force")
    text = parsed(out.read_text("utf-8")).text
    assert "It does not fit the base" in text
    assert "The size of its changes is not shown" in text
    assert "does not fit: tensor 'w'" in capsys.readouterr().err


def test_one_call(files: list[Path]) -> None:
    """From Python: one file or several, and what the page says is what the command's says."""
    total: list[int] = []
    done: list[int] = []
    both = report(files, progress=done.append, on_start=total.append)
    assert both == adapters_page([looked(path) for path in files])
    assert sum(total) == sum(done)
    assert report(files[0]) == report(str(files[0])) == report([files[0]]) != both
    assert "h.0.q_proj" not in parsed(report(files[0], include=["wte"])).text
    with pytest.raises(FormatError):
        report(Path(__file__))


def test_a_damaged_file_writes_nothing(files: list[Path], tmp_path: Path, capsys: Capture) -> None:
    content = bytearray(files[0].read_bytes())
    content[-9] ^= 1
    files[0].write_bytes(content)
    before = sorted(tmp_path.iterdir())
    assert 1 == run(files[0], "--html", tmp_path / "r.html")
    out, err = capsys.readouterr()
    assert ("", 1) == (out, err.count("\n"))
    assert f"{files[0]}: tensor" in err
    assert before == sorted(tmp_path.iterdir())


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium to look at pages with: apt-get install chromium, or SHIRA_BROWSER")
    with browser.browser(program, tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(
    width: int, dark: bool, chromium: browser.Browser, files: list[Path], tmp_path: Path
) -> None:
    facts = [looked(path) for path in (*files, evil(tmp_path))]
    out = tmp_path / "report.html"
    out.write_text(adapters_page(facts), "utf-8")
    chromium.open(out, width, dark=dark)
    assert [] == chromium.complaints()
    assert [out.as_uri()] == chromium.requests()
    assert "Adapter report: 3 adapters" == chromium.value("document.title")
    assert 6 == chromium.value(
        "document.querySelectorAll('details').forEach(d => d.open = true) || document.querySelectorAll('details').length"
    )
    assert width == chromium.value("innerWidth")
    assert width == chromium.value("document.documentElement.scrollWidth")
    assert ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)") == chromium.value(
        "getComputedStyle(document.body).backgroundColor"
    )
    assert chromium.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    picture = chromium.picture()
    assert b"\x89PNG" == picture[:4]
    assert width == int.from_bytes(picture[16:20], "big")
    assert len(picture) > 20_000


def test_a_table_of_many_tensors_shows_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MOST_ROWS", 2)
    one = np.ones(3, np.float32)
    tensors = [SparseTensor(f"w{n}", (9,), np.arange(n), one[:n], base=one[:n] - 1) for n in (1, 3, 2)]
    dense = [DenseTensor(f"d{n}", one[:n], base=one[:n] - 1) for n in (1, 3, 2)]
    save(Adapter(tensors, dense=dense), tmp_path / "a.st")
    text = report(tmp_path / "a.st")
    assert "The 2 with the most entries are shown; shira-inspect --json lists all 3." in text
    assert "The 2 of the most bytes are shown; shira-inspect --json lists all 3." in text
    rows = [
        name
        for name in ("w1", "w3", "w2", "d1", "d3", "d2")
        if f'<tr><td><code class="name">{name}</code>' in text
    ]
    assert ["w3", "w2", "d3", "d2"] == rows


def test_of_very_many_tensors_the_same_sample_of_all_files_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_files, "MOST_MEASURED", 2)
    one = np.ones(9, np.float32)
    for name, sizes in (("a.st", (1, 5, 2, 3)), ("b.st", (4, 1, 1, 3))):
        tensors = [
            SparseTensor(f"w{at}", (9,), np.arange(n), one[:n], base=one[:n] - 1) for at, n in enumerate(sizes)
        ]
        save(Adapter(tensors), tmp_path / name)
    seen: list[int] = []
    text = report([tmp_path / "a.st", tmp_path / "b.st"], progress=seen.append)
    assert "4 of 8 tensors were measured: a sample of all sizes, with the largest." in text
    measured = [name for name in ("w0", "w1", "w2", "w3") if f'<tr><td><code class="name">{name}</code>' in text]
    assert ["w1", "w3"] == measured  # by the larger of both files: w1 5, w0 4, w3 3, w2 2
    assert 2 + 2 + 2 == sum(seen)
    assert "sets 11 of the 36 elements of 4 weights" in text  # of all tensors
    assert "were measured" not in report(tmp_path / "a.st", include=["w[01]"])
