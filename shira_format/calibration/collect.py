"""From a model's folder and a file of texts to the moments of the inputs of the model's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shira_format.calibration.moments import LIMIT, collect_moments
from shira_format.calibration.texts import (
    ChosenLayers,
    LoadedModel,
    batches,
    choose_layers,
    load_model,
    read_texts,
)
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import SourceError


@dataclass(frozen=True)
class LayerMoments:
    """Moments of one weight's inputs.

    Attributes:
        name: of the weight in the checkpoint.
        width: of an input.
        groups: how many blocks are kept.
        block: rows of a block.
        nbytes: of the blocks.
        samples: how many inputs were seen; None for a dry run.
    """

    name: str
    width: int
    groups: int
    block: int
    nbytes: int
    samples: int | None


@dataclass
class MomentsReport:
    """What was collected.

    Attributes:
        texts: how many there were.
        layers: the watched layers.
        notices: what a user should know.
        warnings: what makes the moments doubtful.
    """

    texts: int
    layers: list[LayerMoments] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of all layers."""
        return sum(layer.nbytes for layer in self.layers)


def moments_of_texts(
    model: Path,
    texts: Path,
    out: Path | None,
    *,
    field: str = "text",
    limit: int | None = None,
    batch: int = 16,
    max_length: int = 512,
    causal: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    block: int | None = None,
    dtype: Literal["float32", "float64"] = "float64",
    inputs: int | None = None,
    seed: int = 0,
    on_load: Callable[[MomentsReport], object] = lambda _: None,
    progress: Callable[[int], object] = lambda _: None,
) -> MomentsReport:
    """Run a model over texts and write the second moments of the inputs of its layers.

    Args:
        model: a folder that transformers loads, with its tokenizer; no code in it is run.
        texts: one text a line, or ``.jsonl``.
        out: the file to write; None loads everything, says what would be collected and writes nothing.
        field: of the objects of ``.jsonl``, the one with the text.
        limit: the first so many texts only.
        batch: texts at a time.
        max_length: tokens after which a text is cut.
        causal: load the model as ``AutoModelForCausalLM``.
        include: regexes; a weight is watched only if one of them is found in its name.
        exclude: regexes; a weight is left out if one of them is found in its name.
        block: keep only blocks of so many inputs along the diagonal.
        dtype: of the moments.
        inputs: keep so many inputs of each layer too, drawn at random.
        seed: of that draw.
        on_load: called with the report, notices and warnings filled in, before the model runs.
        progress: called with the number of texts that were run since the last call.

    Raises:
        SourceError: torch or transformers is missing, the model or the texts cannot be read, or the moments are too large.
        OSError: a file cannot be read or written.
    """
    read = read_texts(texts, field=field, limit=limit)
    loaded = load_model(model, causal=causal)
    chosen = choose_layers(loaded.model, set(open_checkpoint(model)), include, exclude)
    length = min(max_length, loaded.longest or max_length)
    report = MomentsReport(len(read.texts))
    _notes(report, read.empty, loaded, chosen, length if length < max_length else None)
    on_load(report)
    if out is None:
        from shira_format.calibration.layers import Watch

        watch = Watch(loaded.model, chosen.modules, block=block, dtype=dtype, limit=LIMIT, inputs=inputs or 0)
        report.layers = [
            LayerMoments(chosen.weights[one.weight], one.width, one.shape[0], one.shape[2], one.nbytes, None)
            for one in watch.layers
        ]
        return report

    def shown() -> Iterator[Any]:
        for some in batches(loaded.tokenizer, read.texts, batch=batch, length=length):
            yield some
            progress(len(some["input_ids"]))

    found = collect_moments(
        loaded.model, shown(), chosen.modules,
        block=block, dtype=dtype, inputs=inputs or 0, seed=seed, rename=chosen.weights.__getitem__,
    )  # fmt: skip
    found.save(out)
    report.layers = [
        LayerMoments(name, one.width, one.blocks.shape[0], one.blocks.shape[2], one.nbytes, one.samples)
        for name, one in found.items()
    ]
    return report


def check_moments_output(out: Path, model: Path, texts: Path) -> None:
    """Raise SourceError if ``out`` is the file of texts or in the model's folder, where loaders may take it for weights."""
    if out.resolve() == texts.resolve():
        raise SourceError(f"{out}: is the file of texts")
    if model.is_dir() and model.resolve() in out.resolve().parents:
        raise SourceError(f"{out}: is in the folder of the model")


def _notes(report: MomentsReport, empty: int, loaded: LoadedModel, chosen: ChosenLayers, cut: int | None) -> None:
    if empty:
        report.notices.append(f"{empty} empty lines are left out")
    if cut is not None:
        report.notices.append(f"texts are cut after {cut} tokens, the most that the model takes")
    if loaded.random:
        report.warnings.append(
            f"{len(loaded.random)} weights are not in the folder and are random: {_some(loaded.random)}"
        )
    if chosen.unknown:
        report.notices.append(f"not watched, because no tensor in the files has the name: {_some(chosen.unknown)}")


def _some(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
