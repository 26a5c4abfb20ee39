"""The training loop and what it needs: optimizers, precision, metrics, previews, report."""
