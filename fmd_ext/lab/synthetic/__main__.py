"""``python -m fmd_ext.lab.synthetic FOLDER``: clips and questions whose answers are known, for trying an evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path

from fmd_ext.lab.synthetic.dataset import FILES, write_dataset
from fmd_ext.lab.synthetic.scenes import SPLITS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fmd_ext.lab.synthetic", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write; files of the same names are replaced")
    parser.add_argument("--split", choices=tuple(SPLITS), default="test", help="(%(default)s)")
    parser.add_argument("--clips", type=int, default=100, help="how many (%(default)s)")
    args = parser.parse_args()
    try:
        scenes = write_dataset(args.folder, args.split, args.clips)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(scenes)} clips in {args.folder / 'video'}, questions in {', '.join(FILES.values())}")


if __name__ == "__main__":
    main()
