"""``python -m torchem``: the command line."""

import sys

from torchem.cli import main

if __name__ == "__main__":
    sys.exit(main())
