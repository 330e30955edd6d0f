"""What a Ray job runs: `python jobs/ray_job.py STUDY [options of portllm run]`, on the cluster the job belongs to.

For KubeRay, Slurm and `ray job submit`; `portllm submit` needs no script.
"""

import sys

from portllm.cli import main

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(["run", sys.argv[1], "--yes", "--address", "auto", *sys.argv[2:]])
