"""Panoptic FCN: fully convolutional networks for panoptic segmentation (Li et al., CVPR 2021).

On every level of a feature pyramid, a position head predicts the centers of things and the regions of stuff, and a
kernel head predicts a kernel for each position. The kernel at a center represents a thing; the mean kernel of a region
represents stuff. Kernels of the same object are fused across levels. Each kernel, multiplied with one encoded feature
of high resolution, gives a mask, for things and stuff alike, without boxes and without non-maximum suppression.

Read in this order: `config.py`, `system.py`, `targets.py`, `network.py`, `losses.py` (with `dice.py`), `postprocess.py`
(with `kernels.py` and `masks.py`), `oracle.py`, `views.py` (flips and scales).

Normalization of the losses, where the formulas as printed differ from the released code; this is as in the code:

- Equation 2 divides the focal loss of centers by N_th, which section 3.1 defines as the number of thing classes. The
  code divides it by the number of pairs of object and level in the batch, so that an object counts as much in a crowded
  image as in an empty one.
- Equations 6 and 8 divide the dice losses of things and stuff together by M + N, the number of masks. The code divides
  those of things by the number of pairs of object and level, those of stuff by the number of pairs of class and level,
  and adds the two, both with the weight lambda_seg.

Choices where the paper is silent, and differences from the released code; `reference_behavior` restores the code's
behavior in the first three, for released weights:

- Void pixels and crowd regions enter no loss. In the released code they are negative examples.
- A fused kernel joins the best remaining kernel that is similar to it. The released code removes a kernel if any better
  one is similar, even if that one is removed itself: of three kernels in a chain only the first is left.
- The kernel of a region is the mean over the region, as in the paper. The released code divides by the size of the
  whole map, so that a kernel depends on the size of the image and of the padding.
- An object that fills no position of a level is predicted from the position of its center; the released code skips it.
- The mask loss uses at most `2 * loss.max_instances` pairs of object and level per image.
- Deformable convolutions start as plain ones, with offsets of zero; in the released code the offsets start at random.
- The score of a stuff segment is the mean probability over its mask, read at the resolution of the feature.
- Images are padded to a multiple of 32 with the mean color. The network sees them at their own size unless `resize` is
  set; they are then resized without antialiasing.
"""

from typing import TYPE_CHECKING

from deeplab2_like.lazy import lazy_exports

if TYPE_CHECKING:
    from deeplab2_like.model.panoptic_fcn.config import PanopticFCNConfig
    from deeplab2_like.model.panoptic_fcn.system import PanopticFCN

__all__ = ["PanopticFCN", "PanopticFCNConfig"]
__getattr__ = lazy_exports(__name__, {"PanopticFCN": ".system", "PanopticFCNConfig": ".config"})
