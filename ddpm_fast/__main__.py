"""`python -m ddpm_fast`: the command line."""

import sys

if __name__ == "__main__":
    try:
        from ddpm_fast.cli import main

        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
