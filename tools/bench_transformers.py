"""transformers' own `generate` in fp32, timed on request. The peer of `bench_serving.py`.

Runs in an environment of its own (Python with torch and transformers; nothing of Lumen):

    PYTHON_WITH_TORCH tools/bench_transformers.py HF_DIRECTORY [THREADS]

Reads one JSON object per line from stdin, {"prompts": [[ids], ...], "output_tokens": n}, prompts
equally long; answers each with {"seconds": s, "tokens": [[ids], ...]}: one greedy batched
generation with attention mask and KV cache, of exactly n tokens each. The first line it writes
says {"versions": {...}, "threads": n}. It ends with its stdin.
"""

import json
import sys
import time

import torch
import transformers


def main(directory: str, threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    # Lengths are forced: without an end token nothing stops early.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    answer(
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        threads=torch.get_num_threads(),
        attention=model.config._attn_implementation,
    )
    for line in sys.stdin:
        order = json.loads(line)
        prompts = torch.tensor(order["prompts"])
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=order["output_tokens"],
                do_sample=False,
                use_cache=True,
            )
        seconds = time.perf_counter() - start
        answer(seconds=seconds, tokens=output[:, prompts.shape[1] :].tolist())


def answer(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
