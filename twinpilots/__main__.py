"""`python -m twinpilots` is `twinpilots`."""

import sys

from twinpilots.cli import main

if __name__ == "__main__":
    sys.exit(main())
