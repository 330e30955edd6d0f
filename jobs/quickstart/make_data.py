"""Write the quickstart's task data: data/<task>/{train,validation}.parquet beside this file, from the toy world.

Both splits come from one draw of different texts, so no training prompt is a validation prompt. The files are
committed; run this only after changing the world: `python jobs/quickstart/make_data.py`.
"""

from pathlib import Path

import pyarrow
import pyarrow.parquet

from portllm.study.generators import TASKS, rows

DATA = Path(__file__).parent / "data"
SEED = 7
VALIDATION, TRAIN = 400, 1200
"""Rows. 400 give a standard error of at most 2.5 points."""


def main() -> None:
    for task in TASKS:
        found = rows(task, VALIDATION + TRAIN, SEED)
        for split, part in (("validation", found[:VALIDATION]), ("train", found[VALIDATION:])):
            path = DATA / task / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path, compression="zstd")


if __name__ == "__main__":
    main()
