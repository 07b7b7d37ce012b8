"""`python -m lmfast` is the command `lmfast`."""

import sys

from lmfast.cli import main

sys.exit(main())
