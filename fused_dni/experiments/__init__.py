"""Real data, the paper's network and the training run behind ``fused-dni train``.

Needs what the extra ``experiments`` installs (scikit-learn for the embedded digits, matplotlib for
the plots, rich for the progress bars); the library itself does not.
"""
