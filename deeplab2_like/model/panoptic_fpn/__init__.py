"""Panoptic feature pyramid networks (Kirillov et al., CVPR 2019): Mask R-CNN and Semantic FPN on one pyramid.

A feature pyramid feeds two branches. One is Mask R-CNN: it proposes boxes, and predicts the class and the mask of each.
The other predicts the class of every pixel, where one class, "other", stands for all things. The panoptic map shows
instances in the order of their scores, and stuff in the pixels without an instance. Semantic FPN is the second branch
alone (`semantic_only`).

Read in this order: `config.py`, `system.py`, `targets.py`, `network.py`, `losses.py`, `postprocess.py`, `oracle.py`;
then the parts in `deeplab2_like/model` that systems share: `fpn.py`, `semantic.py`, Mask R-CNN in `detection`,
`overlaps.py`, `segments.py`.

Choices where the paper is silent, and differences from the implementation in Detectron2:

- Crowds and void do not train the detector: a box with a larger share of them than `crowd_share` is not a negative
  example. In Detectron2 it is one.
- The class and box losses of the region proposals have the weight of the instance losses.
- With `fpn.grouped` (Table 3d) each branch has its own half of the channels; the pyramid's convolutions have all.
- The score of a stuff segment is the mean probability of its class, read at the resolution of the logits.
- Pixels that the semantic branch assigns to a thing class (`semantic.things: all`) are void unless they belong to an
  instance; the paper discards these predictions, too.
- Masks of several views are those of the boxes found there, averaged, see `detection/views.py`. Detectron2 predicts the
  masks of the merged boxes again in every view.
- Images are padded to a multiple of 32 with the mean color. The network sees them at their own size unless `resize` is
  set; then they are resized without antialiasing, which Detectron2 applies.
"""

from typing import TYPE_CHECKING

from deeplab2_like.lazy import lazy_exports

if TYPE_CHECKING:
    from deeplab2_like.model.panoptic_fpn.config import PanopticFPNConfig
    from deeplab2_like.model.panoptic_fpn.system import PanopticFPN

__all__ = ["PanopticFPN", "PanopticFPNConfig"]
__getattr__ = lazy_exports(__name__, {"PanopticFPN": ".system", "PanopticFPNConfig": ".config"})
