"""`ray job submit --working-dir . -- python -m jobs.assign_ids -c CONFIG [section.field=value]...`: the command `qbert-ray assign-ids`."""

import sys

from qbert_ray.cli import main

if __name__ == "__main__":
    main(["assign-ids", *sys.argv[1:]])
