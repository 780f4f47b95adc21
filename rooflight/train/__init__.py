"""Training: the data, the step, the optimizer, checkpoints and what each step should have cost."""
