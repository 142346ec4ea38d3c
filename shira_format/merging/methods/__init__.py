"""The merge methods, a file for each family; a new one is a function and a line in its file's ``METHODS``."""

from __future__ import annotations

from shira_format.merging.methods import (
    arithmetic,
    breadcrumbs,
    cabs,
    dare,
    della,
    exact,
    ram,
    sce,
    sums,
    trimming,
)
from shira_format.merging.methods.method import Method, Option, Options, shown

_FAMILIES = (sums, arithmetic, trimming, dare, breadcrumbs, della, sce, ram, cabs, exact)

METHODS: dict[str, Method] = {method.name: method for family in _FAMILIES for method in family.METHODS}

__all__ = ["METHODS", "Method", "Option", "Options", "shown"]
