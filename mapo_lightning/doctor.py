"""``python -m mapo_lightning.doctor`` is another way to type ``mapo-doctor``."""

import sys

from mapo_lightning.run.doctor import main

if __name__ == "__main__":
    sys.exit(main())
