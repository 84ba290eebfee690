"""Called by the folder's path: uv run referee status, python3 ../../referee status."""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # was this folder
    from referee.commands import main

    sys.exit(main(sys.argv[1:]))
