"""shira-format: sparse high rank adapters as small, exact, checked files.

>>> import shira_format as shira
>>> report = shira.lora_to_shira("my-lora", "my-model", "adapter.st", density=0.01)
>>> adapter = shira.load("adapter.st")
>>> adapter["encoder.layer.0.attention.self.query.weight"].nnz
1475
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shira_format.version import __version__

if TYPE_CHECKING:
    from shira_format import errors as errors
    from shira_format.adapter import Adapter as Adapter
    from shira_format.checkpoints import open_checkpoint as open_checkpoint
    from shira_format.convert.csr import csr_to_shira as csr_to_shira
    from shira_format.convert.fit.distill import Distillation as Distillation
    from shira_format.convert.fit.live import LiveModel as LiveModel
    from shira_format.convert.fit.run import FitOptions as FitOptions
    from shira_format.convert.fit.run import fit_adapter as fit_adapter
    from shira_format.convert.fit.run import fit_full as fit_full
    from shira_format.convert.fit.run import fit_lora as fit_lora
    from shira_format.convert.full import full_to_shira as full_to_shira
    from shira_format.convert.lora import lora_to_shira as lora_to_shira
    from shira_format.convert.peft_shira import peft_to_shira as peft_to_shira
    from shira_format.convert.repack import repack as repack
    from shira_format.entries.inspection import inspect as inspect
    from shira_format.entries.inspection import verify as verify
    from shira_format.export.csr import shira_to_csr as shira_to_csr
    from shira_format.export.full import shira_to_full as shira_to_full
    from shira_format.export.lora import shira_to_lora as shira_to_lora
    from shira_format.export.peft_shira.export import shira_to_peft as shira_to_peft
    from shira_format.format import load as load
    from shira_format.format import save as save
    from shira_format.live import AdapterPool as AdapterPool
    from shira_format.live import Switcher as Switcher
    from shira_format.live import apply as apply
    from shira_format.live import place_adapter as place_adapter
    from shira_format.masks.make import make_mask as make_mask
    from shira_format.merging.diff import diff as diff
    from shira_format.merging.verbs import compose as compose
    from shira_format.merging.verbs import intersect as intersect
    from shira_format.merging.verbs import invert as invert
    from shira_format.merging.verbs import merge as merge
    from shira_format.merging.verbs import subtract as subtract
    from shira_format.names.servers import ServerLayer as ServerLayer
    from shira_format.names.servers import ServerLayout as ServerLayout
    from shira_format.sync import Publisher as Publisher
    from shira_format.sync import Subscriber as Subscriber
    from shira_format.tensors import DenseTensor as DenseTensor
    from shira_format.tensors import SparseTensor as SparseTensor
    from shira_format.training.hook import attach as attach
    from shira_format.training.sparse import resume as resume
    from shira_format.training.sparse import sparse_parameters as sparse_parameters

# Where each public name lives; it is imported when it is first asked for.
_HOMES = {
    "Adapter": "adapter",
    "AdapterPool": "live",
    "DenseTensor": "tensors",
    "Distillation": "convert.fit.distill",
    "FitOptions": "convert.fit.run",
    "LiveModel": "convert.fit.live",
    "Publisher": "sync",
    "ServerLayer": "names.servers",
    "ServerLayout": "names.servers",
    "SparseTensor": "tensors",
    "Subscriber": "sync",
    "Switcher": "live",
    "apply": "live",
    "attach": "training.hook",
    "compose": "merging.verbs",
    "csr_to_shira": "convert.csr",
    "diff": "merging.diff",
    "fit_adapter": "convert.fit.run",
    "fit_full": "convert.fit.run",
    "fit_lora": "convert.fit.run",
    "full_to_shira": "convert.full",
    "inspect": "entries.inspection",
    "intersect": "merging.verbs",
    "invert": "merging.verbs",
    "load": "format",
    "lora_to_shira": "convert.lora",
    "make_mask": "masks.make",
    "merge": "merging.verbs",
    "open_checkpoint": "checkpoints",
    "peft_to_shira": "convert.peft_shira",
    "place_adapter": "live",
    "repack": "convert.repack",
    "resume": "training.sparse",
    "save": "format",
    "shira_to_csr": "export.csr",
    "shira_to_full": "export.full",
    "shira_to_lora": "export.lora",
    "shira_to_peft": "export.peft_shira.export",
    "sparse_parameters": "training.sparse",
    "subtract": "merging.verbs",
    "verify": "entries.inspection",
}

__all__ = ["__version__", "errors", *sorted(_HOMES)]  # noqa: PLE0604 - strings, from the table above


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("shira_format.errors")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
