"""LPSNet: a lightweight solution for fast panoptic segmentation (Hong et al., CVPR 2021).

A feature pyramid with global context feeds two heads. The semantic head predicts the class of every pixel. The box head
predicts, at points of several levels, the distances to the four sides of the object's box and the border-ness, which is
1 in the middle of the object and 0 at its borders; the semantic head at that point gives the class of the box. A
panoptic head without parameters then pastes the boxes, best first, onto the pixels of their class. There are no
proposals, no anchors and no mask head.

Read in this order: `config.py`, `system.py`, `targets.py`, `network.py`, `losses.py`, `postprocess.py` (with
`panoptic_head.py`), `oracle.py`, `views.py` (flips and scales).

The authors published no code. Choices where the paper is silent, after FCOS and UPSNet where these have an answer:

- The root in equation 1 covers the whole product, as in FCOS.
- In training, border-ness is measured to the outermost pixels of the mask in the row and in the column of the point. At
  inference only boxes are known: the border-ness of a pixel for a box is measured to the sides of the box.
- The predicted border-ness of a pixel, which decides conflicts between boxes, is read, upsampled bilinearly, on the
  level that the pixel has by its distances to the sides of the box.
- A point is inside a mask if the pixel that begins at the point is.
- Distances are the exponential of the output times a learned factor of the level, in strides; -log IoU is weighted by
  the true border-ness, as FCOS weights it by center-ness.
- A box has one class, the most probable thing class at its point (the mean of the four cells around it). Its score is
  that probability times its border-ness.
- Void pixels and crowd regions have no positive points, so they do not enter the losses of the box head.
- Pyramid pooling has no normalization in its grids, because a bin is too few values, and group normalization after it.
- Pixels of thing classes outside all boxes are void.
- With several scales (Table 3), boxes are merged by non-maximum suppression, class probabilities are averaged, and
  border-ness is that of the views whose scale is closest to 1: an object may be on another level in the others.
- The layers that follow the pyramid start as in RetinaNet (reference 18 of the paper): weights from N(0, 0.01), biases
  zero. Border-ness needs no prior in its bias, because only positive points train it. RetinaNet's pyramid starts as in
  the paper of feature pyramids: here, as in Detectron, with a uniform distribution that keeps the variance.
- Boxes with a score below 0.3 are left out of the panoptic map (`postprocess.score_threshold`), and stuff segments of
  fewer than 4096 pixels on COCO and 2048 on Cityscapes become void (`postprocess.stuff_area_limit`).
- The norm of the gradient is limited to 35 (`trainer.optimizer.clip_norm`), as in MMDetection's FCOS, and the learning
  rate grows linearly over the first 500 or 1000 steps. The paper gives the learning rate for COCO only; all configs use
  it. Its batch of 2 images on each of 8 GPUs is `trainer.batch_size=16`, the number over all devices.
- Images are padded to a multiple of 32 with the mean color. The network sees them at their own size unless `resize` is
  set; they are then resized without antialiasing.
"""

from typing import TYPE_CHECKING

from deeplab2_like.lazy import lazy_exports

if TYPE_CHECKING:
    from deeplab2_like.model.lpsnet.config import LPSNetConfig
    from deeplab2_like.model.lpsnet.panoptic_head import PanopticHead
    from deeplab2_like.model.lpsnet.system import LPSNet

__all__ = ["LPSNet", "LPSNetConfig", "PanopticHead"]
__getattr__ = lazy_exports(__name__, {"LPSNet": ".system", "LPSNetConfig": ".config", "PanopticHead": ".panoptic_head"})
