"""`python -m moeexp`."""

import sys

from moeexp.cli import main

if __name__ == "__main__":
    sys.exit(main())
