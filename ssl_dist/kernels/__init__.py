"""Fused CPU kernels behind methods. Each computes what a few lines of torch say, and tests hold the two together."""
