"""Provenance (spec, section 7): it informs people, and never decides whether or how a file is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from shira_format._core.strict_json import is_uint
from shira_format.errors import FormatError
from shira_format.format.fields import is_finite

# What a value must be: a test, or an object's keys, all of them optional.
Form = Callable[[Any], bool] | dict[str, Any]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and is_finite(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_files(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(file, dict) and _is_text(file.get("name")) and _is_text(file.get("digest", ""))
        for file in value
    )


_BASE_MODEL: Form = {"id": _is_text, "revision": _is_text, "files": _are_files}
_OF_FILE: Form = {
    "base_model": _BASE_MODEL,
    "source": {"kind": _is_text, "dialect": _is_text, "files": _are_files},
    "selection": {
        "rule": _is_text, "scope": _is_text, "density": _is_number, "top_k": is_uint, "energy": _is_number,
        "min_change": _is_number, "include": _are_texts, "exclude": _are_texts, "energy_kept": _is_number,
        "relative_error": _is_number,
    },
    "mask": {"rule": _is_text, "seed": _is_integer, "calibration_digest": _is_text},
    "license": _is_text,
    "writer": _is_text,
    "description": _is_text,
}  # fmt: skip
ACCOUNTS = ("energy_kept", "relative_error")  # numbers in an item of `tensors`
_OF_TENSOR: Form = dict.fromkeys(ACCOUNTS, _is_number)

Place = tuple[dict[str, Any], str, str]  # an object, one of its keys, and what messages call it


def _misfits(value: Any, form: Form, place: Place) -> Iterator[Place]:
    if not isinstance(form, dict):
        if not form(value):
            yield place
    elif not isinstance(value, dict):
        yield place
    else:
        for key, inner in form.items():
            if key in value:
                yield from _misfits(value[key], inner, (value, key, f"{place[2]}.{key}".lstrip(".")))


def misfits(manifest: dict[str, Any]) -> Iterator[Place]:
    """The places of a manifest, of which the rest has been checked, where provenance is not what section 7 says."""
    yield from _misfits(manifest, _OF_FILE, (manifest, "", ""))
    for name, component in manifest.get("components", {}).items():
        yield from _misfits(component, {"base_model": _BASE_MODEL}, (component, "", f"components.{name}"))
    for number, item in enumerate(manifest["tensors"]):
        if "energy_kept" in item or "relative_error" in item:
            yield from _misfits(item, _OF_TENSOR, (item, "", f"tensors[{number}]"))


def leave_out_misfits(manifest: dict[str, Any]) -> None:
    """Remove provenance that is not what section 7 says: whoever shows or uses it finds what is there in the right form."""
    for holder, key, _ in list(misfits(manifest)):
        del holder[key]


def check_provenance(manifest: dict[str, Any]) -> None:
    """Check a manifest that is to be written.

    Raises:
        FormatError: its provenance is not what section 7 says.
    """
    for _, _, where in misfits(manifest):
        raise FormatError("manifest-schema", f"{where!r} is not what the specification says of it")
