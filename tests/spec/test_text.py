"""SPEC.md holds what it says: its worked examples, its rules and its schema are read from the page and checked."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import shira_format
from shira_format._core.dtypes import DTYPES, FLOATS
from shira_format.convert.fit.quality import Effect
from shira_format.convert.fit.report import FitReport
from shira_format.convert.report import ConversionReport
from shira_format.format.codecs import BLOCK_SIZE, CODECS, Encoded
from shira_format.format.codecs.gaps import gaps_of
from shira_format.format.codecs.magnitude import largest
from shira_format.format.codecs.seeded import Permutation
from shira_format.format.codecs.structured import list_pattern
from shira_format.format.manifest import FEATURES
from spec import reader, run_vectors

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "spec" / "SPEC.md").read_text("utf-8")
SCHEMA = json.loads((ROOT / "spec" / "manifest.schema.json").read_text("utf-8"))


def section(number: str) -> str:
    """The text under a heading, up to the next heading of any level."""
    found = re.search(rf"^#+ {re.escape(number)}[. ].*?$(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, number
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows but the headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {i for i, line in enumerate(lines) if i + 1 < len(lines) and set(lines[i + 1]) <= set("|- ")}
    body = [line for i, line in enumerate(lines) if i not in heads and not set(line) <= set("|- ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def rules(of: str = "file|tensor|applying") -> set[str]:
    """The rules of section 10, of all its tables or of some."""
    tables = re.findall(
        rf"^\| rules of (?:the |a )?(?:{of}) \|.*?(?=^$|\Z)", section("10"), re.MULTILINE | re.DOTALL
    )
    return set(re.findall(r"`([a-z0-9-]+)`", "\n".join(tables)))


# Sections 5.1, 5.2 and 5.4


GAP_EXAMPLES: list[tuple[str, tuple[int, ...], list[str]]]
GAP_EXAMPLES = [("gap8", (4, 300), row) for row in rows(section("5.1"))]
GAP_EXAMPLES += [("varint", (1099511627776,), row) for row in rows(section("5.2"))]


def test_the_examples_are_found() -> None:
    assert [5, 3] == [sum(codec == name for codec, *_ in GAP_EXAMPLES) for name in ("gap8", "varint")]
    assert "indices, in shape `[4, 300]`" in section("5.1")
    assert "indices, in shape `[1099511627776]`" in section("5.2")


@pytest.mark.parametrize(("codec", "shape", "row"), GAP_EXAMPLES)
def test_examples_of_the_gap_codecs(codec: str, shape: tuple[int, ...], row: list[str]) -> None:
    indices = np.array(numbers(row[0]), np.int64)
    assert numbers(row[1]) == gaps_of(indices).tolist()
    encoded = CODECS[codec].encode(indices, shape, BLOCK_SIZE)
    assert encoded.stream is not None
    assert row[2].strip("`") == encoded.stream.tobytes().hex()
    stream = np.frombuffer(bytes.fromhex(row[2].strip("`")), np.uint8)
    assert indices.tolist() == CODECS[codec].decode(Encoded(encoded.params, stream), shape, indices.size).tolist()
    item = {"nnz": indices.size, "shape": list(shape), "indices": {"codec": codec}}
    assert indices.tolist() == reader.decode_gaps(item, memoryview(stream.tobytes()), None)


def parts(text: str) -> list[dict[str, Any]]:
    found = []
    for part in text.split(";"):
        kind = part.split(",")[0].strip()
        found.append(
            {"kind": kind} | {key: int(value) for key, value in re.findall(r"(step|offset) (-?\d+)", part)}
        )
    return found


PATTERN_EXAMPLES = [row for row in rows(section("5.4")) if row[0].startswith("`[")]


@pytest.mark.parametrize("row", PATTERN_EXAMPLES)
def test_examples_of_patterns(row: list[str]) -> None:
    shape, indices = tuple(numbers(row[0])), numbers(row[2])
    assert indices == list_pattern(parts(row[1]), shape, len(indices)).tolist()
    item = {
        "shape": list(shape),
        "nnz": len(indices),
        "indices": {"codec": "structured", "pattern": parts(row[1])},
    }
    assert indices == reader.list_pattern(item)
    assert indices == sorted(set(indices))


RUN_EXAMPLES = rows(section("5.6"))


@pytest.mark.parametrize("row", RUN_EXAMPLES)
def test_examples_of_runs(row: list[str]) -> None:
    shape, indices = tuple(numbers(row[0])), numbers(row[2])
    length, low = numbers(row[1])
    starts = np.array([index for index in indices if index % length == 0])
    assert numbers(row[3]) == gaps_of(starts // length).tolist()
    stream = np.frombuffer(bytes.fromhex(row[4].strip("`")), np.uint8)
    params = {"codec": "runs", "length": length, "low": low}
    assert indices == CODECS["runs"].decode(Encoded(params, stream), shape, len(indices)).tolist()
    item = {"nnz": len(indices), "shape": list(shape), "indices": params}
    assert indices == reader.decode_runs(item, memoryview(stream.tobytes()))


def test_the_examples_of_runs_are_found() -> None:
    assert 3 == len(RUN_EXAMPLES)


DRAWN = rows(section("5.7"))


@pytest.mark.parametrize("row", DRAWN)
def test_examples_of_permutations(row: list[str]) -> None:
    seed, size, expected = row[0].strip("`"), int(row[1]), numbers(row[2])
    assert expected == [reader.permuted(seed, size, number) for number in range(len(expected))]
    assert expected == Permutation(seed, size).of(np.arange(len(expected))).tolist()


RANKED = rows(section("5.8"))


@pytest.mark.parametrize("row", RANKED)
def test_examples_of_magnitudes(row: list[str]) -> None:
    base = np.frombuffer(bytes.fromhex(row[1].strip("`")), FLOATS["BF16"])
    assert ["1", "-3", "0", "3", "nan", "-0"] == [f"{value:g}" for value in base.astype(float)]
    nnz, band = numbers(row[2])
    assert numbers(row[3]) == largest(base, nnz, band).tolist()


def test_the_examples_of_implied_indices_are_found() -> None:
    assert (3, 2) == (len(DRAWN), len(RANKED))


def test_the_example_of_the_coder() -> None:
    table = rows(section("5.10.3"))
    parts_of, decoded = table[:4], table[4:]
    stream = bytes.fromhex("".join(row[0].strip("`") for row in parts_of))
    item = {"shape": [2, 6], "nnz": 4}
    assert [0, 1, 5, 11] == reader.decode_classes(item, memoryview(stream), None)
    data = (run_vectors.VECTORS / "good" / "compact-of-page.st").read_bytes()
    assert stream in data
    front = reader.Front(memoryview(stream))
    assert (1, 12, 0) == (front.split, front.take(6), front.take(1))
    assert [0, 1] == front.bounds()
    places = front.table()
    frequencies = {token: frequency for token, frequency, _ in places}
    assert [768, 1792, 0, 0, 768, 768] == [frequencies.get(token, 0) for token in range(6)]
    assert [4] == front.counts(1, 1)
    block = reader.Block(front.blocks[0], front.split)
    assert "`x = 0x0c5a5500`" in parts_of[3][1]
    assert 0x0C5A5500 == block.x
    for row in decoded:
        assert int(row[0]) == block.x % 4096
        assert int(row[1]) == places[block.x % 4096][0]
        assert int(row[3]) == block.number(places)
        assert row[4].strip("`") == f"{block.x:#010x}"
    block.end()
    assert 5 == len(decoded)


def test_the_example_of_a_flat_index() -> None:
    assert "`[4, 300]` has element `(2, 5)` at flat index 605" in " ".join(section("1").split())
    assert 605 == np.ravel_multi_index((2, 5), (4, 300))
    assert 3 == len(PATTERN_EXAMPLES)


# Section 3.5


PATCH_EXAMPLES = rows(section("3.5"))


def test_the_examples_of_a_patch_are_found() -> None:
    assert ["3", "2", "1"] == [row[0] for row in PATCH_EXAMPLES]


@pytest.mark.parametrize("row", PATCH_EXAMPLES, ids=lambda row: f"rows {row[0]}")
def test_examples_of_a_patch(row: list[str]) -> None:
    file = run_vectors.VECTORS / "good" / "patch-of-page.st"
    tensor = shira_format.load(file)[f"rows.{row[0]}"]
    further = [] if tensor.new_rows is None else tensor.new_rows.astype(float).ravel().tolist()
    assert further == numbers(row[1])
    base = np.array([1, 2, 3, 4], tensor.dtype)
    assert hashlib.sha256(base[tensor.indices].tobytes()).hexdigest() == tensor.base_digest
    base[tensor.indices] = tensor.values
    result = np.append(base[: 2 * int(row[0])], np.array(further, tensor.dtype))
    assert result.astype(float).tolist() == numbers(row[2])
    assert result.tobytes().hex() == row[3].strip("`")
    assert hashlib.sha256(result.tobytes()).hexdigest() == tensor.result_digest
    items = {item["name"]: item for item in reader.read(str(file))["tensors"]}
    assert items[tensor.name]["result_digest"] == tensor.result_digest


# Appendix A


def test_the_whole_file_of_the_appendix() -> None:
    header = re.findall(r"^```json\n(.*?)\n```", TEXT, re.MULTILINE | re.DOTALL)
    buffer = re.findall(r"^```hex\n(.*?)\n```", TEXT, re.MULTILINE | re.DOTALL)
    assert (1, 1) == (len(header), len(buffer))
    text, data = header[0].encode(), bytes.fromhex(buffer[0])
    padded = text + b" " * (-len(text) % 8)
    file = len(padded).to_bytes(8, "little") + padded + data
    assert (run_vectors.VECTORS / "good" / "example.st").read_bytes() == file
    appendix = TEXT.split("## Appendix A")[1]
    assert f"The file has {len(file)} bytes." in appendix
    assert f"`N` = {len(padded)}" in appendix
    assert f"| {len(text)} bytes |" in appendix
    assert f"bytes {8 + len(padded)} to {len(file) - 1} of the file" in appendix
    for offset, cell, *_ in rows(appendix):
        if cell.startswith("`"):
            piece = bytes.fromhex(cell.strip("`"))
            assert piece == file[int(offset) : int(offset) + len(piece)]
    manifest = json.loads(json.loads(text)["__metadata__"]["shira"])
    digests = manifest["tensors"][0]["digests"]
    assert {
        "values": hashlib.sha256(bytes.fromhex("803f00c0003f4940")).hexdigest(),
        "indices": hashlib.sha256(bytes.fromhex("0000feffffffb1")).hexdigest(),
        "base": hashlib.sha256(bytes.fromhex("003f80bf803e4040")).hexdigest(),
    } == digests
    assert ["0000feffffffb1", "803f00c0003f4940"] == [buffer[0][:14], buffer[0][14:]]
    metadata = json.loads(text)["__metadata__"]
    assert metadata["shira_digest"] == hashlib.sha256(metadata["shira"].encode()).hexdigest()
    tensor = shira_format.load(run_vectors.VECTORS / "good" / "example.st")["w"]
    assert [1.0, -2.0, 0.5, 3.140625] == tensor.values.astype(float).tolist()
    for number in (*tensor.values.astype(float), 942):
        assert f"{number:g}"[:8] in appendix


# Rules, dtypes, features


def test_every_rule_has_a_bad_vector_and_every_bad_vector_a_rule() -> None:
    bad = {run_vectors.expected_rule(file) for file in run_vectors.vectors(only="^bad/")}
    assert rules("file|tensor") == bad
    assert 30 <= len(rules("file|tensor"))
    refused = {json.loads(file.read_text("utf-8")).get("refused") for file in run_vectors.cases()}
    assert rules("applying") | {None} == refused


def test_every_rule_of_the_text_is_listed() -> None:
    assert set(re.findall(r"[Rr]ules? `([a-z0-9-]+)`", TEXT)) <= rules()


@pytest.mark.parametrize(
    ("folder", "call"),
    [("shira_format", r"FormatError\(\s*"), ("spec", r"Refused\(\s*"), ("spec", r"Expected\(.*\], ")],
)
def test_every_rule_that_is_raised_is_listed(folder: str, call: str) -> None:
    raised: set[str] = set()
    for file in sorted((ROOT / folder).rglob("*.py")):
        if file.name not in {"make_vectors.py", "run_vectors.py"}:
            raised |= set(re.findall(call + r'"([a-z0-9-]+)"', file.read_text("utf-8")))
    assert raised
    assert raised <= rules()


def test_the_library_raises_every_rule() -> None:
    text = "\n".join(file.read_text("utf-8") for file in (ROOT / "shira_format").rglob("*.py"))
    ours = rules("file|tensor")
    assert ours == {rule for rule in ours if f'"{rule}"' in text}


def test_the_table_of_dtypes() -> None:
    table = section("2").split("Table 1")[1]
    found: dict[str, int] = {}
    floats: set[str] = set()
    for left, size, right, right_size in rows(table):
        floats |= set(re.findall(r"`(\w+)`", left))
        found |= dict.fromkeys(re.findall(r"`(\w+)`", left), int(size))
        found |= dict.fromkeys(re.findall(r"`(\w+)`", right), int(right_size))
    assert found == {name: dtype.itemsize for name, dtype in DTYPES.items()}
    assert floats == set(FLOATS)
    assert found == reader.SIZES


def test_codecs_and_features_are_those_of_the_page() -> None:
    codecs = {row[0].strip("`") for row in rows(section("5"))}
    assert codecs == {*CODECS, "shared"}
    features = {row[0].strip("`") for row in rows(section("9")) if row[1] != "reserved"}
    assert features == FEATURES == run_vectors.FEATURES


# The schema


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def manifest_of(file: Path) -> Any:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + size])["__metadata__"]["shira"]
    return json.loads(text, parse_int=reader.integer)  # some bad files hold numbers of 5000 digits


@pytest.mark.parametrize("file", run_vectors.vectors(only="^good/"), ids=lambda file: file.stem)
def test_the_schema_accepts_good_vectors(file: Path) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest_of(file))


def provenance() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"$ref": "#/$defs/provenance", "$defs": SCHEMA["$defs"]})


def test_the_schema_knows_the_provenance_of_the_text() -> None:
    keys = [key for row in rows(section("7")) for key in re.findall(r"`(\w+)`", row[0])]
    assert set(keys) == SCHEMA["$defs"]["provenance"]["properties"].keys()
    fit = next(row[1] for row in rows(section("7")) if row[0] == "`fit`")
    named = {
        *SCHEMA["$defs"]["provenance"]["properties"]["fit"]["properties"],
        *SCHEMA["$defs"]["effect"]["properties"],
    }
    assert named <= set(re.findall(r"`(\w+)`", fit))


def test_the_schema_knows_what_fits_say() -> None:
    near = Effect(0.9, 0.8, 0.95, 0.01, 0.97, None, {"layers.0": float("nan")}, 300)
    report = FitReport(
        "distill", ConversionReport(), near, near, near, "fit", 1000, {"seed": 0}, {"texts": 16}, {"keep": 0.9}
    )
    provenance().validate(json.loads(json.dumps({"fit": report.provenance(), "selection": {"rule": "fit"}})))
    assert not provenance().is_valid({"fit": {"kept": "both"}})


def test_the_schema_refuses_most_vectors_that_are_bad_by_it() -> None:
    """It cannot tell 4.0 from 4, count bytes, compare numbers or know which names point where: that is the readers' work."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    files = [f for f in run_vectors.vectors(only="^bad/manifest-schema--") if "in-mask-file" not in f.stem]
    left = [file.stem.split("--")[1] for file in files if validator.is_valid(manifest_of(file))]
    assert len(files) - len(left) > 100, left
    known = r"-float|-line-feed|version-1\.0n|no-digest-(blocks|rows)|mask-files-of-another-name|seed-long-utf-8"
    known += "|nnz-(exponent|minus-zero)|256-bytes-of-128|in-two-cases"
    assert [] == [name for name in left if not re.search(known, name)]
    for file in run_vectors.vectors(only="^bad/(digest-mismatch|unsorted|varint|out-of-range)--"):
        validator.validate(manifest_of(file))
