"""Real data, the paper's network and the training run behind ``fused-dni train``."""
