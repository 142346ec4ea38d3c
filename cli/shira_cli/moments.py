"""``shira-moments``: what the layers of a model are fed by some texts, for measures of adapters on real inputs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira_cli import console
from shira_format._core import text

if TYPE_CHECKING:
    from shira_format.calibration.texts import ChosenLayers, LoadedModel

PROG = "shira-moments"

EXAMPLE = """examples:
  shira-moments my-model/ --texts texts.txt -o moments.safetensors
  shira-moments my-model/ --texts texts.jsonl --limit 200 --include mlp --dtype float32 -o moments.safetensors
  shira-moments my-model/ --texts texts.txt --inputs 256 -o moments.safetensors
  shira-measure a.st b.st --moments moments.safetensors
"""

DESCRIPTION = """\
Run a model over texts and store the second moments E[x x^T] of the inputs of its layers, under the names that the weights
have in the model's files. With them, shira-measure tells whether two adapters disturb each other on such texts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = console.parser(PROG, DESCRIPTION, EXAMPLE)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a folder that transformers can load, with its tokenizer; no code in it is run")  # fmt: skip
    add("--texts", type=Path, required=True, metavar="FILE", help="one text a line, or .jsonl")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the file of moments to write")
    add("--field", default="text", metavar="NAME", help="which field of the objects of .jsonl is the text (default: text)")  # fmt: skip
    add("--limit", type=_count, metavar="N", help="the first N texts only")
    add("--batch", type=_count, default=16, metavar="N", help="texts at a time (default: 16)")
    add("--max-length", type=_count, default=512, metavar="N", help="tokens after which a text is cut (default: 512, or what the model takes)")  # fmt: skip
    add("--causal", action="store_true", help="load it as AutoModelForCausalLM (default: the class in its config)")
    add("--include", action="append", default=[], metavar="REGEX", help="only weights in whose name this is found; may be repeated")  # fmt: skip
    add("--exclude", action="append", default=[], metavar="REGEX", help="leave out weights in whose name this is found; may be repeated")  # fmt: skip
    add("--block", type=_count, metavar="N", help="keep only blocks of N inputs along the diagonal of each matrix (1: the diagonal)")  # fmt: skip
    add("--dtype", choices=("float32", "float64"), default="float64", help="in which the moments are summed up and stored (default: float64)")  # fmt: skip
    add("--inputs", type=_count, default=0, metavar="N", help="keep N inputs of each layer too, drawn at random: what two adapters do to each other at each input by itself is not in the moments")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of that choice (default: 0)")
    add("--force", action="store_true", help="replace FILE if it exists")
    add("--dry-run", action="store_true", help="load everything and tell what would be gathered; write nothing")
    console.add_output_options(parser)
    options = parser.parse_args(argv)
    if options.seed < 0:
        console.usage_error(PROG, f"--seed {options.seed} is negative")
    return console.run(PROG, lambda: _moments(options))


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_count.__name__ = "positive count"  # argparse tells it


def _moments(options: argparse.Namespace) -> int:
    from shira_format import ShiraError
    from shira_format.calibration.moments import collect_moments
    from shira_format.calibration.texts import batches, choose_layers, load_model, read_texts
    from shira_format.checkpoints import open_checkpoint

    console.terminate_like_interrupt()
    if options.output.resolve() == options.texts.resolve():
        raise ShiraError(f"{options.output}: is the file of texts")
    if options.model.is_dir() and options.model.resolve() in options.output.resolve().parents:
        # Whatever a folder of weights holds, loaders may take for weights.
        raise ShiraError(f"{options.output}: is in the folder of the model")
    console.check_output(options.output, force=options.force)
    read = read_texts(options.texts, field=options.field, limit=options.limit)
    loaded = load_model(options.model, causal=options.causal)
    chosen = choose_layers(loaded.model, set(open_checkpoint(options.model)), options.include, options.exclude)
    length = min(options.max_length, loaded.longest or options.max_length)
    _notices(options, read.empty, loaded, chosen, length)
    if options.dry_run:
        from shira_format.calibration.layers import Watch
        from shira_format.calibration.moments import LIMIT

        watch = Watch(
            loaded.model,
            chosen.modules,
            block=options.block,
            dtype=options.dtype,
            limit=LIMIT,
            inputs=options.inputs,
        )
        rows = [_row(chosen.weights[layer.weight], layer.width, layer.shape, layer.nbytes, None) for layer in watch.layers]  # fmt: skip
        return _report(options, rows, len(read.texts))
    found = collect_moments(
        loaded.model,
        _shown(
            batches(loaded.tokenizer, read.texts, batch=options.batch, length=length), len(read.texts), options
        ),
        chosen.modules,
        block=options.block,
        dtype=options.dtype,
        inputs=options.inputs,
        seed=options.seed,
        rename=chosen.weights.__getitem__,
    )
    found.save(options.output)
    rows = [_row(name, one.width, one.blocks.shape, one.nbytes, one.samples) for name, one in found.items()]
    return _report(options, rows, len(read.texts))


def _notices(
    options: argparse.Namespace, empty: int, loaded: LoadedModel, chosen: ChosenLayers, length: int
) -> None:
    def tell(text: str) -> None:
        console.notice(text, quiet=options.quiet)

    if empty:
        tell(f"note: {empty} empty lines are no texts")
    if length < options.max_length:
        tell(f"note: texts are cut after {length} tokens, which is all that the model takes")
    if loaded.random:
        tell(f"warning: {len(loaded.random)} weights are not in the folder, and random: {_some(loaded.random)}")
    if chosen.unknown:
        tell(f"note: not watched, for no tensor in the files has the name: {_some(chosen.unknown)}")


def _some(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _shown(batches: Iterable[Any], texts: int, options: argparse.Namespace) -> Iterator[Any]:
    """The batches, with a bar that counts texts."""
    from tqdm import tqdm

    hidden = options.quiet or not sys.stderr.isatty()
    with tqdm(total=texts, unit="texts", disable=hidden, leave=False) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch["input_ids"]))


def _row(name: str, width: int, shape: tuple[int, ...], nbytes: int, samples: int | None) -> dict[str, Any]:
    return {
        "name": name,
        "width": width,
        "groups": shape[0],
        "block": shape[2],
        "nbytes": nbytes,
        "samples": samples,
    }


def _report(options: argparse.Namespace, rows: list[dict[str, Any]], texts: int) -> int:
    nbytes = sum(row["nbytes"] for row in rows)
    if options.json:
        console.print_json({"file": None if options.dry_run else str(options.output), "texts": texts, "nbytes": nbytes, "weights": rows})  # fmt: skip
        return 0
    table = [
        (
            row["name"],
            text.count(row["width"]),
            text.count(row["block"]),
            "-" if row["samples"] is None else text.count(row["samples"]),
            text.file_size(row["nbytes"]),
        )
        for row in rows
    ]
    print(text.table(("weight", "width", "block", "inputs", "size"), table))
    told = "would be gathered" if options.dry_run else "gathered"
    print(
        f"{text.printable(str(options.output))}: {len(rows)} weights, {texts} texts, {text.file_size(nbytes)} {told}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
