"""Words in names that tell which tower of a model (text, vision, audio; encoder, decoder) a tensor belongs to."""

from __future__ import annotations

import re

# The words of one tower are interchangeable.
_TOWERS = {
    "text": {"text", "language", "llm"},
    "vision": {"vision", "visual", "image", "img", "video"},
    "audio": {"audio", "speech"},
    "encoder": {"encoder"},
    "decoder": {"decoder"},
}
_CAPITALISED = re.compile(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|[0-9]+")


def towers_in(prefix: str) -> frozenset[str]:
    """The towers that a prefix names: ``model.language_model.`` names the text tower."""
    words = set(re.split(r"[._/]", prefix))
    return frozenset(tower for tower, names in _TOWERS.items() if words & names)


def tower_of_class(name: str) -> str | None:
    """The one tower that a class is the model of (``CLIPTextModel``; a causal LM is text), or None."""
    words = {word.lower() for word in _CAPITALISED.findall(name)}
    found = {tower for tower, names in _TOWERS.items() if words & names}
    if name.endswith("ForCausalLM"):
        found.add("text")
    return found.pop() if len(found) == 1 else None
