"""The model being pretrained: runtime (processes and device), model, optimizer, log-probabilities, weights in and out."""
