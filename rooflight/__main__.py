"""`python -m rooflight` is the `rooflight` command."""

import sys

from rooflight.cli import main

sys.exit(main())
