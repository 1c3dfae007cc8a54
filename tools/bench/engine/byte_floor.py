"""The time that memory alone would take for a decode step: every weight and every KV read once."""

from lumen.config import ModelConfig

CHIP = "H200"
BYTES_PER_S = 4.25e12
"""What one such chip copies, read and written."""


def decode_ms(
    config: ModelConfig, item_bytes: int, batch: int, context: int, devices: int
) -> float:
    """Milliseconds of a step of `batch` rows with `context` tokens each, spread over devices.

    item_bytes: of a weight and of a number in the KV. The embedding is looked up, not read; norms
    are left out.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    weights = config.num_layers * hidden * (heads + 3 * inner) + config.vocab_size * hidden
    kv = batch * context * config.num_layers * 2 * config.num_kv_heads * config.head_dim
    return 1e3 * item_bytes * (weights + kv) / devices / BYTES_PER_S
