"""`python -m qbert_ray`: the command line."""

from qbert_ray.cli.main import main

if __name__ == "__main__":
    main()
