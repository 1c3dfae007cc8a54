"""Text on both sides of the tokens: prompts in, incremental text with stop strings out."""

from serving.api.text.service import TextService, TextTokenizer
from serving.api.text.stop_matcher import StopMatcher
from serving.api.text.stream import Detokenizer, TextDelta, TextStream, Usage

__all__ = [
    "Detokenizer",
    "StopMatcher",
    "TextDelta",
    "TextService",
    "TextStream",
    "TextTokenizer",
    "Usage",
]
