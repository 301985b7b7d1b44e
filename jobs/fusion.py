"""`ray job submit --working-dir . -- python -m jobs.fusion -c CONFIG [section.field=value]...`: the command `qbert-ray fusion`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["fusion", *sys.argv[1:]])
