"""Typed access to the fields of a manifest; a field of another type breaks the rule ``manifest-schema``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

from shira_format.errors import FormatError

_DIGEST = re.compile(r"[0-9a-f]{64}")


def need(raw: Mapping[str, Any], key: str, kind: type, tensor: str | None = None) -> Any:
    """``raw[key]``, which must be of exactly this type: ``true`` is no integer."""
    value = raw.get(key)
    if type(value) is not kind:
        reason = f"{key!r} is missing" if key not in raw else f"{key!r} is not of type {kind.__name__}"
        raise FormatError("manifest-schema", reason, tensor=tensor)
    return value


def optional(raw: Mapping[str, Any], key: str, kind: type) -> Any:
    """``raw[key]`` of this type, or None if there is none."""
    return need(raw, key, kind) if key in raw else None


def items(raw: Mapping[str, Any], key: str, *, required: bool = False) -> list[Any]:
    """A list; empty if it is missing and not ``required``."""
    if key not in raw and not required:
        return []
    return cast(list[Any], need(raw, key, list))


def strings(raw: Mapping[str, Any], key: str, *, required: bool = False) -> list[str]:
    """A list of strings; see :func:`items`."""
    found = items(raw, key, required=required)
    if not all(isinstance(item, str) for item in found):
        raise FormatError("manifest-schema", f"{key!r} is not a list of strings")
    return found


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float64."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


_NOT_IN_FILE_NAMES = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')
_DEVICE = re.compile(
    r"(?:CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(?:COM|LPT)[0-9¹²³]) *(?:\..*)?", re.IGNORECASE | re.ASCII
)


def is_file_name(name: str) -> bool:
    """Whether a name can be that of a file or folder on every common system (spec, section 3.4)."""
    return (
        1 <= len(name.encode()) <= 255
        and not _NOT_IN_FILE_NAMES.search(name)
        and not name.endswith((".", " "))
        and not _DEVICE.fullmatch(name)
    )


def check_file_names(names: Mapping[str, Any], what: str) -> None:
    """Raise FormatError unless all names can be those of files of one folder."""
    seen: set[bytes] = set()
    for name in names:
        if not is_file_name(name):
            raise FormatError("manifest-schema", f"{name!r:.300} cannot name {what}")
        if (folded := name.encode().lower()) in seen:
            raise FormatError("manifest-schema", f"{name!r} and another name of {what} differ in case alone")
        seen.add(folded)


def flag(raw: Mapping[str, Any], key: str, tensor: str) -> bool:
    """A boolean; False if it is missing."""
    return bool(need(raw, key, bool, tensor)) if key in raw else False


def is_digest(value: Any) -> bool:
    """Whether a value is 64 lower-case hex digits."""
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))


def digests(raw: Mapping[str, Any], tensor: str, roles: tuple[str, ...]) -> dict[str, str]:
    """The object ``digests``; those of ``roles`` must be digests."""
    found = cast(dict[str, Any], need(raw, "digests", dict, tensor))
    for role in roles:
        if role in found and not is_digest(found[role]):
            raise FormatError("manifest-schema", f"the digest of {role} is not 64 hex digits", tensor=tensor)
    return found
