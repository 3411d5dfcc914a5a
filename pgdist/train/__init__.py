"""Training: the objective, the optimizer, the state, the step, the loop."""
