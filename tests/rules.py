"""Rules of selection as arguments of the verbs that convert."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from shira_format.convert.exact import Exact
from shira_format.selection import TopK


def arguments(rule: TopK | Exact) -> dict[str, Any]:
    """The keyword arguments that mean this rule."""
    return {"exact": True, "digests": rule.digests} if isinstance(rule, Exact) else asdict(rule)
