"""Transfer to PASCAL VOC (Everingham et al. 2010): classification, detection and segmentation on a given backbone.

`command.py` is `ssl-dist voc`. data.py reads folders in VOC's format, pretrained.py the backbone, metrics.py counts as
the devkit does; classification.py, finetune.py, detection.py and segmentation.py are the protocols, loop.py trains for
all but the first. All of it runs in one process, on a GPU where there is one.
"""
