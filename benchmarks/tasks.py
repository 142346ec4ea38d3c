"""Merging on real tasks: what two shipped LoRAs are worth, each with its own head, before and after they became one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from benchmarks.table import Row
from shira_analysis.measures.classifier import LabelledTexts, logits
from shira_analysis.measures.effect import accuracy
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.live import Switcher
from shira_format.merging import METHODS, Method, merge, open_merge

TASKS = ("spam", "genre")
DENSITIES = (0.01, 0.05)
# What is told to every method that has such an option; methods that draw lots do so with each seed, and count as their mean.
OPTIONS = {"density": 0.5, "of": "entries"}
SEEDS = (0, 1)
BOTH, HALVES = (1.0, 1.0), (0.5, 0.5)
# Of PEFT: those that only add, then those that leave things out first, of the factors or (svd) of their product.
ADDING = ("linear", "cat", "svd")
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = (*ADDING, *PRUNING, *(f"{name}_svd" for name in PRUNING))

_DATA = Path(__file__).parents[1] / "cli" / "shira_cli" / "data"
_HEAD = "classifier"
_KEPT = "base_model.model."  # before each name in a file of PEFT
_Weights = tuple[float, float]
_Accuracy = dict[str, float]  # by task


def rows(
    folder: Path,
    base: Path,
    *,
    texts: int | None = None,
    densities: Sequence[float] = DENSITIES,
    methods: Mapping[str, Method] = METHODS,
    combinations: Sequence[str] = COMBINATIONS,
) -> Iterator[Row]:
    """Accuracies, two rows each; nothing is timed or required.

    Args:
        folder: for the adapters.
        base: folder of MiniLM.
        texts: of each task, evenly taken from those held out; None: all.
        densities: of the SHiRAs.
        methods: of merging these.
        combinations: of merging the LoRAs by PEFT.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the model has a head that the checkpoint lacks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench = _Bench(base, texts)
        bare, loras = bench.accuracy(), _loras(base)
        alone = _alone(bench, loras)
        for task in TASKS:
            yield Row(
                f"{task}: held-out texts", bench.texts(task), bench.held_out(task), "texts", "those that ship"
            )
        yield from _rows("base without adapter", bare, alone, "the LoRA alone")
        yield from _rows("LoRA alone", alone, bare, "the base without adapter")
        for density in densities:
            yield from _sparse(bench, folder, base, density, methods, alone)
        bench.check()
        for name in combinations:
            for weights in (BOTH, HALVES) if name == "cat" else (BOTH,):
                found = _combined(bench, loras, name, weights)
                label = _label(name, weights, pruned=_prunes(name), random=_random(name))
                yield from _rows(f"LoRAs by PEFT, {label}", found, alone, "the LoRA alone")


def _rows(case: str, ours: _Accuracy, peer: _Accuracy, peer_is: str) -> Iterator[Row]:
    for task in TASKS:
        yield Row(f"{task}: {case}", ours[task], peer[task], "accuracy", peer_is)


def _label(name: str, weights: _Weights, *, pruned: bool, random: bool) -> str:
    """A method and what it was told, unless that is weights of 1 alone."""
    told = [] if weights == BOTH else [f"weights {weights[0]:g}"]
    told += [f"density {OPTIONS['density']}"] if pruned else []
    told += [f"mean of {len(SEEDS)} seeds"] if random else []
    return ", ".join([name, *told])


