"""`ray job submit --working-dir . -- python -m jobs.serve -c CONFIG [section.field=value]...`: the command `qbert-ray serve`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
