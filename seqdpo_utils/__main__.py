"""`python -m seqdpo_utils`: see `seqdpo_utils.batch.cli`."""

import sys

from seqdpo_utils.batch.cli import main

sys.exit(main())
