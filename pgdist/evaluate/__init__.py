"""How good the answers are: the tasks' metrics."""
