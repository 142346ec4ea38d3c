"""The weights of a model: a dictionary, a ``torch.nn.Module``, or a pipeline of diffusers or transformers.

Modules may be moved, wrapped or compiled at any time, so tensors are looked up by name at each change, and never kept.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from typing import Any

from shira_format._core.arrays import Array
from shira_format.errors import BaseMismatch

# What wrappers add to the names of modules: torch.compile, DataParallel; PEFT around a model, and around a layer.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|base_layer)\.")
_AROUND = re.compile(r"^(?:module\.)?(?:base_model\.model\.)?")
# A module that PEFT has copied to train it: the copy is used, the original is the base's.
_COPIED = re.compile(r"\.(?:original_module|modules_to_save)\.")


class LiveWeights(ABC):
    """Live weights by the names that checkpoints give them."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Any]:
        """The tensors by name; tied weights under each of their names."""

    def saved(self) -> Mapping[str, Any]:
        """Those that a checkpoint of the model holds, likewise."""
        return self.tensors()

    def add(self, name: str, values: Array) -> None:
        """Add a new tensor.

        Raises:
            BaseMismatch: this kind of model cannot take one.
        """
        raise BaseMismatch(
            f"tensor {name!r} is new to the base, and the model has no such tensor: add its layer to the model first"
        )

    def drop(self, name: str) -> None:  # noqa: B027 - where nothing can be added, nothing is dropped
        """Remove a tensor that :meth:`add` added."""


class DictWeights(LiveWeights):
    """A dictionary of arrays or tensors; new tensors are added to it."""

    def __init__(self, weights: MutableMapping[str, Any]) -> None:
        self._weights = weights

    def tensors(self) -> Mapping[str, Any]:
        return self._weights

    def add(self, name: str, values: Array) -> None:
        self._weights[name] = values.copy()

    def drop(self, name: str) -> None:
        self._weights.pop(name, None)  # not there if adding it failed


class UnusedOriginal:
    """Stands for a weight that PEFT copied to train it; the model uses the copy."""


class ModuleWeights(LiveWeights):
    """The parameters and buffers of a module, or of several under the names of their components."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        """Args: ``modules``: by the prefix of their names, such as ``""`` or ``"unet/"``."""
        self._modules = modules

    def tensors(self) -> Mapping[str, Any]:
        return self._found(saved=False)

    def saved(self) -> Mapping[str, Any]:
        return self._found(saved=True)

    def _found(self, *, saved: bool) -> dict[str, Any]:
        """All parameters and buffers; or without buffers that are not persistent."""
        found: dict[str, Any] = {}
        for prefix, root in self._modules.items():
            for path, module in root.named_modules(remove_duplicate=False):
                left_out = module._non_persistent_buffers_set if saved else ()  # noqa: SLF001 - torch has no other way
                for attribute in (*module._parameters, *module._buffers):  # noqa: SLF001 - by name, not by identity
                    tensor = None if attribute in left_out else getattr(module, attribute, None)
                    if tensor is not None:
                        name, copied = _plain(f"{path}.{attribute}" if path else attribute)
                        found[prefix + name] = UnusedOriginal() if copied else tensor
        return found


def _plain(name: str) -> tuple[str, bool]:
    """A name without what wrappers add; and whether it is in a module that PEFT copied."""
    name = _WRAPPERS.sub("", _AROUND.sub("", _WRAPPERS.sub("", name)))
    if (match := _COPIED.search(name)) is None:
        return name, False
    rest = name[match.end() :]
    if "modules_to_save" in match[0]:
        rest = rest.partition(".")[2]  # the adapter's name
    return f"{name[: match.start()]}.{rest}", True


def weights_of(model: Any) -> LiveWeights:
    """The weights of a dictionary, a module or a pipeline.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(model, MutableMapping):
        return DictWeights(model)
    torch = sys.modules.get("torch")
    if torch is not None:
        if isinstance(model, torch.nn.Module):
            return ModuleWeights({"": model})
        # pipelines of diffusers have components, those of transformers one model
        components = getattr(model, "components", None)
        if isinstance(components, Mapping):
            modules = {f"{name}/": part for name, part in components.items() if isinstance(part, torch.nn.Module)}
            if modules:
                return ModuleWeights(modules)
        if isinstance(getattr(model, "model", None), torch.nn.Module):
            return ModuleWeights({"": model.model})
    raise TypeError(
        f"a {type(model).__name__} is not a model: need a torch.nn.Module, a pipeline of diffusers or transformers, or a "
        "dictionary of arrays or tensors"
    )