class _Bench:
    """The classifier with the base's encoder, and the texts and the head of each task."""

    def __init__(self, base: Path, texts: int | None) -> None:
        self._all = {task: LabelledTexts.read(_DATA / "text" / f"{task}.jsonl") for task in TASKS}
        self._chosen = {task: _some(found, texts) for task, found in self._all.items()}
        self._heads = {task: _tensors(task, _HEAD) for task in TASKS}
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = _load(base)
        self._before = {name: tensor.clone() for name, tensor in self._encoder().items()}

    def texts(self, task: str) -> int:
        """How many count."""
        return len(self._chosen[task].texts)

    def held_out(self, task: str) -> int:
        """How many there are."""
        return len(self._all[task].texts)

    def check(self) -> None:
        """That the encoder is the base's, to the bit."""
        now = self._encoder()
        assert all(torch.equal(now[name], tensor) for name, tensor in self._before.items()), (
            "reverting left something behind"
        )

    def _encoder(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.model.state_dict().items() if not name.startswith(_HEAD)}

    def of(self, task: str, model: Any = None) -> float:
        """The accuracy of one task: a model as it is (its encoder may have adapters), under that task's head."""
        model = self.model if model is None else model
        model.load_state_dict(self._heads[task], strict=False)
        chosen = self._chosen[task]
        return accuracy(logits(model, self._tokenizer, chosen.texts), chosen.labels)

    def accuracy(self, model: Any = None) -> _Accuracy:
        """Of both tasks."""
        return {task: self.of(task, model) for task in TASKS}


def _load(base: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)


def _some(found: LabelledTexts, texts: int | None) -> LabelledTexts:
    count = len(found.texts)
    places = np.linspace(0, count, min(texts or count, count), endpoint=False).astype(int)
    return LabelledTexts([found.texts[place] for place in places], found.labels[places])


def _tensors(task: str, having: str) -> dict[str, torch.Tensor]:
    """Of a LoRA's file, with the model's names."""
    tensors = load_file(_DATA / "loras" / task / "adapter_model.safetensors")
    found = {key.removeprefix(_KEPT): tensor for key, tensor in tensors.items() if having in key}
    assert found, having
    return found


def _sparse(
    bench: _Bench, folder: Path, base: Path, density: float, methods: Mapping[str, Method], loras: _Accuracy
) -> Iterator[Row]:
    """The SHiRAs of both LoRAs alone, and joined by each method."""
    paths, alone = [], {}
    for task in TASKS:
        path = folder / f"tasks-{task}-{density:g}.st"
        lora_to_shira(_DATA / "loras" / task, base, path, density=density, self_contained=True)
        with Switcher(bench.model).applied(path):
            alone[task] = bench.of(task)
        paths.append(path)
    which = f"SHiRA {100 * density:g} %"
    yield from _rows(f"{which} alone", alone, loras, "the LoRA alone")
    for name, method in methods.items():
        for weights in (BOTH, HALVES) if name == "linear" else (BOTH,):
            try:
                found = _joined(bench, paths, method, weights)
            except SourceError:
                if name != "refuse":  # whose answer this is; of another one it is a mistake here
                    raise
                yield _refused(paths, f"{which}, {name} raises an error: entries in both")
            else:
                label = _label(name, weights, pruned="density" in method.options, random="seed" in method.options)
                yield from _rows(f"{which}, {label}", found, alone, "that SHiRA alone")


def _joined(bench: _Bench, paths: Sequence[Path], method: Method, weights: _Weights) -> _Accuracy:
    """The encoder with the merged adapter on it, under each head in turn: the heads themselves are not joined."""
    options = {name: value for name, value in OPTIONS.items() if name in method.options}
    found = []
    for seed in SEEDS if "seed" in method.options else SEEDS[:1]:
        told = options | ({"seed": seed} if "seed" in method.options else {})
        adapter = open_merge(
            paths, method=method.name, weights=weights, options=told, exclude=[f"^{_HEAD}"]
        ).adapter()
        with Switcher(bench.model).applied(adapter):
            found.append(bench.accuracy())
    return _mean(found)


def _refused(paths: Sequence[Path], case: str) -> Row:
    report = merge(paths, None, exclude=[f"^{_HEAD}"])
    shared = sum(tensor.shared for tensor in report.tensors)
    return Row(case, shared, report.nnz, "entries", "entries in either")


def _mean(found: Sequence[_Accuracy]) -> _Accuracy:
    return {task: sum(one[task] for one in found) / len(found) for task in TASKS}


