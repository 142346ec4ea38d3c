"""Draw the figures in docs/figures: ``python tools/make_figures.py``; with ``--quick``, a dimension.png of fewer and smaller cases.

The adapters are the two LoRAs that ship here, converted at 1 and 5 %. Takes half an hour on two cores, nearly all of it for
dimension.png; ``--only NAME`` draws one figure.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from shira_cli import plot
from shira_cli.shipped import DATA, find_base
from shira_format.convert import lora_to_shira

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
QUERY = "encoder.layer.3.attention.self.query.weight"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="see above")
    parser.add_argument(
        "--only", metavar="NAME", help="one figure: mask, layers, spectrum, overlap, orthogonality or dimension"
    )
    options = parser.parse_args()
    base = find_base()
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, list[str | Path]] = {}
        for name in ("spam", "genre"):
            for density in (0.01, 0.05):
                path = Path(folder, f"{name} {density:.0%}")
                lora_to_shira(DATA / "loras" / name, base, path, density=density, self_contained=True)
                made[path.name] = [path]
        path = Path(folder, "spam, 5% over all tensors")
        lora_to_shira(DATA / "loras" / "spam", base, path, density=0.05, scope="global", self_contained=True)
        every = [path for paths in made.values() for path in paths]
        figures: dict[str, list[str | Path]] = {
            "mask": [*made["spam 5%"], *made["genre 5%"], "--tensor", QUERY, "--csv", Path(folder, "mask.csv")],
            "layers": [path],
            "spectrum": [*made["spam 1%"], *made["spam 5%"], "--tensor", QUERY, "--base", base, "--lora", DATA / "loras" / "spam"],
            "overlap": every,
            "orthogonality": every,
            "dimension": ["--quick"] if options.quick else [],
        }  # fmt: skip
        for kind, arguments in figures.items():
            if options.only in (None, kind):
                command = [kind, *map(str, arguments), "-o", str(FIGURES / f"{kind}.png"), "--force"]
                if code := plot.main(command):
                    return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
