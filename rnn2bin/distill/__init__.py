"""Distillation: data windows, losses, the trainer. The only optimizer of the project."""
