"""Usual values: what is far from them is said before a run starts, and on its page."""

# The rate at its highest, for the whole batch; those of all files in configs/ lie within.
LEARNING_RATES = {"adam": (1e-5, 0.01), "adamw": (1e-5, 0.01), "sgd": (1e-3, 1.0), "lars": (0.01, 30.0)}
LEAST_SHARE_SEEN = 0.7  # of the area that evaluation sees of a square image; 224 of 256 px is 0.77
CROP_SHARE = 0.875  # side of the centre crop, of the short side that images are resized to (224 of 256)
