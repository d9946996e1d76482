"""Names of losses and weightings, and the label that counts for nothing. No torch."""

TARGET_WEIGHTINGS = ("uniform", "power-law", "exponential", "first-token", "fitted-power-law")
LOSSES = ("mce", "mce-alt")
ABLATIONS = ("bce", "hinge")  # the paper found them worse than no TST at all (ablations.py)
IGNORE = -100  # the label that counts for nothing, torch's default ignore_index
