"""`python -m shoal.cli` is `shoal`: for processes that start another, whatever the PATH says."""

import sys

from shoal.cli.main import main

sys.exit(main())
