"""Which tensors a model consists of, by canonical name and shape, and in which unit each lies."""

from lumen.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of one decoder layer by name within the layer; matrices are [out, in]."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, config.num_heads * head),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    for projection, count in heads.items():
        shapes[f"self_attn.{projection}_proj.weight"] = (count * head, hidden)
        if config.qkv_bias:
            shapes[f"self_attn.{projection}_proj.bias"] = (count * head,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (head,)
        shapes["self_attn.k_norm.weight"] = (head,)
    return shapes


def unit_shapes(config: ModelConfig, unit: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one unit (`unit_layers` consecutive layers) by canonical name."""
    first = unit * config.unit_layers
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(first, first + config.unit_layers)
        for name, shape in layer_shapes(config).items()
    }


def outer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors outside the units: embedding, final norm and, unless tied, the head."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table, FINAL_NORM: (config.hidden_size,)}
    if not config.tie_embeddings:
        shapes[HEAD] = table
    return shapes


def required_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model needs, outer ones first, then unit by unit."""
    shapes = outer_shapes(config)
    for unit in range(config.num_units):
        shapes |= unit_shapes(config, unit)
    return shapes


def is_harmless_extra(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold this tensor although the model does not use it.

    Old exports store the rotary frequencies, which follow from the configuration, and some store
    the tied head a second time.
    """
    if name.endswith(("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")):
        return True
    return name == HEAD and config.tie_embeddings
