"""`ray job submit --working-dir . -- python -m jobs.sweep -c CONFIG [section.field=value]...`: the command `qbert-ray sweep`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
