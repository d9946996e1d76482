"""A door to megatron_tst/pretrain_gpt.py, for launch lines that name a file.

Copy that one for a script of your own: a plain Megatron script and two lines more, marked (TST).
"""

from megatron_tst.pretrain_gpt import main

if __name__ == "__main__":
    main()
