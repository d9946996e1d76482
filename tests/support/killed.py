"""megatron_tst.pretrain_gpt, of which one rank is sent a signal at a chosen moment, unless torchrun
has restarted it.

AT=step:6:3:KILL      rank 3, while iteration 6 is computed
AT=shard:6:3:KILL     before it writes its file of iteration 6's checkpoint; others have theirs
AT=metadata:6:0:KILL  when all the files are there, before their description
AT=emptied:6:0:KILL   when the tracker file is empty, before the iteration is in it
AT=saved:6:0:KILL     when the checkpoint is whole and the tracker names it
"""

import os
import signal
import sys
from pathlib import Path

import megatron.training.training as loop
import torch
from megatron.training import get_args

from megatron_tst import pretrain_gpt as script
from megatron_tst.checkpoint.format import TRACKER


def strike():
    print(f"{how} at {moment} of iteration {when}", flush=True)
    os.kill(main, getattr(signal, f"SIG{how}"))  # files are written by forks of this process


def on_open(event, arguments):
    global struck
    if event != "open" or struck or not isinstance(arguments[0], (str, os.PathLike)):
        return
    path, mode = Path(arguments[0]), arguments[1]
    if mode is None or not set(mode) & set("wax"):
        return
    of_iteration = path.parent.name == f"iter_{when:07d}"
    if moment == "shard" and of_iteration and path.suffix == ".distcp":
        struck = True
        strike()
    if moment == "metadata" and of_iteration and path.name.startswith(".metadata"):
        struck = True
        strike()
    args = get_args() if moment == "emptied" and path.name == TRACKER else None
    if args and args.curr_iteration == when:
        struck = True
        if path.exists():
            os.truncate(path, 0)
        strike()


def get_batch(*positional, **named):
    args = get_args()
    now = args.consumed_train_samples // args.global_batch_size + 1
    if torch.is_grad_enabled() and now == when:
        strike()
    return stock_batch(*positional, **named)


def save_checkpoint(iteration, *positional, **named):
    get_args().curr_iteration = iteration
    result = stock_save(iteration, *positional, **named)
    if moment == "saved" and iteration == when:
        strike()
    return result


if __name__ == "__main__":
    moment, when, rank, how = os.environ.get("AT", "never:0:-1:KILL").split(":")
    when, main, struck = int(when), os.getpid(), False
    stock_save, loop.save_checkpoint = loop.save_checkpoint, save_checkpoint
    if rank == os.environ["RANK"] and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        sys.addaudithook(on_open)
        if moment == "step":
            stock_batch, script.get_batch = script.get_batch, get_batch
    else:
        moment = "never"
    script.main()
