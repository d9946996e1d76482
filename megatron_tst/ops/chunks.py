"""Bytes of the pieces that the losses in torch work on, by type of device. No torch."""

# fp32 copy of a few rows of the logits (torch_kernel.py): it stays in cache (CPU), or small beside
# the logits (GPU).
TORCH_KERNEL = {"cpu": 2 << 20, "cuda": 256 << 20}

# Logits of a few positions (linear_loss.py): small beside the model's activations, large enough for
# matrix products at full speed and few sums into [V, H].
LINEAR_LOSS = {"cpu": 32 << 20, "cuda": 512 << 20}


def rows_of(chunk: dict[str, int], device: str, row_bytes: int) -> int:
    """Rows of a chunk, 1 at least; on other devices ("meta") as on CPU."""
    return max(1, chunk.get(device, chunk["cpu"]) // max(1, row_bytes))
