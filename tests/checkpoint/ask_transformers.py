"""python ask_transformers.py FOLDER...: each holds an export `hf` and Megatron's answers.pt; writes
transformers.pt beside them.

In a process of its own: the shims that let Megatron run on CPU are not for other people's models.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main(folders):
    for folder in map(Path, folders):
        asked = torch.load(folder / "answers.pt", weights_only=True)
        model, about = AutoModelForCausalLM.from_pretrained(
            folder / "hf", dtype=torch.float32, output_loading_info=True
        )
        with torch.no_grad():
            logits = model.eval()(asked["prompts"]).logits
            generated = model.generate(
                asked["prompts"], max_new_tokens=8, do_sample=False, pad_token_id=0
            )[:, 12:]
        unloaded = sorted(
            str(name)
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
            for name in about[key]
        )
        answers = {
            "class": type(model).__name__,
            "logits": logits,
            "generated": generated,
            "unloaded": unloaded,
        }
        torch.save(answers, folder / "transformers.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
