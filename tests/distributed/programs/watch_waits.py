"""`metalm ARGUMENTS` on one rank, that tells where the host looked at tensors in steps that are not logged.

Arguments: first of the steps that are watched, then those of `metalm`.
"""

import json
import sys
from typing import Any

from metalm import cli
from metalm.training import loop
from training.host_reads import HostReads

_advance = loop._Run._advance


def main() -> None:
    first = int(sys.argv.pop(1))
    places: dict[int, list[str]] = {}

    def advance(run: loop._Run, upcoming: Any) -> None:
        step = run._step + 1
        if step < first or run._is_logged(step):
            return _advance(run, upcoming)
        with HostReads() as reads:
            _advance(run, upcoming)
        places[step] = reads.places
        return None

    loop._Run._advance = advance
    sys.argv[0] = "metalm"
    try:
        cli.main()
    finally:
        print("RESULT " + json.dumps(places), flush=True)


if __name__ == "__main__":
    main()
