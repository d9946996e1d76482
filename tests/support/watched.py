"""megatron_tst.pretrain_gpt, watched: every raw token that it trains on, and things that happen to
it at a chosen iteration.

TOKENS=FOLDER   each rank that fetches batches appends a line of JSON for each micro-batch:
                [iteration, token ids]
AT=6:term       the last rank is sent SIGTERM while iteration 6 is computed
AT=6:hour       an hour passes
AT=6:nan        the loss is undefined, the first time that it is computed
AT=6:nans       each time
AT=6:twice      Megatron's rerun machine computes every iteration twice (its mode has no working
                flag in 0.19)
AT=6:elsewhere  the job runs on another machine
"""

import json
import os
import signal
import time
from pathlib import Path

import megatron.training.training as loop
import torch
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.training import get_args

from megatron_tst import pretrain_gpt as script


def now():
    args = get_args()
    return args.consumed_train_samples // args.global_batch_size + 1


def get_batch(*positional, **named):
    batch = stock_batch(*positional, **named)
    tokens = batch[0]
    if torch.is_grad_enabled() and tokens is not None and folder:
        with open(Path(folder) / f"rank{os.environ['RANK']}.jsonl", "a") as file:
            file.write(json.dumps([now(), tokens.flatten().tolist()]) + "\n")
    return batch


def loss_func(loss_mask, output):
    global what
    if torch.is_grad_enabled() and now() == when:
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if what == "term" and last:
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "hour":
            loop._TRAIN_START_TIME -= 3600
        if what in ("nan", "nans") and last:
            output = output * float("nan")
        what = what if what == "nans" else None
    return stock_loss(loss_mask, output)


def train(*positional, **named):
    if what == "twice":
        get_rerun_state_machine().set_mode(RerunMode.REPORT_DETERMINISM_STATS)
    if what == "elsewhere":
        here = os.uname()
        os.uname = lambda: (here[0], "elsewhere", *here[2:])
    return stock_train(*positional, **named)


if __name__ == "__main__":
    folder, (when, what) = os.environ.get("TOKENS"), os.environ.get("AT", "0:").split(":")
    when = int(when)
    # not when the fork server imported Megatron, half an hour ago on a slow machine
    loop._TRAIN_START_TIME = time.time()
    stock_batch, script.get_batch = script.get_batch, get_batch
    stock_loss, script.loss_func = script.loss_func, loss_func
    stock_train, loop.train = loop.train, train
    script.main()
