"""One file per task. A task is prompts to train on and held-out prompts to measure with."""
