"""Makes the reference outputs in tests/golden/ with Hugging Face transformers.

Runs in an environment of its own (Python 3.11; torch 2.13.0 installs on nothing later):

    pip install torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy jinja2
    python tools/make_goldens.py --out tests/golden --smollm2 DIR

DIR holds SmolLM2-135M-Instruct in Hugging Face's format: config.json, model.safetensors and the
tokenizer's files, converted from the checkpoint that `lumen.default_model` obtains. Without
--smollm2 only the tiny models are made.

Tiny models take their weights from `lumen.weight_rule`, so nothing but outputs is stored. All
arithmetic is float32 on the CPU with transformers' plain ("eager") attention.

Files: tiny.npz has for each preset P and prompt i `P/i/tokens` (uint16, the prompt and its greedy
continuation), and for each position `P/i/ids` (uint16), `P/i/logits` (float32) of the 64 best
tokens, best first, and `P/i/lse` (float32), the log-sum-exp of all logits. smollm2.npz has the same
under `i/`, but only for positions whose next token was generated. smollm2.json lists the messages
and the prompt's token ids.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lumen.hf_config import hf_config_dict
from lumen.presets import PRESETS
from lumen.weight_rule import salt, weight_values

TOP = 64
TINY_PROMPT_LENGTHS = (1, 24, 45)
TINY_NEW_TOKENS = 16
SMOLLM2_NEW_TOKENS = 64

SMOLLM2_MESSAGES: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "List three primary colors."}],
    [{"role": "user", "content": "Write a Python function that adds 1998 and  2024."}],
    [{"role": "user", "content": "Erzähle mir eine kurze Geschichte über einen Bären. 🐻"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [
        {"role": "user", "content": "My name is Emma."},
        {"role": "assistant", "content": "Hello Emma, how can I help you?"},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "Explain how tea is made, step by step.\n\nBe brief."}],
    [{"role": "user", "content": "Continue: one, two, three, four,"}],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M-Instruct, Hugging Face format")
    flags = parser.parse_args()
    torch.set_grad_enabled(False)
    flags.out.mkdir(parents=True, exist_ok=True)
    tiny: dict[str, Any] = {}
    for name in PRESETS:
        if name.startswith("tiny-"):
            tiny |= {f"{name}/{key}": value for key, value in tiny_goldens(name).items()}
            print("made", name)
    np.savez_compressed(flags.out / "tiny.npz", **tiny)
    if flags.smollm2 is not None:
        arrays, prompts = smollm2_goldens(flags.smollm2)
        np.savez_compressed(flags.out / "smollm2.npz", **arrays)
        lines = ",\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts)
        (flags.out / "smollm2.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print("made smollm2")


def tiny_goldens(preset: str) -> dict[str, Any]:
    """Reference outputs of one tiny preset."""
    config = PRESETS[preset]
    model = tiny_model(preset)
    goldens: dict[str, Any] = {}
    for i, length in enumerate(TINY_PROMPT_LENGTHS):
        # A fixed stride through the vocabulary: no random generator whose stream may change.
        prompt = [(37 * j + 11 * i + 5) % config.vocab_size for j in range(length)]
        tokens, _ = greedy(model, prompt, TINY_NEW_TOKENS)
        logits = model(torch.tensor([tokens])).logits[0]
        goldens |= {f"{i}/{k}": v for k, v in described(tokens, logits).items()}
    return goldens


def tiny_model(preset: str) -> Any:
    """transformers' model of a tiny preset with the weights of the rule, seed 0."""
    config = PRESETS[preset]
    hf_config = transformers.AutoConfig.for_model(**hf_config_dict(config, "float32"))
    model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head is not named again
            values = weight_values(name, tuple(parameter.shape), np.uint32(salt(0, name)), np)
            parameter.copy_(torch.from_numpy(values))
    return model.float().eval()


def smollm2_goldens(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reference outputs of SmolLM2-135M-Instruct, and its prompts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    arrays: dict[str, Any] = {}
    prompts = []
    for i, messages in enumerate(SMOLLM2_MESSAGES):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        prompts.append({"messages": messages, "text": text, "token_ids": prompt})
        tokens, logits = greedy(model, prompt, SMOLLM2_NEW_TOKENS)
        arrays |= {f"{i}/{k}": v for k, v in described(tokens, logits).items()}
    return arrays, prompts


def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], Any]:
    """The prompt and its greedy continuation, end tokens ignored; logits of each choice."""
    tokens, chosen_from = list(prompt), []
    cache, step = None, tokens
    for _ in range(count):
        out = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chosen_from.append(out.logits[0, -1])
        step = [int(chosen_from[-1].argmax())]
        tokens += step
    return tokens, torch.stack(chosen_from)


def described(tokens: list[int], logits: Any) -> dict[str, Any]:
    """What is stored of logits [positions, vocab]."""
    best = torch.topk(logits, TOP, dim=-1)
    return {
        "tokens": np.array(tokens, np.uint16),
        "ids": best.indices.numpy().astype(np.uint16),
        "logits": best.values.numpy().astype(np.float32),
        "lse": torch.logsumexp(logits, dim=-1).numpy().astype(np.float32),
    }


if __name__ == "__main__":
    main()
