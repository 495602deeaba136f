"""Train LongNet with Hugging Face's Trainer, save it, load it with the Auto classes and let it write.

The text is a module of Python's standard library, byte by byte. It takes well under a minute on a CPU; the model
learns what code looks like, not what it means.

python examples/huggingface_trainer.py [--steps 60] [--context 512] [--output folder]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import textwrap
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from dilated_attention_pytorch.integrations.transformers import LongNetConfig, LongNetForCausalLM, byte_tokenizer


def windows(tokens: torch.Tensor, length: int) -> list[dict[str, torch.Tensor]]:
    """Pieces of ``length`` tokens; labels are the tokens themselves, the model shifts them."""
    pieces = tokens[: len(tokens) // length * length].view(-1, length)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Held-out bits per byte before and after training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--output", type=Path, help="where the model is saved; by default a temporary folder")
    options = parser.parse_args(arguments)
    set_seed(0)

    tokenizer = byte_tokenizer()
    text = torch.tensor(tokenizer(Path(textwrap.__file__).read_text()).input_ids)
    held_out = len(text) * 7 // 8
    config = LongNetConfig(
        vocab_size=len(tokenizer),
        context_length=options.context,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        segment_lengths=[options.context // 8, options.context],
        dilation_rates=[1, 4],
        norm="pre-rms",
        ngram_sizes=[2, 3],
        short_convolution=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory() as temporary:
        output = options.output or Path(temporary)
        trainer = Trainer(
            model=LongNetForCausalLM(config),
            args=TrainingArguments(
                output_dir=str(output),
                max_steps=options.steps,
                per_device_train_batch_size=2,
                learning_rate=5e-3,
                lr_scheduler_type="cosine",
                logging_steps=max(options.steps // 5, 1),
                save_strategy="no",
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True,
            ),
            train_dataset=windows(text[:held_out], options.context),
            eval_dataset=windows(text[held_out:], options.context),
            processing_class=tokenizer,
        )
        before = trainer.evaluate()["eval_loss"] / math.log(2)
        trainer.train()
        after = trainer.evaluate()["eval_loss"] / math.log(2)
        print(f"held-out text: {before:.2f} bits per byte, after {options.steps} steps {after:.2f}")

        trainer.save_model(str(output))  # the tokenizer with it
        model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
        tokenizer.padding_side = "left"
        prompts = tokenizer(["    def ", "class TextWrapper:\n"], return_tensors="pt", padding=True)
        written = model.generate(**prompts, max_new_tokens=60, do_sample=True, top_p=0.9)
        for line in tokenizer.batch_decode(written, skip_special_tokens=True):
            print("-" * 40, line, sep="\n")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
