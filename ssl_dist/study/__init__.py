"""Tables and figures of a paper from one file: a run for every combination of values, measured and laid out."""
