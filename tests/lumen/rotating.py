"""Attention on rotated q, k and v, as a unit calls it."""

from lumen_kernels.rotary_write import rotate

from lumen.rope import inverse_frequencies, rotation


def rotating(attend, config, positions, kv_heads):
    """attend(layer, q, k, v, arena) for int32 positions [tokens] and a device's KV heads."""
    table = rotation(positions, inverse_frequencies(config))

    def rotated(layer, projections, arena):
        turned = rotate(projections, table, kv_heads=kv_heads, eps=config.rms_norm_eps)
        return attend(layer, *turned, arena)

    return rotated
