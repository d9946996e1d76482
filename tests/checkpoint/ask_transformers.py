"""python ask_transformers.py FOLDER...: each holds an export `hf` and Megatron's answers.pt; writes
transformers.pt beside them.

In a process of its own: the shims that let Megatron run on CPU are not for other people's models.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3ForCausalLM


def mtp_logits(model, prompts):
    """[layers, b, L - 1, V] of the layers of multi-token prediction, each with the next token."""
    from transformers.modeling_layers import MtpModel

    mtp, answers = MtpModel.from_pretrained(model), []
    hidden, tokens = model.model(prompts).last_hidden_state, prompts
    for layer in mtp.layers:
        hidden, tokens = hidden[:, :-1], tokens[:, 1:]
        embedded, positions = mtp.embed_tokens(tokens), torch.arange(tokens.shape[1])[None]
        turns = mtp.rotary_emb(embedded, position_ids=positions)
        # no mask is the causal one
        hidden = layer(embedded, hidden, turns, None, positions, None)
        answers.append(model.lm_head(hidden))
    return torch.stack(answers)


def main(folders):
    for folder in map(Path, folders):
        asked = torch.load(folder / "answers.pt", weights_only=True)
        config = AutoConfig.from_pretrained(folder / "hf")
        mtp = getattr(config, "num_nextn_predict_layers", 0)
        # transformers leaves out DeepSeek-V3's own 61st layer, and warns of others
        DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = [
            rf"model\.layers\.{config.num_hidden_layers + k}\." for k in range(mtp)
        ]
        model, about = AutoModelForCausalLM.from_pretrained(
            folder / "hf", dtype=torch.float32, output_loading_info=True
        )
        with torch.no_grad():
            logits = model.eval()(asked["prompts"]).logits
            generated = model.generate(
                asked["prompts"], max_new_tokens=8, do_sample=False, pad_token_id=0
            )[:, 12:]
            said = mtp_logits(model, asked["prompts"]) if mtp else None
        unloaded = sorted(
            str(name)
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
            for name in about[key]
        )
        answers = {
            "class": type(model).__name__,
            "logits": logits,
            "generated": generated,
            "mtp": said,
            "unloaded": unloaded,
        }
        torch.save(answers, folder / "transformers.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
