"""`python -m ddpm_fast`: the command line."""

import sys

from ddpm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
