"""What the exports through Megatron-Bridge are, on CPU: python ask_through_bridge.py FOLDER...

Each folder holds a checkpoint `ck` of a run of through_bridge_models.py, name.txt, `config` with
its config.json, and a tokenizer.json. Written into it:

    hf, bf16           export-hf --through-bridge, in float32 and in bfloat16
    own                export-hf, where the package has a writer of its own
    doubled            the export of the checkpoint with all weights doubled
    engine, of_engine  GLM's with the names of Transformer Engine's layers, and its export
    nemo               export-nemo --hf-config
    bridge_auto, bridge_folder, bridge.pt    ask_bridge.py's of it
    known.json         architecture that Bridge and transformers have -> the same of its defaults
    sizes.json         architecture -> parameters that would be written of its default config.json,
                       which is a released model's
    refusals.json      config -> (exit code, what was said, whether a target is there)
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import torch
from ask_bridge import again, export, logits, on_cpu, one_process
from through_bridge_models import CONFIGS, DEEPSEEK, GLM, QWEN2, REFUSED, SIZES, VOCAB

from megatron_tst import cli
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.rewrite import Changes, rewrite
from megatron_tst.export import bridge_model, through_bridge
from megatron_tst.export.hf import number_of


def verb(*arguments):
    """-> (exit code, stderr)"""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main([str(argument) for argument in arguments])
    return code, said.getvalue()


def done(*arguments):
    code, said = verb(*arguments)
    assert code == 0, said


def doubled(source, target):
    model = frozenset(key for key in source.tensors if not key.startswith("optimizer."))
    changes = Changes(
        common=source.common, tensor=lambda name, offset, shard: shard * 2, edited=model
    )
    rewrite(source, target, changes)


def refusals(folder, name):
    found = {}
    for case, (of, changed, _) in REFUSED.items():
        if of != name:
            continue
        config = folder / "refused" / case.replace(" ", "_")
        config.mkdir(parents=True)
        (config / "config.json").write_text(json.dumps(CONFIGS[of] | (changed or {})))
        source, target = folder / "ck", config / "hf"
        if changed is None:
            source, whole = config / "ck", Checkpoint(source)
            kept = Changes(common=whole.common, keep=lambda name: "final_layernorm" not in name)
            rewrite(whole, source, kept)
        through = ["--through-bridge", "--hf-config", config]
        found[case] = *verb("export-hf", source, target, *through), target.exists()
    return found


def known(folder):
    """What is said of each architecture that Bridge lists, with transformers' default config.json:
    of another model than the checkpoint.
    """
    import transformers
    from megatron.bridge import AutoBridge

    found, config = {}, folder / "default"
    config.mkdir()
    for name in AutoBridge.list_supported_models():
        if (its := getattr(transformers, name, None)) is None:
            continue
        own = {"architectures": [name], "vocab_size": VOCAB}
        default = its.config_class().to_dict() | own
        (config / "config.json").write_text(json.dumps(default, default=str))
        through = ["--through-bridge", "--hf-config", config]
        target = config / "hf"
        found[name] = *verb("export-hf", folder / "ck", target, *through), target.exists()
    return found


def sizes(folder):
    """Without memory for them: the model is built on "meta", and so are the exported tensors."""
    import transformers

    found, config = {}, folder / "released"
    config.mkdir()
    for name in SIZES:
        default = getattr(transformers, name).config_class().to_dict() | {"architectures": [name]}
        (config / "config.json").write_text(json.dumps(default, default=str))
        with bridge_model.alone():
            model = through_bridge.described(config / "config.json", default["vocab_size"])
            found[name] = number_of(through_bridge.weights(model, None, config))
    return found


def main(folders):
    on_cpu()
    for folder in map(Path, folders):
        name = (folder / "name.txt").read_text()
        tokenizer = ["--tokenizer", folder / "tokenizer.json"]
        config = ["--hf-config", folder / "config"]
        through = ["--through-bridge", *config, *tokenizer]
        done("export-hf", folder / "ck", folder / "hf", "--dtype", "float32", *through)
        done("export-hf", folder / "ck", folder / "bf16", *through)
        if name == DEEPSEEK:
            done("export-hf", folder / "ck", folder / "own", "--dtype", "float32", *tokenizer)
        doubled(Checkpoint(folder / "ck"), folder / "ck2")
        done("export-hf", folder / "ck2", folder / "doubled", "--dtype", "float32", *through)
        done("export-nemo", folder / "ck", folder / "nemo", *config, *tokenizer)
        if name == GLM:
            engine = ["--layer-spec", "transformer_engine", *config, *tokenizer]
            done("export-nemo", folder / "ck", folder / "engine", *engine)
            of_engine = [folder / "of_engine", "--dtype", "float32", *through]
            done("export-hf", folder / "engine", *of_engine)
        (folder / "refusals.json").write_text(json.dumps(refusals(folder, name)))
        if name == QWEN2:
            (folder / "known.json").write_text(json.dumps(known(folder)))
            (folder / "sizes.json").write_text(json.dumps(sizes(folder)))
        if name != DEEPSEEK:  # Megatron's local attention cannot be built for it
            (iteration,) = (folder / "nemo").glob("iter_*")
            with one_process():
                answers = {"logits": logits(folder, iteration), "refusal": ""}
            if "ep2" not in name:  # of experts a run of as many processes alone goes on
                answers["resumed"] = again(folder, iteration)
            try:
                export(folder, iteration)
            except AttributeError as error:  # a mapping knows grouped experts alone, not local ones
                answers["refusal"] = str(error)
            torch.save(answers, folder / "bridge.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
