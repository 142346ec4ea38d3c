"""Check a reader of SHiRA adapter files against the vectors.

    python run_vectors.py [--quiet] [--only REGEX] [--features NAMES] [--apply] COMMAND [ARGUMENT ...]

runs `COMMAND ARGUMENT ... FILE` for each file of `vectors/good` and `vectors/bad` (SPEC.md, section 11). For
a good file the command prints the content as JSON and exits with 0; for a bad one it prints, on stderr,
`refused: RULE: text` and exits with 1. Prints a line for each failure and a summary; exits with 0 if all
passed. Standard library alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).resolve().parent / "vectors"
TIMEOUT = 60.0
FEATURES = {"compact", "magnitude", "mask-file", "patch", "random", "runs"}


def vectors(folder: Path = VECTORS, only: str = "") -> list[Path]:
    """The files to check, good ones first, whose `good/NAME.st` or `bad/RULE--what.st` matches `only`."""
    files = sorted(folder.glob("good/*.st")) + sorted(folder.glob("bad/*.st"))
    return [file for file in files if re.search(only, f"{file.parent.name}/{file.name}")]


def is_good(file: Path) -> bool:
    return file.parent.name == "good"


def expected_content(file: Path) -> Any:
    return json.loads(file.with_suffix(".json").read_text("utf-8"))


def expected_rule(file: Path) -> str:
    return file.name.split("--", 1)[0]


def features_of(file: Path) -> set[str]:
    """The features that a file lists; none if its header cannot be read."""
    try:
        data = file.read_bytes()
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        manifest = json.loads(json.loads(header, parse_int=str)["__metadata__"]["shira"], parse_int=str)
        return {feature for feature in manifest["features"] if isinstance(feature, str)}
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()


def is_beyond(file: Path, known: Collection[str] | None) -> bool:
    """Whether a reader of these features (None: all) must refuse the file for one that it does not know."""
    return known is not None and bool((features_of(file) & FEATURES) - set(known))


def difference(found: Any, expected: Any, where: str = "content") -> str | None:
    """The first place where two JSON values differ. Numbers are equal by value; true is not 1."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(found.keys() ^ expected.keys()):
            return f"{where} {'lacks' if key in expected else 'has'} the key {key!a}"
        pairs = [(f"{where}.{key}", found[key], expected[key]) for key in expected]
    elif isinstance(expected, list) and isinstance(found, list):
        if len(found) != len(expected):
            return f"{where} has {len(found)} items instead of {len(expected)}"
        pairs = [(f"{where}[{number}]", *two) for number, two in enumerate(zip(found, expected, strict=True))]
    else:
        numbers = type(found) in (int, float) and type(expected) in (int, float)
        same = found == expected and (numbers or type(found) is type(expected))
        return None if same else f"{where} is {ascii(found)[:100]} instead of {ascii(expected)[:100]}"
    for place, one, other in pairs:
        text = difference(one, other, place)
        if text is not None:
            return text
    return None


def refused_rule(stderr: str) -> str | None:
    """The rule of the first line `refused: RULE: text`."""
    match = re.search(r"^refused: ([a-z0-9-]+)(?::|\s*$)", stderr, re.MULTILINE)
    return match[1] if match else None


def base_of(file: Path) -> Path | None:
    """The safetensors file with the base's tensors, of a vector that needs them."""
    path = file.parents[1] / "base" / f"{file.stem}.safetensors"
    return path if path.exists() else None


def judge(
    command: Sequence[str], timeout: float, wanted: Sequence[str], expected: Callable[[], Any]
) -> str | None:
    """What is wrong with the command's answer: it must refuse for one of the `wanted` rules, or, without any, print what is expected."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:g} s"
    stderr = done.stderr.decode("utf-8", "replace")
    last = ascii(stderr.strip().rpartition("\n")[2][:300])
    if not wanted:
        if done.returncode != 0:
            return f"exit {done.returncode} for a good file: {last}"
        try:
            content = json.loads(done.stdout)
        except ValueError as error:
            return f"stdout is not JSON: {error}"
        return difference(content, expected())
    rules, rule = " or ".join(wanted), refused_rule(stderr)
    if done.returncode != 1:
        return f"exit {done.returncode} instead of 1 for a file that breaks {rules}: {last}"
    return None if rule in wanted else f"refused for {rule} instead of {rules}: {last}"


def check(
    command: Sequence[str], file: Path, timeout: float = TIMEOUT, known: Collection[str] | None = None
) -> str | None:
    """What is wrong with the command's answer for a vector; None if it passed. `known`: the reader's features; None: all."""
    base = base_of(file)
    more = [] if base is None else ["--base", str(base)]
    wanted = [] if is_good(file) else [expected_rule(file)]
    if is_beyond(file, known):
        wanted.append("unknown-feature")
    return judge([*command, *more, str(file)], timeout, wanted, lambda: expected_content(file))


def cases(folder: Path = VECTORS, only: str = "") -> list[Path]:
    """The cases of applying whose `apply/NAME.json` matches `only`."""
    return [file for file in sorted(folder.glob("apply/*.json")) if re.search(only, f"apply/{file.name}")]


def expected_outcome(case: Any) -> Any:
    """What the command must print for a case that is not refused."""
    slices = [part["hex"] for part in case.get("slices", [])]
    return {"result": case["result"], "slices": slices, "undone": case["base"]}


def check_apply(command: Sequence[str], file: Path, timeout: float = TIMEOUT) -> str | None:
    """What is wrong with the command's answer for a case of applying; None if it passed."""
    case = json.loads(file.read_text("utf-8"))
    wanted = [case["refused"]] if "refused" in case else []
    return judge([*command, str(file)], timeout, wanted, lambda: expected_outcome(case))


def run(
    command: Sequence[str],
    only: str = "",
    folder: Path = VECTORS,
    timeout: float = TIMEOUT,
    known: Collection[str] | None = None,
    *,
    apply: bool = False,
) -> list[tuple[Path, str | None]]:
    """Check all vectors, or with `apply` all cases, several at once: each file, and what is wrong with the answer."""
    files = cases(folder, only) if apply else vectors(folder, only)

    def checked(file: Path) -> str | None:
        return check_apply(command, file, timeout) if apply else check(command, file, timeout, known)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(zip(files, pool.map(checked, files), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a reader of SHiRA adapter files against the vectors.")
    parser.add_argument("--quiet", action="store_true", help="print the summary alone")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="only files whose good/NAME or bad/NAME matches"
    )
    parser.add_argument(
        "--features", metavar="NAMES", help="those that the reader knows, with commas; default: all"
    )
    parser.add_argument("--apply", action="store_true", help="check cases of applying instead of files")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the reader, with its arguments"
    )
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("which command?")
    known = None if arguments.features is None else set(filter(None, arguments.features.split(",")))
    if known is not None and known - FEATURES:
        parser.error(f"features are {', '.join(sorted(FEATURES))}")
    results = run(arguments.command, arguments.only, known=known, apply=arguments.apply)
    failures = [(file, text) for file, text in results if text is not None]
    if not arguments.quiet:
        for file, text in failures:
            print(f"{file.parent.name}/{file.name}: {text}")
    print(f"{len(results) - len(failures)} passed, {len(failures)} failed")
    return 0 if results and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
