"""Fine-tune a stock Hugging Face model with dilated attention: longer texts at a fraction of the attention's work.

``--model`` takes any decoder that reads its attention from ``attn_implementation`` (Llama, Qwen, ...), as a folder or
a name on the hub; with ``--text`` and its tokenizer this is a real fine-tuning. By default a small Llama is first made
here and taught a module of Python's standard library with dense attention, so that there is something to fine-tune; all
of it takes well under a minute on a CPU.

python examples/finetune_stock_model.py [--steps 40] [--context 512] [--model folder --text file]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import textwrap
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dilated_attention_pytorch.integrations.transformers import byte_tokenizer, register_attention


def train(model: PreTrainedModel, tokens: torch.Tensor, *, steps: int, context: int, rate: float) -> None:
    """AdamW over random windows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        start = torch.randint(len(tokens) - context + 1, (2, 1))
        batch = tokens[start + torch.arange(context)].to(model.device)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def bits(model: PreTrainedModel, tokens: torch.Tensor, *, context: int) -> float:
    """Bits per token over text that was not trained on."""
    pieces = tokens[: max(len(tokens) // context, 1) * context].view(-1, min(context, len(tokens))).to(model.device)
    return model.eval()(input_ids=pieces, labels=pieces, use_cache=False).loss.item() / math.log(2)


def small_llama(folder: Path, tokens: torch.Tensor, *, steps: int, context: int) -> None:
    """What a pretrained model is to a real fine-tuning: a Llama over bytes, taught with dense attention."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8 * context,
    )
    model = LlamaForCausalLM(config)
    train(model, tokens, steps=steps, context=context, rate=5e-3)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Held-out bits per token: dense, dilated before, and dilated after fine-tuning."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--model", help="folder or name of a model; by default a small one is made")
    parser.add_argument("--text", type=Path, default=Path(textwrap.__file__))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    context = options.context
    register_attention()
    with tempfile.TemporaryDirectory() as temporary:
        name = options.model or temporary
        if options.model is None:
            learned = torch.tensor(list(options.text.read_bytes()))
            small_llama(
                Path(temporary), learned[: len(learned) * 7 // 8], steps=2 * options.steps, context=context // 4
            )
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokens = torch.tensor(tokenizer(options.text.read_text()).input_ids)
        teaching, held_out = tokens[: len(tokens) * 7 // 8], tokens[len(tokens) * 7 // 8 :]
        dense = bits(AutoModelForCausalLM.from_pretrained(name), held_out, context=context)

        # The pattern belongs to the configuration and is saved with the model.
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="dilated")
        model.config.dilated_segment_lengths = [context // 4, context // 2, context]
        model.config.dilated_dilation_rates = [1, 2, 4]
        before = bits(model, held_out, context=context)
        train(model, teaching, steps=options.steps, context=context, rate=2e-3)
        after = bits(model, held_out, context=context)

    # In a segment of w rows, one in r is kept and sees the others that are: w / r of w rows, (w / r) ** 2 pairs.
    branches = zip(model.config.dilated_segment_lengths, model.config.dilated_dilation_rates, strict=True)
    keys = sum(w / r**2 for w, r in branches)
    print(f"held-out text, {context} tokens of context, bits per token:")
    print(f"  dense attention {dense:.3f}; dilated ({keys / context:.0%} of the pairs) {before:.3f}")
    print(f"  dilated after {options.steps} steps of fine-tuning {after:.3f}")
    prompt = tokenizer("    def ", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=40, do_sample=True, pad_token_id=tokenizer.pad_token_id)
    print(tokenizer.decode(written[0]))
    return {"dense": dense, "before": before, "after": after}


if __name__ == "__main__":
    main()
