"""Composes data, rollouts, teacher, pool and objective into a run. The only part that knows ranks *and* the network."""