def _loras(base: Path) -> Any:
    """A model of PEFT with both LoRAs; heads apart, since PEFT merges no adapters that have the same module of their own."""
    configs = {task: LoraConfig.from_pretrained(str(_DATA / "loras" / task)) for task in TASKS}
    for config in configs.values():
        config.modules_to_save = config.task_type = None
    model = PeftModel(_load(base), configs[TASKS[0]], adapter_name=TASKS[0])
    model.add_adapter(TASKS[1], configs[TASKS[1]])
    for task in TASKS:
        factors = {_KEPT + name: tensor for name, tensor in _tensors(task, "lora_").items()}
        result = set_peft_model_state_dict(model, factors, adapter_name=task)
        assert not result.unexpected_keys, result.unexpected_keys
    return model


def _alone(bench: _Bench, loras: Any) -> _Accuracy:
    found = {}
    for task in TASKS:
        loras.set_adapter(task)
        found[task] = bench.of(task, loras.get_base_model())
    return found


def _combined(bench: _Bench, loras: Any, combination: str, weights: _Weights) -> _Accuracy:
    """PEFT's own merge of the LoRAs, for each seed if it draws lots; full_matrices changes only the time."""
    told: dict[str, Any] = {"density": OPTIONS["density"]} if _prunes(combination) else {}
    found = []
    for seed in SEEDS if _random(combination) else SEEDS[:1]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loras.add_weighted_adapter(
                list(TASKS), list(weights), "merged", combination_type=combination, svd_full_matrices=False, **told
            )
        loras.set_adapter("merged")
        found.append(bench.accuracy(loras.get_base_model()))
        loras.delete_adapter("merged")
    return _mean(found)


def _prunes(combination: str) -> bool:
    return combination.startswith(PRUNING)


def _random(combination: str) -> bool:
    return combination.startswith("dare")


def table(stored: Sequence[Mapping[str, Any]]) -> str:
    """Two tables in Markdown, of the rows of a stored run: of the SHiRAs, and of the LoRAs.

    Accuracies are in per cent; the drop, in points, is that of their mean from what the same adapters reach alone.
    """
    of = _accuracies(stored)
    which = [case.removesuffix(" alone") for case in of if case.startswith("SHiRA") and case.endswith(" alone")]
    names = [case.partition(", ")[2] for case in of if case.startswith(f"{which[0]}, ")]
    alone = [of[f"{one} alone"] for one in which]
    head = f"{' | '.join(TASKS)} | mean | drop"
    lines = [f"| | {' | '.join(f'{one}: {head}' for one in which)} |", "|---" * (1 + 4 * len(which)) + "|"]
    lines.append(_line("each alone", alone, alone))
    lines += [_line(_code(name), [of[f"{one}, {name}"] for one in which], alone) for name in names]
    lines += ["", f"| | {head} |", "|---" * 5 + "|"]
    prefix, lora = "LoRAs by PEFT, ", [of["LoRA alone"]]
    for case, figures in of.items():
        if not case.startswith("SHiRA"):
            label = _code(case.removeprefix(prefix)) if case.startswith(prefix) else case
            lines.append(_line(label, [figures], lora))
    return "\n".join(lines)


def _accuracies(stored: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Of each case, in the order of the tasks."""
    found: dict[str, list[float]] = {}
    for task in TASKS:
        for row in stored:
            if row["unit"] == "accuracy" and row["case"].startswith(f"{task}: "):
                found.setdefault(row["case"].removeprefix(f"{task}: "), []).append(row["ours"])
    return found


def _code(label: str) -> str:
    name, comma, told = label.partition(", ")
    return f"`{name}`{comma}{told}"


def _line(label: str, found: Sequence[Sequence[float]], alone: Sequence[Sequence[float]]) -> str:
    cells = [label]
    for these, those in zip(found, alone, strict=True):
        mean, before = (100 * sum(figures) / len(figures) for figures in (these, those))
        cells += [f"{100 * figure:.1f}" for figure in these] + [f"{mean:.1f}", f"{before - mean:.1f}"]
    return f"| {' | '.join(cells)} |"


def standard_error(share: float, texts: int) -> float:
    """Of an accuracy that was measured on so many texts."""
    return math.sqrt(share * (1 - share) / texts)
