"""One training run of megatron_tst.pretrain_gpt that keeps every figure: python train.py FOLDER
FLAGS

Rank r writes FOLDER/rank<r>.pt: per iteration the reported losses, the gradient norm (None where
the optimizer did not step) and the state of the gradient scaler after it; the validation losses; at
the end this rank's shards of the weights, as its distributed checkpoint names and places them.
KEEP_BATCHES=1 adds what get_batch gave this rank. KILL=3@2 lets rank 3 kill itself after its second
iteration, unless torchrun has restarted it. GRAPHS_ON_CPU=1 puts tapes in the place of CUDA graphs
(graphs_on_cpu.py). BAG_OF_ONE=1 sends bag size 1 through the superposed
code, which a user's run never does.
"""

import functools
import os
import signal
import sys

import torch

from megatron_tst import pretrain_gpt as script
from support import cp_attention


def main(folder, *flags):
    import megatron.training.training as loop
    from megatron.core.models.gpt import GPTModel

    cp_attention.install()
    if os.environ.get("GRAPHS_ON_CPU"):
        from support import graphs_on_cpu

        graphs_on_cpu.install()
    kept = {
        "steps": [],
        "scaler": [],
        "validation": [],
        "batches": [],
        "weights": [],
        "schedule_plans": 0,
    }
    if os.environ.get("BAG_OF_ONE"):
        from megatron_tst import TSTConfig
        from megatron_tst.loop import entry

        TSTConfig.enabled = property(lambda config: bool(config.iters))
        entry.check_arguments = lambda config, args: None

    def train_step(*positional, **named):
        result = stock_step(*positional, **named)
        losses, norm = result[0], result[5]
        optimizer = positional[3]
        scaler = getattr(
            getattr(optimizer, "chained_optimizers", [optimizer])[0], "grad_scaler", None
        )
        kept["scaler"].append(
            scaler and {key: float(value) for key, value in scaler.state_dict().items()}
        )
        # the log adds to `losses` what it prints: the excess over the bags' entropy
        kept["steps"].append((losses, None if norm is None else float(norm)))
        if (
            os.environ.get("KILL") == f"{os.environ['RANK']}@{len(kept['steps'])}"
            and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        ):
            print(f"killed after iteration {len(kept['steps'])}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    @functools.wraps(loop.evaluate)  # megatron_tst checks its signature
    def evaluate(*positional, **named):
        result = stock_evaluate(*positional, **named)
        kept["validation"].append({key: float(value) for key, value in (result[0] or {}).items()})
        return result

    def train(forward_step, model, *rest, **named):
        result = stock_train(forward_step, model, *rest, **named)
        kept["steps"] = [
            ({key: float(value) for key, value in losses.items()}, norm)
            for losses, norm in kept["steps"]
        ]
        kept["weights"] = [shard for chunk in model for shard in shards_of(chunk)]
        path = os.path.join(folder, f"rank{os.environ['RANK']}.pt")
        torch.save(kept, path + ".part")
        os.rename(path + ".part", path)
        return result

    def build_schedule_plan(*positional, **named):
        kept["schedule_plans"] += 1
        return stock_plan(*positional, **named)

    def get_batch(*positional, **named):
        batch = stock_batch(*positional, **named)
        if torch.is_grad_enabled():
            kept["batches"].append(
                {key: tensor.cpu() for key, tensor in zip(script.KEYS, batch) if tensor is not None}
            )
        return batch

    stock_step, loop.train_step = loop.train_step, train_step
    stock_evaluate, loop.evaluate = loop.evaluate, evaluate
    stock_train, loop.train = loop.train, train
    stock_plan, GPTModel.build_schedule_plan = GPTModel.build_schedule_plan, build_schedule_plan
    if os.environ.get("KEEP_BATCHES"):
        stock_batch, script.get_batch = script.get_batch, get_batch
    sys.argv = [sys.argv[0], *flags]
    script.main()


def shards_of(chunk):
    """(name, whole shape, place of the shard in it, shard) of every weight; nothing of
    Megatron-FSDP, which shards otherwise.
    """
    from megatron.core import mpu
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model

    if type(chunk).__name__.startswith("FullyShardedDataParallel"):  # 0.20: ...V1, ...V2
        return
    state = unwrap_model(chunk).sharded_state_dict(
        metadata={"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    )
    apply_factories(state)
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor) and entry.data is not None:
            shard = entry.data.detach().cpu().clone()
            shard = shard.reshape(*[1] * entry.prepend_axis_num, *shard.shape)
            yield entry.key, tuple(entry.global_shape), tuple(entry.global_offset), shard


if __name__ == "__main__":
    main(*sys.argv[1:])
