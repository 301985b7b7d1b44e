"""`ray job submit --working-dir . -- python -m jobs.train_fusion -c CONFIG [section.field=value]...`: the command `qbert-ray train-fusion`."""

import sys

from qbert_ray.cli import main

if __name__ == "__main__":
    main(["train-fusion", *sys.argv[1:]])
