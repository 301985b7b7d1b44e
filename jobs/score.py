"""`ray job submit --working-dir . -- python -m jobs.score -c CONFIG [section.field=value]...`: the command `qbert-ray score`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
