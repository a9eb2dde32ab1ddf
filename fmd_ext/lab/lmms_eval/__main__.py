"""Writes task files: ``python -m fmd_ext.lab.lmms_eval --benchmark NAME --data FOLDER --output TASKS``."""

from __future__ import annotations

import argparse
import sys

from fmd_ext.lab.eval.benchmarks import BENCHMARKS, DataError, load
from fmd_ext.lab.lmms_eval.tasks import write_task


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fmd_ext.lab.lmms_eval", description=__doc__)
    parser.add_argument("--benchmark", required=True, choices=list(BENCHMARKS))
    parser.add_argument("--data", required=True, metavar="FOLDER", help="with the published files and the videos")
    parser.add_argument("--questions", metavar="FILE", help="the question file, where it has another name")
    parser.add_argument("--prompt", default="default", metavar="NAME", help="as for fmd-ext eval")
    parser.add_argument("--allow-malformed", action="store_true", help="leave out records that are not as published")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="of the task files")
    args = parser.parse_args()
    try:
        loaded = load(args.benchmark, args.data, prompt=args.prompt, questions=args.questions)
        if loaded.malformed and not args.allow_malformed:
            told = f"{len(loaded.malformed)} records are not as published, the first: {loaded.malformed[0]}"
            raise DataError(f"{told}; --allow-malformed leaves them out")
        path = write_task(loaded, args.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(loaded.report()))
    print(f"task file: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
