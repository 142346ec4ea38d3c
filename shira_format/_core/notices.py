"""Kinds of notices for the user."""

from __future__ import annotations


class NamesNotice(str):
    """A notice of what was done with names, which summaries show: prefixes, words of wrappers, names of other programs."""

    __slots__ = ()
