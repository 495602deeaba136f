"""Hugging Face transformers: LongNet as its models, and dilated attention for stock ones (extra ``hf``).

Importing this package registers the LongNet classes with transformers' Auto classes, so that
``AutoModelForCausalLM.from_pretrained`` reads a folder that was saved with them; :func:`register_attention` is called
by whoever wants it.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .attention import DilatedMask, register_attention
from .cache import LongNetCache
from .configuration import LongNetConfig
from .conversion import checkpoint_to_pretrained, pretrained_to_checkpoint
from .heads import LongNetForCausalLM, LongNetForMaskedLM
from .modeling import LongNetModel, LongNetPreTrainedModel
from .tokenizer import byte_tokenizer

__all__ = [
    "DilatedMask",
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetModel",
    "LongNetPreTrainedModel",
    "byte_tokenizer",
    "checkpoint_to_pretrained",
    "pretrained_to_checkpoint",
    "register",
    "register_attention",
]


def register() -> None:
    """Make the LongNet classes known to transformers' Auto classes; done on import, harmless to repeat."""
    AutoConfig.register(LongNetConfig.model_type, LongNetConfig, exist_ok=True)
    AutoModel.register(LongNetConfig, LongNetModel, exist_ok=True)
    AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM, exist_ok=True)
    AutoModelForMaskedLM.register(LongNetConfig, LongNetForMaskedLM, exist_ok=True)


register()
