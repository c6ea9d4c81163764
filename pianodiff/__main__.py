"""`python -m pianodiff` is the command `pianodiff`."""

import sys

from .cli import main

sys.exit(main())
