"""Out of memory in a step: idle buffers are given up, the same is computed once more in parts, and then it raises."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.memory import SimplePool
from dilated_attention_pytorch.parallel.comm import Traffic, exchange
from dilated_attention_pytorch.parallel.retry import PARTS, backward_in_parts, forward_in_parts, retrying


def formula(query, key, value, scale, hidden, factors):
    """Attention written out, with hidden keys and dropped pairs."""
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(hidden.unsqueeze(-2), -torch.inf)
    lse = scores.logsumexp(-1)
    return (torch.exp(scores - lse.unsqueeze(-1)) * factors) @ value, lse


@pytest.mark.parametrize("rows", [1, 5, 8, 19])
def test_parts_compute_the_same_as_the_formula(rows):
    q, k, v = (torch.randn(2, 3, n, 6, dtype=torch.float64, requires_grad=True) for n in (rows, 11, 11))
    hidden = torch.rand(2, 3, 11) < 0.3
    hidden[..., 0] = False
    factors = (torch.rand(2, 3, rows, 11, dtype=torch.float64) < 0.7) / 0.7
    out, lse = formula(q, k, v, 0.3, hidden, factors)
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad([out, lse], [q, k, v], [grad, grad_lse])
    given = {"hidden": hidden, "keep": lambda first, last: factors[:, :, first:last]}
    q, k, v, out, lse = (t.detach() for t in (q, k, v, out, lse))
    for parts in (1, PARTS):
        for got, gold in zip(forward_in_parts(parts, q, k, v, 0.3, **given), (out, lse), strict=True):
            torch.testing.assert_close(got, gold, rtol=1e-12, atol=1e-12)
        delta = (grad * out).sum(-1) - grad_lse
        found = backward_in_parts(parts, grad, delta, q, k, v, out, lse, 0.3, **given)
        for got, gold in zip(found, expected, strict=True):
            torch.testing.assert_close(got, gold, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9")]
)
def test_a_second_attempt_in_parts_is_counted_and_logged(error, caplog):
    pool, traffic, asked = SimplePool(), Traffic(), []
    pool.acquire((1000,), torch.uint8, "cpu").release()

    def compute(parts):
        asked.append(parts)
        if parts == 1:
            raise error
        assert pool.stats().held == 0
        return "result"

    assert retrying(compute, pool, traffic) == "result"
    assert asked == [1, PARTS]
    assert traffic.retries == 1
    assert "freed 1000 bytes" in caplog.text


def test_a_second_lack_of_memory_raises_and_other_errors_at_once():
    asked = []

    def compute(parts, error):
        asked.append(parts)
        raise error

    with pytest.raises(torch.OutOfMemoryError):
        retrying(lambda parts: compute(parts, torch.OutOfMemoryError("out of memory")), SimplePool(), Traffic())
    assert asked == [1, PARTS]
    with pytest.raises(RuntimeError, match="shape"):
        retrying(lambda parts: compute(parts, RuntimeError("shape mismatch")), SimplePool(), Traffic())
    assert asked == [1, PARTS, 1]


def test_a_receive_buffer_is_asked_for_again_after_the_pool_gave_way(monkeypatch):
    """No process group is needed to get as far as the buffer."""

    class Scarce(SimplePool):
        failures = 2

        def acquire(self, shape, dtype, device, **options):
            self.failures -= 1
            if self.failures:
                raise torch.OutOfMemoryError("out of memory")
            return super().acquire(shape, dtype, device, **options)

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1)
    reached = RuntimeError("reached the exchange")

    def send(*arguments, **options):
        raise reached

    monkeypatch.setattr(torch.distributed, "all_to_all_single", send)
    monkeypatch.setattr("dilated_attention_pytorch.parallel.comm.watch_of", lambda group: None)
    traffic = Traffic()
    with pytest.raises(RuntimeError) as caught:
        exchange(None, {}, {0: 64}, torch.device("cpu"), traffic, Scarce())
    assert caught.value is reached
    assert traffic.retries == 1
