"""Choose a rate of each arm, for the races of ``bench/races`` over a text: of the word models'
head, of the character model's table.

    CORPUS=FILE python bench/rates.py [RACE ...] [--seconds S] [--arms NAME ...]

Every arm is trained with each rate of the same grid for the same time on its own clock, by the same
seed, which no race has; what it came to on data held out is written into
``bench/races/rates.json``, of which a race takes the best. For an otherwise idle machine: an hour
and a half for all at 20 s.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial

from fused_dni.measure.race import race
from fused_dni.report.progress import Progress
from races import character_model, chosen, lacks, word_model

SEED = 0
#: By race, what makes its arms at each rate.
GRIDS = {name: partial(word_model.grid, of) for name, of in word_model.SETTINGS.items()}
GRIDS["hidden"] = character_model.grid


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(GRIDS)
    arms = list(dict.fromkeys([*word_model.ARMS, *character_model.ARMS]))
    parser.add_argument("races", nargs="*", metavar="RACE", help=f"of {', '.join(known)} (all)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each arm and rate (20)")
    parser.add_argument("--arms", nargs="+", choices=arms, metavar="NAME")
    given = parser.parse_args(arguments)
    if unknown := set(given.races) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if (why := lacks("words")) is not None:
        parser.error(why)
    path = chosen.RATES
    for name in given.races or known:
        for arm, tried in GRIDS[name]().items():
            if given.arms and arm not in given.arms:
                continue
            report = race(
                {str(multiple): make for multiple, make in tried.items()},
                seconds=given.seconds, seeds=[SEED], marks=1, progress=Progress(),
            )  # fmt: skip
            ends = {run["name"]: run["history"][-1]["loss"] for run in report["runs"]}
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            found.setdefault(name, {})[arm] = {
                multiple: round(loss, 4) for multiple, loss in ends.items() if math.isfinite(loss)
            }
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{name}, {arm}: {found[name][arm]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
