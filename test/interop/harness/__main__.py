"""`python3 -m harness`, which scripts/guest runs."""

import sys

from .runner import main

sys.exit(main())
