"""What Megatron-Bridge makes of NeMo exports, on CPU: python ask_bridge.py FOLDER...

Each folder holds a `nemo` export, the `hf` export of the same checkpoint and Megatron's answers.pt.
Written beside them:

    bridge_auto      Bridge's own Hugging Face export: all that it says comes from run_config.yaml
    bridge_folder    the same with the names of `hf`
    bridge.pt        logits of the model that Bridge loads, and why Bridge could not export
    bridge_again     the checkpoint, optimizer state included, resumed and saved by Bridge
"""

import contextlib
import functools
import importlib.machinery
import os
import sys
import types
from pathlib import Path

import torch

from megatron_tst.cpu import enable_if_asked


class Absent(torch.nn.Module):
    """Stands for every class of a library that is not here."""


def stand_in(*names):
    """Modules whose every name is Absent: what Bridge imports unguarded but does not use on CPU."""

    def named(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent

    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__, module.__version__, module.__getattr__ = [], "0.0.1", named
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


def export(folder, iteration):
    from megatron.bridge import AutoBridge

    bridges = {
        "bridge_auto": lambda: AutoBridge.from_auto_config(
            str(folder / "nemo"), str(iteration / "hf")
        ),
        "bridge_folder": lambda: AutoBridge.from_hf_pretrained(str(folder / "hf")),
    }
    for name, make in bridges.items():
        make().export_ckpt(str(folder / "nemo"), str(folder / name), show_progress=False)


@contextlib.contextmanager
def one_process():
    from megatron.bridge.training.model_load_save import temporary_distributed_context
    from megatron.core import tensor_parallel

    with temporary_distributed_context(backend="gloo"):
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        yield


def logits(folder, iteration):
    from megatron.bridge.training.model_load_save import load_megatron_model

    (model,) = load_megatron_model(str(iteration), use_cpu_init=True)
    prompts = torch.load(folder / "answers.pt", weights_only=True)["prompts"]
    with torch.no_grad():
        return model.eval()(prompts, torch.arange(prompts.shape[1]).expand_as(prompts), None)


def again(folder, iteration):
    """Bridge's own pretrain resumes, saves what it has loaded, and trains one iteration more. ->
    what it says of its state
    """
    from megatron.bridge.training import setup
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.checkpointing import read_run_config, save_checkpoint
    from megatron.bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        DistributedDataParallelConfig,
        DistributedInitConfig,
        LoggerConfig,
        MockGPTDatasetConfig,
        RNGConfig,
        TokenizerConfig,
        TrainingConfig,
    )
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.initialize import initialize_megatron
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.utils.instantiate_utils import instantiate

    seen = {}

    class Watch(Callback):
        def on_train_start(self, context):
            seen["counts"] = {
                name: count.item() for name, count in context.state.train_state.state_dict().items()
            }
            save_checkpoint(
                context.state,
                context.model,
                context.optimizer,
                context.scheduler,
                0,
                callback_manager=None,
            )

        def on_train_step_end(self, context):
            seen["loss"], seen["grad_norm"] = (
                context.loss_dict["lm loss"].flatten()[0].item(),
                context.grad_norm,
            )

    setup.initialize_megatron = functools.partial(initialize_megatron, allow_no_cuda=True)
    config = read_run_config(str(iteration / "run_config.yaml"))
    model, optimizer, scheduler = (
        instantiate(config[name]) for name in ("model", "optimizer", "scheduler")
    )
    optimizer_too = (
        model.expert_model_parallel_size == 1
    )  # Megatron finds an expert-parallel run's groups in such a run alone
    for name in (
        "tensor_model_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    ):
        setattr(model, name, 1)
    model.sequence_parallel = False
    model.seq_length = 32
    scheduler.use_checkpoint_opt_param_scheduler = True  # the run has ended at its 10th iteration
    pretrain(
        ConfigContainer(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            rng=RNGConfig(),
            train=TrainingConfig(train_iters=11, global_batch_size=4, micro_batch_size=1),
            ddp=DistributedDataParallelConfig(
                use_distributed_optimizer=optimizer.use_distributed_optimizer
            ),
            dataset=MockGPTDatasetConfig(
                seq_length=32,
                random_seed=1,
                num_workers=0,
                dataloader_type="single",
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
            ),
            tokenizer=TokenizerConfig(
                tokenizer_type="NullTokenizer", vocab_size=model.vocab_size - 1
            ),
            checkpoint=CheckpointConfig(
                load_optim=optimizer_too,
                load=str(folder / "nemo"),
                save=str(folder / "bridge_again"),
                save_interval=11,
                async_save=False,
            ),
            logger=LoggerConfig(),
            dist=DistributedInitConfig(distributed_backend="gloo"),
        ),
        forward_step,
        callbacks=[Watch()],
    )
    return seen


def on_cpu():
    """Let Bridge load and train where neither a GPU nor Transformer Engine is."""
    os.environ["MEGATRON_TST_CPU"] = "1"
    enable_if_asked()
    import_without_engine()
    import megatron.core.datasets.utils

    # runs make; the wheel has them built
    megatron.core.datasets.utils.compile_helpers = lambda: None


def import_without_engine():
    """Let Bridge be imported where Transformer Engine is not, after Megatron has looked for it."""
    import megatron.core.extensions.transformer_engine
    import megatron.core.fp8_utils
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

    stand_in("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.ops")
    stand_in("nvidia_resiliency_ext", "nvidia_resiliency_ext.inprocess")


def main(folders):
    on_cpu()
    for folder in map(Path, folders):
        (iteration,) = (folder / "nemo").glob("iter_*")
        answers = {"refusal": ""}
        with one_process():
            answers["logits"] = logits(folder, iteration)
        answers["resumed"] = again(folder, iteration)
        try:
            export(folder, iteration)
        except AttributeError as error:  # Bridge's Qwen3-MoE names no dense layers
            answers["refusal"] = str(error)
        torch.save(answers, folder / "bridge.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
