"""`ray job submit --working-dir . -- python -m jobs.pretrain -c CONFIG [section.field=value]...`: the command `qbert-ray pretrain`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
