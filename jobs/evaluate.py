"""`ray job submit --working-dir . -- python -m jobs.evaluate -c CONFIG [section.field=value]...`: the command `qbert-ray evaluate`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
