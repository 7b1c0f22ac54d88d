"""What is trained on top of a pre-trained backbone to measure it: methods for the same loop, no papers of their own.

`methods.find` knows them by the name of their file, so that the folder of such a training is a run like any other.
"""
