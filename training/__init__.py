"""A training run: its settings, schedule, steps and log."""
