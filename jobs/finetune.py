"""`ray job submit --working-dir . -- python -m jobs.finetune -c CONFIG [section.field=value]...`: the command `qbert-ray finetune`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
