"""`ray job submit --working-dir . -- python -m jobs.quantizer -c CONFIG [section.field=value]...`: the command `qbert-ray quantizer`."""

import sys

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main(["quantizer", *sys.argv[1:]])
