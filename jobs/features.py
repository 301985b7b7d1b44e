"""`ray job submit --working-dir . -- python -m jobs.features -c CONFIG [section.field=value]...`: the command `qbert-ray features`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["features", *sys.argv[1:]])
