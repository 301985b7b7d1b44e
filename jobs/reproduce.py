"""`ray job submit --working-dir . -- python -m jobs.reproduce TABLE -c CONFIG -o FOLDER`: the command `qbert-ray reproduce`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["reproduce", *sys.argv[1:]])
