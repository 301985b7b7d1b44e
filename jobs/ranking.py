"""`ray job submit --working-dir . -- python -m jobs.ranking -c CONFIG [section.field=value]...`: the command `qbert-ray ranking`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["ranking", *sys.argv[1:]])
