"""`ray job submit --working-dir . -- python -m jobs.refit -c CONFIG [section.field=value]...`: the command `qbert-ray refit`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["refit", *sys.argv[1:]])
