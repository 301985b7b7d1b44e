"""`ray job submit --working-dir . -- python -m jobs.ingest -c CONFIG [section.field=value]...`: the command `qbert-ray ingest`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["ingest", *sys.argv[1:]])
