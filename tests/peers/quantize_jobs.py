"""python quantize_jobs.py JOBS ANSWERS: a list of jobs in JSON, and what came of each.

In one process of its own, without the shims that let Megatron run on CPU, and which need not import
ModelOpt again for each. A job:
    {"tool": [flags of export_checkpoint.py], "nvfp4": ..., "file": ..., "plain": ...}  -> {"code":
    exit code, "out": ..., "err": ...}
        nvfp4: with ModelOpt's CUDA kernel replaced by the format's definition
        file: the largest file that can be written, in bytes; plain: after the bfloat16 export
    {"loss": folder of an unquantised export, "ids": .bin, "samples": ..., "length": ..., "like":
    quantised folder}  -> nats
        like: with that folder's dequantised weights, inputs rounded by its scales
    {"inputs": folder of an unquantised export, ...}  -> [{linear layer: its input's largest value}]
    on the file's start, on its end {"kill": [flags], "target": ..., "times": ...}  -> {"whole":
    ..., "absent": ..., "left": names beside the target in the end}
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import export_checkpoint
import numpy as np
import torch
from safetensors.torch import load_file

from megatron_tst.export import quantize

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def tool(flags, nvfp4=False, file=None, plain=False):
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.ExitStack() as undo,
    ):
        if nvfp4:
            import modelopt.torch.quantization.tensor_quant as tensor_quant

            undo.callback(
                setattr,
                tensor_quant,
                "dynamic_block_quantize_op",
                tensor_quant.dynamic_block_quantize_op,
            )
            undo.callback(setattr, quantize, "NEEDS_GPU", quantize.NEEDS_GPU)
            tensor_quant.dynamic_block_quantize_op, quantize.NEEDS_GPU = rounded_to_nvfp4, set()
        if file is not None:
            undo.callback(
                resource.setrlimit, resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
            )
            undo.callback(setattr, quantize, "export", quantize.export)

            def export(*args, before=quantize.export, **named):
                folder = before(*args, **named)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file, resource.RLIM_INFINITY))
                return folder

            if plain:
                quantize.export = export
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file, resource.RLIM_INFINITY))
        try:
            code = export_checkpoint.main(flags)
        except SystemExit as stop:  # argparse
            code = stop.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def rounded_to_nvfp4(x, block, amax, *bits):
    """NVFP4 as NVIDIA defines it: a block's scale in E4M3 times the tensor's, values in E2M1."""
    whole = amax.float().max() / (6 * 448)
    blocks = x.float().reshape(*x.shape[:-1], -1, block)
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / whole).clamp(max=448).to(
        torch.float8_e4m3fn
    ).float() * whole
    steps = (blocks.abs() / scale.where(scale > 0, 1)).clamp(max=6)
    nearest = E2M1[(steps.unsqueeze(-1) - E2M1).abs().argmin(-1)]
    return (nearest * blocks.sign() * scale).reshape(x.shape).to(x.dtype)


def loss(folder, ids, samples, length, like=None):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    if like is not None:
        stored = load_file(Path(like) / "model.safetensors")
        for name, module in model.named_modules():
            if f"{name}.weight_scale" in stored:
                weight, scale = (stored[f"{name}.{kind}"] for kind in ("weight", "weight_scale"))
                whole = stored.get(f"{name}.weight_scale_2")
                if whole is not None:  # two values a byte
                    weight = torch.cat([E2M1, -E2M1])[
                        torch.stack([weight & 15, weight >> 4], -1).long()
                    ].view(*scale.shape, 16)
                    scale = scale.float().unsqueeze(-1) * whole
                module.weight.data.copy_((weight.float() * scale).view(module.weight.shape))
                module.register_forward_pre_hook(
                    round_inputs(stored[f"{name}.input_scale"].float(), whole is not None)
                )
    text = text_of(ids, samples, length)[1]
    with torch.no_grad():
        chances = model(text[:, :-1]).logits.float().log_softmax(-1)
    return -chances.gather(-1, text[:, 1:, None]).double().mean().item()


def text_of(ids, samples, length):
    """(the file's first ids, its last) [samples, length + 1] each"""
    whole, need = (
        torch.from_numpy(np.fromfile(ids, np.int32).astype(np.int64)),
        samples * (length + 1),
    )
    return whole[:need].view(samples, length + 1), whole[-need:].view(samples, length + 1)


def inputs(folder, ids, samples, length):
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(
                lambda _, x, name=name: found[-1].update({name: x[0].abs().max().item()})
            )
    for text in text_of(ids, samples, length):
        found.append({})
        with torch.no_grad():
            model(text[:, :-1])
    return found


def round_inputs(scale, nvfp4):
    def rounded(module, inputs):
        x = inputs[0].float()
        if nvfp4:
            x = rounded_to_nvfp4(x, 16, scale * 6 * 448)
        else:
            x = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return x.to(inputs[0].dtype)

    return rounded


def run(flags):
    """In a process of its own. -> its id"""
    process = os.fork()
    if process == 0:
        code = 3
        try:
            code = tool(flags)["code"]
        finally:
            os._exit(code)
    return process


def kill(flags, target, times):
    target, moments = Path(target), random.Random(0)
    assert tool(flags)["code"] == 0  # and everything is imported
    shutil.rmtree(target)
    start = time.time()
    assert os.waitpid(run(flags), 0)[1] == 0
    took, whole = time.time() - start, contents(target)
    found = {"whole": 0, "absent": 0}
    for i in range(3 * times):
        if i >= times and found["whole"]:
            break
        shutil.rmtree(target, ignore_errors=True)
        process = run(flags)
        time.sleep(
            moments.uniform(0, 1.2 * took * (1 + i // times))
        )  # a busy machine may need longer than the first time
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if target.exists():
            assert contents(target) == whole
            found["whole"] += 1
        else:
            found["absent"] += 1
    shutil.rmtree(target, ignore_errors=True)
    assert os.waitpid(run(flags), 0)[1] == 0 and contents(target) == whole
    return found | {"left": sorted(os.listdir(target.parent)), "took": took}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main(jobs, answers):
    torch.set_num_threads(1)
    todo, done = json.loads(Path(jobs).read_text()), []
    for job in todo:
        name = next(iter(job))
        first = job.pop(name)
        try:
            done.append(
                {"tool": tool, "loss": loss, "inputs": inputs, "kill": kill}[name](first, **job)
            )
        except Exception:  # the other jobs' tests go on
            done.append({"code": 1, "out": "", "err": traceback.format_exc()})
    Path(answers).write_text(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
