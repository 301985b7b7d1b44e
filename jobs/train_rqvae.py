"""`ray job submit --working-dir . -- python -m jobs.train_rqvae -c CONFIG [section.field=value]...`: the command `qbert-ray train-rqvae`."""

import sys

from qbert_ray.cli import main

if __name__ == "__main__":
    main(["train-rqvae", *sys.argv[1:]])
