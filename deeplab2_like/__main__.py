"""`python -m deeplab2_like` is the command `deeplab2-like`."""

import sys

from deeplab2_like.cli import main

if __name__ == "__main__":
    sys.exit(main())
