"""The manifest's parser: what it keeps, what it refuses and how it says so. The vectors hold the full list."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shira_format.errors import FormatError, ShiraError
from shira_format.format import manifest as parsing
from shira_format.format.items import check_name, stream_name
from shira_format.format.manifest import parse_manifest

HEX = "0" * 64
MINIMAL: dict[str, Any] = {"format_version": "1.0", "features": [], "digest": "sha256", "tensors": []}
TENSOR: dict[str, Any] = {
    "name": "w",
    "shape": [4, 30],
    "dtype": "BF16",
    "nnz": 20,
    "values": "target",
    "indices": {"codec": "gap8", "block_size": 16},
    "digests": {"indices": HEX, "blocks": HEX, "values": HEX, "base": HEX},
}


def manifest(*tensors: Any, **changes: Any) -> str:
    return json.dumps(MINIMAL | {"tensors": list(tensors)} | changes)


def patched(*tensors: Any, **changes: Any) -> str:
    return manifest(*tensors, features=["patch"], **changes)


def tensor(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(TENSOR) | changes


def refused(text: str) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parse_manifest(text)
    return caught.value


def test_streams_follow_from_the_manifest() -> None:
    whole: list[Any] = [{"name": "b", "shape": [2], "dtype": "I8", "digests": {"values": HEX}}]
    whole += [
        {"name": "c", "shape": [], "dtype": "F64", "digests": {"values": HEX, "base": HEX}, "base_values": True}
    ]
    tensors = [
        tensor(base_values=True),
        tensor(name="v", nnz=16),
        tensor(name="n", values="none", digests={"indices": HEX, "blocks": HEX}),
        tensor(name="f", indices={"codec": "flat"}),
        tensor(name="s", indices={"codec": "structured", "pattern": []}, values="delta"),
        tensor(name="h", indices={"codec": "shared", "tensor": "w"}),
    ]
    found = parse_manifest(manifest(*tensors, whole=whole))
    expected = ["w#indices", "w#blocks", "w#values", "w#base", "v#indices", "v#values", "n#indices", "n#blocks"]
    expected += ["f#indices", "f#values", "s#values", "h#values", "b", "c", "c#base"]
    assert expected == list(found.stream_names())
    assert ["w", "v", "n", "f", "s", "h"] == list(found.tensors)
    assert ["b", "c"] == list(found.whole)
    assert ["gap8", "flat"] == [found.tensors[name].codec for name in "wf"]
    assert "w#base" == stream_name("w", "base")


def test_what_a_patch_says() -> None:
    digests = TENSOR["digests"] | {"rows": HEX, "result": HEX}
    found = parse_manifest(
        patched(
            tensor(rows=7, digests=digests, **{"from": "v"}), tensor(name="v", rows=2, **{"from": "w"}), tensor(name="s", rows=4),
            tensor(name="p"), removed=["x", "y"],
        )
    )  # fmt: skip
    tensors = found.tensors.values()
    assert ["v", "w", "s", "p"] == [tensor.base_name for tensor in tensors]
    assert [7, 2, 4, None] == [tensor.rows for tensor in tensors]
    assert [3, 0, 0, 0] == [tensor.new_rows for tensor in tensors]
    assert [(7, 30), (2, 30), (4, 30), (4, 30)] == [tensor.result_shape for tensor in tensors]
    assert [True, True, True, False] == [tensor.is_patch for tensor in tensors]
    assert ("x", "y") == found.removed
    assert ["w#rows"] == [name for name in found.stream_names() if name.endswith("#rows")]
    assert () == parse_manifest(manifest(removed=[])).removed


def test_raw_keeps_what_nobody_knows() -> None:
    text = manifest(tensor(x=[1, {"y": None}]), x={"z": 1.5}, format_version="1.99")
    found = parse_manifest(text)
    assert json.loads(text) == found.raw
    assert [1, {"y": None}] == found.tensors["w"].raw["x"]


@pytest.mark.parametrize("digits", [1, 39, 100, 400])
def test_long_numbers_are_kept(digits: int) -> None:
    for number in (10**digits - 1, 1 - 10 ** (digits - 1)):
        assert number == parse_manifest(manifest(x=number)).raw["x"]


def test_numbers_of_any_length_are_parsed() -> None:
    assert parse_manifest(manifest(x="@").replace('"@"', "9" * 5000)).raw["x"] > 2**1000


@pytest.mark.parametrize(
    ("text", "rule", "words"),
    [
        ("", "manifest-json", "does not start with"),
        ("{1}", "manifest-json", "invalid JSON"),
        ("[]", "manifest-json", "does not start with"),
        ("{} \n", "manifest-json", "other than spaces"),
        ('{"a":1,"a":2}', "manifest-json", "'a' occurs twice"),
        ('{"a":NaN}', "manifest-json", "NaN is not JSON"),
        ('{"a":' * 100_000 + "}", "manifest-json", ""),
        ('{"a":"\ud800"}', "manifest-json", "surrogates"),
        ("{}", "manifest-schema", "'format_version' is missing"),
        (manifest(format_version=1), "manifest-schema", "'format_version' is not of type str"),
        (manifest(format_version="2.0", features=3), "unknown-major", "format version 2.0"),
        (manifest(features=["zstd", "mask-file"]), "unknown-feature", "'zstd'"),
        (manifest(features=["mask-file"] * 2), "manifest-schema", "twice"),
        (manifest(digest="md5"), "unknown-digest", "'md5'"),
        (manifest(3), "manifest-schema", "not an object"),
        (manifest(tensor(dtype="I8")), "sparse-dtype", "'I8'"),
        (manifest(tensor(nnz=121)), "count-mismatch", "nnz 121 in a tensor of 120"),
        (manifest(tensor(nnz=True)), "manifest-schema", "'nnz' is not of type int"),
        (manifest(tensor(shape=[2**27, 2**26])), "shape-overflow", "2^53 - 1"),
        (manifest(tensor(indices={"codec": "zip"})), "unknown-codec", "'zip'; known: gap8, varint, structured"),
        (manifest(tensor(digests={"values": HEX})), "manifest-schema", "digests lack base, blocks, indices"),
        (manifest(tensor(values="none", base_values=True)), "manifest-schema", "lack|a mask with values"),
        (manifest(tensor(values="none")), "manifest-schema", "a mask with values"),
        (manifest(tensor(), tensor()), "duplicate-name", "'w' occurs twice"),
        (manifest(alpha=None), "manifest-schema", "'alpha' is not a finite number"),
        (manifest(alpha=10**400), "manifest-schema", "'alpha' is not a finite number"),
        (manifest(alpha="@").replace('"@"', "1e999"), "manifest-schema", "'alpha' is not a finite number"),
        (manifest(components={"a/b": {}}), "manifest-schema", "'a/b' cannot name a component"),
        (manifest(components={"..": {}}), "manifest-schema", "'..' cannot name a component"),
        (manifest(components={"unet": {}, "UNet": {}}), "manifest-schema", "in case alone"),
        (manifest(tensor(), components={"unet": {}}), "component", "['unet']"),
        (manifest(mask_files={"../x": HEX}), "manifest-schema", "'../x' cannot name a mask file"),
        (manifest(tensor(**{"from": "v"})), "manifest-schema", "without the feature 'patch'"),
        (manifest(tensor(rows=4)), "manifest-schema", "without the feature 'patch'"),
        (manifest(removed=["v"]), "manifest-schema", "without the feature 'patch'"),
        (patched(tensor(**{"from": 3})), "manifest-schema", "'from' is not of type str"),
        (patched(tensor(**{"from": ""})), "name", ""),
        (patched(tensor(**{"from": "a\n"})), "name", ""),
        (patched(tensor(rows=-1)), "manifest-schema", "rows -1"),
        (patched(tensor(rows=True)), "manifest-schema", "rows True"),
        (patched(tensor(rows=None)), "manifest-schema", "rows None"),
        (patched(tensor(rows=2**52)), "shape-overflow", "2^53 - 1"),
        (patched(tensor(rows=5)), "manifest-schema", "digests lack rows"),
        (
            patched(tensor(rows=5, digests=TENSOR["digests"] | {"rows": "x"})),
            "manifest-schema",
            "the digest of rows",
        ),
        (
            patched(tensor(rows=4, values="none", digests={"indices": HEX, "blocks": HEX})),
            "manifest-schema",
            "rows 4",
        ),
        (patched(tensor(digests=TENSOR["digests"] | {"result": "x"})), "manifest-schema", "the digest of result"),
        (
            manifest(tensor(values="delta", digests=TENSOR["digests"] | {"result": HEX})),
            "manifest-schema",
            "result digest without target",
        ),
        (patched(removed="v"), "manifest-schema", "'removed' is not of type list"),
        (patched(removed=[1]), "manifest-schema", "'removed' is not a list of strings"),
        (patched(removed=["\t"]), "name", ""),
        (patched(removed=["v", "v"]), "duplicate-name", "'v' occurs twice"),
        (patched(tensor(), removed=["w"]), "duplicate-name", "'w' occurs twice"),
        (patched(tensor(name="unet/w", **{"from": "w"}), components={"unet": {}}), "component", "['unet']"),
        (patched(removed=["w"], components={"unet": {}}), "component", "['unet']"),
    ],
)
def test_refusals_say_what_and_where(text: str, rule: str, words: str) -> None:
    error = refused(text)
    assert rule == error.rule
    assert any(word in error.reason for word in words.split("|"))
    assert "\n" not in str(error)
    assert str(error).endswith(f"(rule: {rule})")


@pytest.mark.parametrize(
    ("indices", "rule"),
    [
        ({"codec": "shared", "tensor": "x"}, "shared-target"),
        ({"codec": "shared", "tensor": "v"}, "shared-target"),
        ({"codec": "shared", "tensor": "w", "file": "m"}, "manifest-schema"),
        ({"codec": "shared"}, "manifest-schema"),
    ],
)
def test_shared_indices_need_a_tensor(indices: dict[str, Any], rule: str) -> None:
    error = refused(manifest(tensor(), tensor(name="v", indices=indices)))
    assert (rule, "v") == (error.rule, error.tensor)


@pytest.mark.parametrize("key", ["energy_kept", "relative_error"])
@pytest.mark.parametrize("value", ["1e999", "null", '"1"', "true", "9" * 400])
def test_provenance_of_another_form_is_left_out(key: str, value: str) -> None:
    text = manifest(tensor(**{key: "@"}), selection={key: "@", "rule": "top-k"}).replace('"@"', value)
    found = parse_manifest(text)
    assert {"rule": "top-k"} == found.raw["selection"]
    assert key not in found.tensors["w"].raw


def test_provenance_is_left_out_piece_by_piece() -> None:
    files = [{"name": "a", "digest": "b", "x": 1}]
    found = parse_manifest(
        manifest(
            base_model={"id": 5, "revision": "r", "files": files, "x": [1]}, source=[], mask={"rule": "rand", "seed": "7"},
            selection={"include": "*", "exclude": ["a"], "top_k": -1, "density": 1}, license=None, writer="w",
            components={"unet": {"base_model": {"id": "a", "files": [{}]}}},
        )
    ).raw  # fmt: skip
    assert {"revision": "r", "files": files, "x": [1]} == found["base_model"]
    assert {"exclude": ["a"], "density": 1} == found["selection"]
    assert {"unet": {"base_model": {"id": "a"}}} == found["components"]
    assert ({"rule": "rand"}, "w") == (found["mask"], found["writer"])
    assert not {"source", "license"} & found.keys()


def test_the_digest_is_of_the_text() -> None:
    text = manifest(tensor(), x="é")
    right = hashlib.sha256(text.encode()).hexdigest()
    assert ["w"] == list(parse_manifest(text, right).tensors)
    for wrong in ("", right.upper(), right[:-1], HEX):
        with pytest.raises(FormatError) as caught:
            parse_manifest(text, wrong)
        assert "manifest-digest" == caught.value.rule
    with pytest.raises(FormatError) as caught:  # what must be understood first is named first
        parse_manifest(manifest(format_version="2.0"), "")
    assert "unknown-major" == caught.value.rule


def test_digests_of_roles_that_whole_tensors_have_not_are_unknown_keys() -> None:
    whole = [{"name": "b", "shape": [], "dtype": "I8", "digests": {"values": HEX, "indices": 3}}]
    assert ["b"] == list(parse_manifest(manifest(whole=whole)).whole)


@pytest.mark.parametrize(
    "name", ["w", "é" * 512, "x" * 1024, "a/b", "#", "\u0080", "\u2028", " ", "__metadata__2"]
)
def test_names(name: str) -> None:
    check_name(name, None)


def test_names_of_components() -> None:
    check_name("unet/a/b", {"unet": {}})
    for name in ("unet", "unet/", "/unet", "vae/x", "x"):
        with pytest.raises(FormatError) as caught:
            check_name(name, {"unet": {}})
        assert "component" == caught.value.rule


def test_where_an_error_happened_is_told_once() -> None:
    error = FormatError("name", "it is bad")
    assert "it is bad (rule: name)" == str(error)
    assert error is error.at(file=Path("a.st"), tensor="w")
    assert "a.st: tensor 'w': it is bad (rule: name)" == str(error)
    assert "a.st: tensor 'w': it is bad (rule: name)" == str(error.at(file=Path("b.st"), tensor="v"))
    assert isinstance(error, ShiraError)
    assert isinstance(error, ValueError)


# Values for the keys of an item: what may be there, and what may not.
ODD: list[Any] = [None, True, 0, 1, 1.0, -1, "", "w", "BF16", HEX, [], [1], {}, {"codec": "flat"}]
VALUES: dict[str, list[Any]] = {
    "name": ["v", "a/b", "v#values", "__metadata__", "x" * 300, "\n", "é"],
    "shape": [[4, 30], [120], [0, 3], [2.0, 60], [True, 120], [-4, -30], [1] * 65, [2**60], [10**400]],
    "dtype": ["F32", "I8"],
    "nnz": [10, 16, 20, 121, 20.0, True],
    "values": ["delta", "none", "other"],
    "indices": [
        {"codec": "gap8", "block_size": 16}, {"codec": "gap8", "block_size": 16.0}, {"codec": "gap8", "block_size": True},
        {"codec": "varint"}, {"codec": "shared", "tensor": "w"}, {"codec": "shared", "tensor": "u"}, {"codec": "shared"},
        {"codec": "shared", "tensor": "w", "file": "m.st"}, {"codec": "shared", "tensor": "w", "file": None},
        {"codec": "random", "seed": "0 w"}, {"codec": "random", "seed": 1}, {"codec": "random", "seed": "0" * 5000},
        {"codec": "classes", "base": True}, {"codec": "classes"}, {"codec": "structured", "pattern": []}, {"codec": "zip"},
    ],
    "digests": [TENSOR["digests"], TENSOR["digests"] | {"entries": HEX}, TENSOR["digests"] | {"values": "A" * 64}, {"values": HEX}],
    "base_values": [True, False, 1],
    "coding": [{}, {"values": {"codec": "floats"}}, {"values": {"codec": "floats", "dtype": "F32"}}, {"base": {"codec": "x"}}],
    "from": ["w", "u"],
    "rows": [4, 7],
    "energy_kept": [0.5, "much"],
}  # fmt: skip


@st.composite
def items_of_manifests(draw: st.DrawFn) -> list[Any]:
    found: list[Any] = [tensor(name=name) for name in draw(st.lists(st.sampled_from("wwuvst"), max_size=4))]
    for _ in range(draw(st.integers(0, 3)) if found else 0):
        item, key = draw(st.sampled_from(found)), draw(st.sampled_from(sorted(VALUES)))
        item[key] = copy.deepcopy(draw(st.sampled_from(VALUES[key]) | st.sampled_from(ODD)))
        if draw(st.integers(0, 9)) == 0:
            del item[draw(st.sampled_from(sorted(item)))]
    return found


@given(
    items=items_of_manifests(),
    features=st.sampled_from(
        [[], ["patch"], ["mask-file"], ["compact"], ["compact", "random", "patch", "mask-file"]]
    ),
    more=st.sampled_from([{}, {"components": {"a": {}}}, {"mask_files": {"m.st": HEX}}, {"removed": ["v"]}]),
    whole=st.sampled_from([[], [{"name": "w#values", "shape": [2], "dtype": "F32", "digests": {"values": HEX}}]]),
)
@example([tensor(base_values=True), tensor(name="v", base_values=1)], [], {}, [])
@example([tensor(), tensor(name="v", nnz=10, digests=TENSOR["digests"]), tensor(name="u", nnz=121)], [], {}, [])
@example([tensor(), tensor(name="v", indices={"codec": "gap8", "block_size": 16.0})], [], {}, [])
def test_items_looked_at_together_are_those_looked_at_one_by_one(
    items: list[Any], features: list[str], more: dict[str, Any], whole: list[Any]
) -> None:
    text = manifest(*items, features=features, whole=whole, **more)

    def outcome() -> Any:
        try:
            found = parse_manifest(text)
        except FormatError as error:
            return str(error)
        return dict(found.tensors), list(found.stream_names()), found.nnz, found.raw, found.removed

    together = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "alike", lambda raw: None)
        assert outcome() == together


def test_usual_items_are_looked_at_together() -> None:
    compact = {"features": ["compact", "random"], "format_version": "1.1"}
    entries = TENSOR["digests"] | {"entries": HEX}
    text = manifest(
        tensor(), tensor(name="v", nnz=19, shape=[7, 7, 7]), tensor(name="u", base_values=True), tensor(name="t", energy_kept=0.5),
        tensor(name="s", indices={"codec": "shared", "tensor": "w"}), tensor(name="q", coding={"base": {"codec": "floats"}}, base_values=True),
        *(tensor(name=name, indices={"codec": "random", "seed": f"0 {name}"}, digests=entries) for name in "ab"), **compact,
    )  # fmt: skip
    kinds = parse_manifest(text).kinds
    assert kinds is not None
    assert [["w", "v", "t"], ["u"], ["s"], ["q"], ["a", "b"]] == [kind.names for kind in kinds]
