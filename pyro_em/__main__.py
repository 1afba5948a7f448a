"""`python -m pyro_em` is the command `pyro-em`."""

import sys

from pyro_em.cli import main

if __name__ == "__main__":
    sys.exit(main())
