"""A rank of ``dilated-attention train`` under torchrun that is killed once: RANK POINT STEP and then the arguments."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from ranks import arm

from dilated_attention_pytorch.cli import app

rank, point, step = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if int(os.environ["RANK"]) == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    arm(point, step)
app(sys.argv[4:])
