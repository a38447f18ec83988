"""The figures of the margin-softmax papers, drawn anew for any margins.

Here is only what partial-fc says of them before it draws one: --help should not wait for matplotlib.
"""

NAMES = ("psi", "boundaries", "circle", "toy", "sphere", "gradient", "quality", "cosines", "roc")
EPOCHS = 6  # of the small networks
