"""The peer of a decoder's step on one GPU: transformers' GPT-2 of the same size under DeepSpeed.

python tools/bench_gpt2.py --out peer.json
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

LENGTH, MICRO_BATCH, MICRO_BATCHES = 2048, 4, 4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6, help="timed ones, after three")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone | {"MASTER_PORT": "29511"})
    figures = measure(arguments.steps, compiled=arguments.compile)
    print(json.dumps(figures))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


def measure(num_steps: int, *, compiled: bool) -> dict[str, float]:
    """Tokens per second of the paper's language-only decoder in GPT-2's form: bf16, ZeRO 1, SDPA."""
    import deepspeed
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    given: dict[str, Any] = {"use_cache": False, "attn_implementation": "sdpa"}
    given |= {"vocab_size": 64128, "n_positions": LENGTH, "n_embd": 2048, "n_layer": 24, "n_head": 32}
    given |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    config = GPT2Config(**given)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GPT2LMHeadModel(config)
    torch.set_default_dtype(torch.float32)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        config={
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 1},
            "steps_per_print": 10**9,
        },
    )
    if compiled:
        engine.compile()
    tokens = torch.randint(0, 64000, (MICRO_BATCH, LENGTH), device="cuda")
    seconds = []
    for _ in range(3 + num_steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(MICRO_BATCHES):
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[3:])
    rate = MICRO_BATCH * MICRO_BATCHES * LENGTH / median
    return {
        "parameters": parameters,
        "step_s": median,
        "tokens_per_s": rate,
        "tflops_by_6n": 6 * parameters * rate / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


if __name__ == "__main__":
    main()
