"""`ray job submit --working-dir . -- python -m jobs.semantic_ids -c CONFIG [section.field=value]...`: the command `qbert-ray semantic-ids`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["semantic-ids", *sys.argv[1:]])
