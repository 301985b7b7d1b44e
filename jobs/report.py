"""`ray job submit --working-dir . -- python -m jobs.report RUN_DIR`: the command `qbert-ray report`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
