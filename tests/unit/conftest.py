"""The examples that hypothesis draws are the same in every run, on every machine."""

import importlib.util

if importlib.util.find_spec("hypothesis"):  # test_extension.py runs where it is not installed
    from hypothesis import settings

    settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
    settings.load_profile("fixed")
