"""Two-stage detection as in Mask R-CNN (He et al. 2017), in parts that the systems with boxes put together.

Everything is `keras.ops` in static shapes: tables of boxes have a fixed number of rows and say which of them are used.
The parts, in the order in which they are run:

- `instances.py`: the table of instances and the map of its rows, from a panoptic map (inside `tf.data`);
- `matching.py`: overlaps of boxes with instances and crowds, seeded sampling;
- `rpn.py`: anchors, region proposal network, its losses, proposals;
- `roi_pooling.py`: features of boxes from a pyramid;
- `roi_heads.py`: training samples, box head and mask head with their losses, final detections;
- `masks.py`: mask targets from the map of rows, and masks pasted into the image;
- `detector.py`: all of them as one layer.
"""

from deeplab2_like.model.detection.detector import Detector
from deeplab2_like.model.detection.instances import class_and_instance_targets, instance_targets
from deeplab2_like.model.detection.masks import mask_targets, paste_masks, paste_weights
from deeplab2_like.model.detection.roi_heads import (
    BoxHead,
    MaskHead,
    RoiConfig,
    box_losses,
    detect,
    mask_loss,
    masks_of_classes,
    sample_rois,
)
from deeplab2_like.model.detection.roi_pooling import roi_align
from deeplab2_like.model.detection.rpn import (
    RpnConfig,
    RpnHead,
    make_anchors,
    propose,
    rpn_losses,
    sample_anchors,
)

__all__ = [
    "BoxHead",
    "Detector",
    "MaskHead",
    "RoiConfig",
    "RpnConfig",
    "RpnHead",
    "box_losses",
    "class_and_instance_targets",
    "detect",
    "instance_targets",
    "make_anchors",
    "mask_loss",
    "mask_targets",
    "masks_of_classes",
    "paste_masks",
    "paste_weights",
    "propose",
    "roi_align",
    "rpn_losses",
    "sample_anchors",
    "sample_rois",
]
