"""The loss hook: per-token cross entropy and masks in, loss and metrics out. Knows no network."""
