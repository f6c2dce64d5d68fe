#!/usr/bin/env python
"""Write the README's tables of models and modes from the tests that hold them.

    python scripts/modes_table.py            # writes them between the two comments in README.md
    python scripts/modes_table.py --check    # fails if they are not what the tests say

A tick stands for a case that `tests/test_modes.py` or `tests/test_aspects.py` runs by its law. A dash stands for a case
that they expect to be refused; what it is refused with is asked of the library itself and becomes a note.
"""

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- begin: scripts/modes_table.py -->", "<!-- end: scripts/modes_table.py -->"
SMALL = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def reason(case: Callable[[], Any]) -> str:
    """What a refused case is refused with, less what is particular to the case."""
    from torchem.errors import TorchemError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case()
    except TorchemError as error:
        said = re.sub(r", got .*?(?=; )", "", str(error), count=1)
        return re.sub(r"^(\w+): ", r"`\1`: ", said)
    raise SystemExit("scripts/modes_table.py: a case that the tests expect to be refused is not")


def table(
    models: Iterable[str],
    columns: Iterable[str],
    refused: Mapping[tuple[str, str], str],
    run: Callable[[str, str], Any],
    notes: list[str],
) -> list[str]:
    """Lines of a table; notes that are new are added."""
    columns = list(columns)
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + ":-:|" * len(columns)]
    for model in models:
        cells = []
        for column in columns:
            if (model, column) not in refused:
                cells.append("✓")
                continue
            why = reason(lambda model=model, column=column: run(model, column))
            if why not in notes:
                notes.append(why)
            cells.append("–" + str(notes.index(why) + 1).translate(SMALL))
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return lines


def generated() -> str:
    """What stands between the comments."""
    from tests import test_aspects as aspects
    from tests import test_modes as modes

    notes: list[str] = []
    first = table(modes.MODELS, modes.MODES, modes.REFUSED, modes.run, notes)
    second = table(
        modes.MODELS, aspects.ASPECTS, aspects.REFUSED, lambda model, aspect: aspects.ASPECTS[aspect](model), notes
    )
    below = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([BEGIN, "", *first, "", *second, "", "Refused, in the library's own words:", "", *below, "", END])


def replaced(text: str) -> str:
    """The README with the tables as they should be."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"README.md: expected one '{BEGIN}' and one '{END}'")
    return text[: text.index(BEGIN)] + generated() + text[text.index(END) + len(END) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the tables differ")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    readme = ROOT / "README.md"
    now = readme.read_text()
    wanted = replaced(now)
    if options.check and now != wanted:
        raise SystemExit("README.md: the tables are not what the tests say; run python scripts/modes_table.py")
    if not options.check:
        readme.write_text(wanted)


if __name__ == "__main__":
    main()
