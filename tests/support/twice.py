"""Several training runs of megatron_tst.pretrain_gpt in one process: python twice.py FLAGS --then
FLAGS ...

What Megatron keeps of a run is destroyed behind each, as in-process restart does
(megatron/training/inprocess_restart.py, destroy_state).
"""

import sys

from megatron_tst import pretrain_gpt as script


def main(*flags):
    from megatron.training.inprocess_restart import destroy_state

    runs = [[]]
    for flag in flags:
        if flag == "--then":
            runs.append([])
        else:
            runs[-1].append(flag)
    for i, flags_of_run in enumerate(runs):
        print(f"run {i + 1} of this process", flush=True)
        sys.argv = [sys.argv[0], *flags_of_run]
        script.main()
        destroy_state()


if __name__ == "__main__":
    main(*sys.argv[1:])
