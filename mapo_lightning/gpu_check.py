"""``python -m mapo_lightning.gpu_check`` is another way to type ``mapo-gpu-check``."""

import sys

from mapo_lightning.run.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
