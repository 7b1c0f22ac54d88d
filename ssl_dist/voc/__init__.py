"""Transfer to PASCAL VOC (Everingham et al. 2010): classification, detection and segmentation on a given backbone.

`command.py` is `ssl-dist voc`. data.py reads folders in VOC's format, pretrained.py the backbone, metrics.py counts as
the devkit does; classification.py, detection.py and segmentation.py are the three protocols, loop.py trains for the
last two. All of it runs in one process, on a GPU where there is one.
"""
