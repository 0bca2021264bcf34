"""Limits beyond which a run is warned of, and its report says so."""

from __future__ import annotations

# A log-ratio of this root mean square means that a typical ratio is exp(0.5) or exp(-0.5). PPO assumes ratios near 1.
FAR_LOG_RATIO = 0.5
# Variety is lost where less than this share is left of what the first epochs had.
LEAST_VARIETY = 1 / 3
FIRST_EPOCHS = 2
# The ratio before an epoch's first update should be 1; rounding that takes this share of the clip range is too much.
DRIFT_SHARE = 0.5
