"""`ray job submit --working-dir . -- python -m jobs.validate -c CONFIG [section.field=value]...`: the command `qbert-ray validate`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["validate", *sys.argv[1:]])
