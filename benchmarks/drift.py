"""What is left of a bf16 base after adapters were put on and taken off again, many times: a real model, two real LoRAs."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, logging

from benchmarks.embeddings import BASE, shipped
from benchmarks.table import Row
from shira_format.convert import lora_to_shira
from shira_format.export.peft_shira import shira_to_peft
from shira_format.live import AdapterPool, Switcher

CYCLES = (1, 10, 100, 1000)
TASKS = ("spam", "genre")
LORAS = Path(__file__).parents[1] / "cli" / "shira_cli" / "data" / "loras"
Record = dict[str, Any]
Weights = Mapping[str, torch.Tensor]


def rows(folder: Path, *, quick: bool) -> tuple[list[Row], list[Record]]:
    """Rows after the last cycle; and a record for each count of cycles, for a figure."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for weights as small as these, more threads are slower
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            records = list(_records(folder, CYCLES[: 2 if quick else None]))
    finally:
        torch.set_num_threads(threads)
    last = {record["who"]: record for record in records}
    ours = last.pop("ours")
    found = []
    for who, theirs in last.items():
        peer = f"{who}, merge and unmerge"
        for key, case in (
            (
                "changed",
                f"adapted bf16 weights changed by {theirs['cycles']} loads and unloads, {who}",
            ),
            ("error", f"  largest error, of the largest weight, {who}"),
        ):
            found.append(Row(case, ours[key], theirs[key], "share", peer, "none", ours[key] == 0))
    return found, records


def _records(folder: Path, cycles: tuple[int, ...]) -> Iterator[Record]:
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the model has a head that the checkpoint lacks
    base = folder / "drift-base"
    model = AutoModelForSequenceClassification.from_pretrained(shipped(*BASE), dtype=torch.bfloat16)
    model.bert.save_pretrained(base)
    loras = [LORAS / task for task in TASKS]
    adapters, shiras = ([folder / f"drift-{task}{end}" for task in TASKS] for end in (".st", "-shira"))
    for lora, adapter, shira in zip(loras, adapters, shiras, strict=True):
        lora_to_shira(lora, base, adapter, density=0.01)
        shira_to_peft(adapter, shira, base=base, prefix="bert.", pad=True)

    def load() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16)

    ways: dict[str, Callable[[], tuple[Weights, Callable[[int], None]]]] = {
        "PEFT LoRA": lambda: _cycle_of_peft(_peft(load(), loras)),
        "PEFT SHiRA": lambda: _cycle_of_peft(_as_trained(_peft(load(), shiras), _peft(load(), loras))),
        "PEFT SHiRA of exact differences": lambda: _cycle_of_peft(_peft(load(), shiras)),
        "ours": lambda: _ours(load(), dict(zip(TASKS, adapters, strict=True))),
    }
    for who, make in ways.items():
        for record in _run(*make(), cycles):
            yield {"who": who} | record


def _peft(model: Any, folders: Sequence[Path]) -> Any:
    """A model under two adapters of PEFT, ``"0"`` and ``"1"``."""
    peft = PeftModel.from_pretrained(model, str(folders[0]), adapter_name="0")
    peft.load_adapter(str(folders[1]), adapter_name="1")
    return peft


def _as_trained(shira: Any, lora: Any) -> Any:
    """The SHiRAs with the LoRAs' update at their entries in float32, as training leaves values.

    What ``shira_to_peft`` writes are differences of two bf16 numbers: adding and subtracting them happens to be exact.
    """
    updates = {name: layer for name, layer in lora.named_modules() if hasattr(layer, "get_delta_weight")}
    for name, layer in shira.named_modules():
        if hasattr(layer, "get_delta_weight"):
            for adapter in ("0", "1"):
                rows, columns = layer.shira_indices[adapter].long()
                update = updates[name].get_delta_weight(adapter).detach()
                layer.shira_weight[adapter].data = update[rows, columns].float()
    return shira


def _cycle_of_peft(peft: Any) -> tuple[Weights, Callable[[int], None]]:
    """The adapted weights of a model under PEFT, and what merges an adapter and takes it off."""
    end = ".base_layer.weight"

    def cycle(number: int) -> None:
        peft.set_adapter(str(number))
        peft.merge_adapter()
        peft.unmerge_adapter()

    return {name: weight for name, weight in peft.named_parameters() if name.endswith(end)}, cycle


def _ours(model: Any, paths: Mapping[str, Path]) -> tuple[Weights, Callable[[int], None]]:
    pool = AdapterPool(paths)
    switcher = Switcher(model, pool=pool)
    names = {f"bert.{tensor.name}" for task in TASKS for tensor in pool.get_adapter(task).tensors}

    def cycle(number: int) -> None:
        switcher.load(TASKS[number])
        switcher.revert()

    return {name: weight for name, weight in model.named_parameters() if name in names}, cycle


def _run(weights: Weights, cycle: Callable[[int], None], cycles: tuple[int, ...]) -> Iterator[Record]:
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    assert before
    largest = max(float(weight.abs().max()) for weight in before.values())
    elements = sum(weight.numel() for weight in before.values())
    turns, done = itertools.cycle((0, 1)), 0
    for wanted in cycles:
        for number in itertools.islice(turns, wanted - done):
            cycle(number)
        done = wanted
        changed, error = 0, 0.0
        for name, weight in weights.items():
            changed += int(torch.count_nonzero(weight.view(torch.int16) != before[name].view(torch.int16)))
            error = max(error, float((weight.float() - before[name].float()).abs().max()))
        yield {"cycles": wanted, "changed": changed / elements, "error": error / largest}
