"""``python -m tta_sync.cli`` is ``tta-sync``."""

import sys

from tta_sync.cli import main

sys.exit(main())
