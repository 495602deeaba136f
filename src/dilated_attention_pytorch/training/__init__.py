"""Training a byte-level language model: text, steps, checkpoints, evaluation. The command line calls it."""

from .checkpoint import CheckpointError
from .config import RunConfig, TrainingConfig
from .distributed import Team, TeamConfig
from .loop import Reporter, Trainer
from .report import Sample, Summary, finish_run
from .session import parse_device, resume_run, start_run
from .state import load_model

__all__ = [
    "CheckpointError",
    "Reporter",
    "RunConfig",
    "Sample",
    "Summary",
    "Team",
    "TeamConfig",
    "Trainer",
    "TrainingConfig",
    "finish_run",
    "load_model",
    "parse_device",
    "resume_run",
    "start_run",
]
