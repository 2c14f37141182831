"""The training of detectors: the loop, and what happens before and after it."""
