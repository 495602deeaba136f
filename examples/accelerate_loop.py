"""Train a bidirectional LongNet to fill in masked bytes, in a plain loop with Hugging Face's Accelerate.

``accelerate launch examples/accelerate_loop.py`` runs the same loop on the GPUs of a machine. The text is a module of
Python's standard library; it takes well under a minute on a CPU.

python examples/accelerate_loop.py [--steps 60] [--context 512]
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from dilated_attention_pytorch.integrations.transformers import LongNetConfig, LongNetForMaskedLM, byte_tokenizer


def masked(tokens: torch.Tensor, mask_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with a part hidden, and labels that ask for those alone; single bytes and short runs."""
    starts = torch.rand(tokens.shape, device=tokens.device) < 0.08
    hidden = starts | starts.roll(1, dims=1)
    return tokens.masked_fill(hidden, mask_token), tokens.masked_fill(~hidden, -100)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Loss over masked bytes, in nats, of the first and the last steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args(arguments)
    set_seed(0)
    accelerator = Accelerator()

    tokenizer = byte_tokenizer(["<mask>"])
    text = torch.tensor(tokenizer(Path(textwrap.__file__).read_text()).input_ids)
    pieces = text[: len(text) // options.context * options.context].view(-1, options.context)
    config = LongNetConfig(
        vocab_size=len(tokenizer),
        context_length=options.context,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        segment_lengths=[options.context // 8, options.context],
        dilation_rates=[1, 4],
        norm="pre-rms",
    )
    model = LongNetForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    loader = torch.utils.data.DataLoader(pieces, batch_size=2, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    losses: list[float] = []
    while len(losses) < options.steps:
        for batch in loader:
            inputs, labels = masked(batch, tokenizer.mask_token_id)
            with accelerator.autocast():
                loss = model(inputs, labels=labels).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
            if len(losses) == options.steps:
                break
    few = max(options.steps // 10, 1)
    before, after = sum(losses[:few]) / few, sum(losses[-few:]) / few
    accelerator.print(f"loss over masked bytes: {before:.2f} nats at first, {after:.2f} after {options.steps} steps")

    trained = accelerator.unwrap_model(model).eval()
    shown = tokenizer("def wrap(text, width=70):").input_ids
    tokens = torch.tensor([shown], device=trained.device)
    tokens[0, 13:15] = tokenizer.mask_token_id
    with torch.no_grad():
        found = trained(tokens).logits[..., :256].argmax(-1)
    filled = torch.where(tokens == tokenizer.mask_token_id, found, tokens)[0]
    accelerator.print(f"{tokenizer.decode(tokens[0])} -> {tokenizer.decode(filled)}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
