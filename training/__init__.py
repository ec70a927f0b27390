"""Settings, schedule, steps and log of a training run."""
