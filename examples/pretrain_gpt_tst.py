"""The training script of the package, for launch lines that name a file: megatron_tst/pretrain_gpt.py.

Copy that one for a script of your own: it is a plain Megatron script but for two lines, marked (TST).
"""

from megatron_tst.pretrain_gpt import main

if __name__ == "__main__":
    main()
