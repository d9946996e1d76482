"""megatron-tst: one verb a module, which reads flags and prints."""
