"""The configuration of a decoder-only model of the Llama shape and its close relatives."""

from dataclasses import dataclass

from lumen.errors import ModelConfigError


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched to longer contexts.

    kind "linear" divides every frequency by `factor`; kind "llama3" follows Llama 3.1: low
    frequencies are divided by `factor`, high ones kept, those between interpolated.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and switches of one decoder. Logical sizes: nothing here knows of devices.

    family: "llama", "mistral", "qwen2" or "qwen3" (Hugging Face's model_type).
    sliding_window: keys further back than this many positions are not attended to, in every
        layer; None for full attention.
    unit_layers: decoder layers per unit; divides num_layers.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float
    rms_norm_eps: float
    unit_layers: int
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse contradictions. Raises ModelConfigError."""
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
            "num_kv_heads", "head_dim", "max_position", "unit_layers",
        ):  # fmt: skip
            value = getattr(self, name)
            if value <= 0:
                raise ModelConfigError(f"{name} is {value}; it must be a positive integer.")
        if self.num_heads % self.num_kv_heads:
            raise ModelConfigError(
                f"num_heads ({self.num_heads}) is not a multiple of num_kv_heads "
                f"({self.num_kv_heads}); grouped-query attention needs that."
            )
        if self.num_layers % self.unit_layers:
            raise ModelConfigError(
                f"unit_layers ({self.unit_layers}) does not divide num_layers "
                f"({self.num_layers}); choose one of {divisors(self.num_layers)}."
            )
        if self.head_dim % 2:
            raise ModelConfigError(
                f"head_dim is {self.head_dim}; rotary embeddings need an even one."
            )

    @property
    def num_units(self) -> int:
        """Units of `unit_layers` layers each."""
        return self.num_layers // self.unit_layers


def divisors(n: int) -> list[int]:
    """All positive divisors of n in ascending order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def default_unit_layers(num_layers: int) -> int:
    """The unit size used when nobody chose one: the largest divisor up to 5.

    Small units let a model be cut at many places; calls of a 4-layer program cost no more than
    one 32-layer program and compile faster.
    """
    return max(d for d in divisors(num_layers) if d <= 5)
