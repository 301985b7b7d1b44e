"""`ray job submit --working-dir . -- python -m jobs.run_pipeline -c CONFIG [section.field=value]...`: the command `qbert-ray run`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
