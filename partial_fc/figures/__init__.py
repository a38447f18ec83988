"""The figures of the margin-softmax papers, drawn anew for any margins."""
