"""Makes tests/golden/tokenizer_smollm2.json with Hugging Face transformers.

Runs in an environment of its own:

    pip install transformers==5.23.0 jinja2
    python tools/make_tokenizer_goldens.py --smollm2 DIR --out tests/golden/tokenizer_smollm2.json

DIR holds SmolLM2-135M-Instruct's tokenizer.json, tokenizer_config.json and chat template, as
`tools/convert_checkpoint.py --format=huggingface` writes them. That tokenizer.json is Lumen's own
reading of the GGUF metadata: what is compared is everything after it (encoding through another
front end, decoding, the template's environment). The split of digits, which transformers gets
wrong when it reads the GGUF file itself, is compared with the rule in the tests instead.

The file lists `texts`: text, ids, text decoded with special tokens skipped; and `chats`:
messages, whether the answer is begun, and the prompt.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "The capital of France is",
    "  1998 x",
    "a1b22c333 4444 5.5 ½ ٣",
    "spaces   and\ttabs\n\n\nand lines \r\n",
    "trailing   ",
    "I'll don't WE'VE it's",
    "naïve café e\u0301 ﬁ",
    "日本語のテキスト、中文。 한국어",
    "😀👍🏽👩‍👩‍👧‍👦 flags 🇫🇷",
    "def f(x):\n\treturn x**2  # 🐍\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "x<|endoftext|>y <repo_name>z",
    "\x00\x01\x7f\u200b\ufeff\ufffd",
    "mixed العربية עברית ไทย",
]

CHATS: list[tuple[list[dict[str, str]], bool]] = [
    ([{"role": "user", "content": "What is 2+2?"}], True),
    ([{"role": "user", "content": "What is 2+2?"}], False),
    (
        [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "Name a planet.\nJust one."},
        ],
        True,
    ),
    (
        [
            {"role": "user", "content": "My name is Zoë 🎈."},
            {"role": "assistant", "content": "Hello Zoë!"},
            {"role": "user", "content": "  What is my name?  "},
        ],
        True,
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    flags = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(flags.smollm2)
    content = {"texts": texts(tokenizer), "chats": chats(tokenizer)}
    text = json.dumps(content, indent=1, ensure_ascii=True)
    flags.out.write_text(text + "\n", encoding="utf-8")


def texts(tokenizer: Any) -> list[dict[str, Any]]:
    rows = []
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        rows.append(
            {"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)}
        )
    return rows


def chats(tokenizer: Any) -> list[dict[str, Any]]:
    return [
        {
            "messages": messages,
            "begin_answer": begin,
            "prompt": tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=begin
            ),
        }
        for messages, begin in CHATS
    ]


if __name__ == "__main__":
    main()
