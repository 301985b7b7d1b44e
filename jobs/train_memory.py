"""`ray job submit --working-dir . -- python -m jobs.train_memory -c CONFIG [section.field=value]...`: the command `qbert-ray train-memory`."""

import sys

from qbert_ray.cli import main

if __name__ == "__main__":
    main(["train-memory", *sys.argv[1:]])
