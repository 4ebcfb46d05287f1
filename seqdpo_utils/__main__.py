"""`python -m seqdpo_utils`: see `seqdpo_utils.run`."""

import sys

from seqdpo_utils.run import main

sys.exit(main())
