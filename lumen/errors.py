"""The root of every error Lumen raises for people.

An error says what was wrong, what was expected and what to do. `serving.errors`
adds those of requests; `serving.api.status` maps each to one gRPC and one HTTP status.
"""


class LumenError(Exception):
    """Base of all errors that a person can cause or must act on."""


class ModelConfigError(LumenError):
    """A model configuration is unknown, unsupported or contradicts itself."""


class CheckpointError(LumenError):
    """A checkpoint is missing, truncated, or does not match its configuration."""


class TokenizerError(LumenError):
    """A tokenizer or chat template cannot be loaded or applied."""


class ModelUnavailableError(LumenError):
    """A model could not be found or obtained."""
