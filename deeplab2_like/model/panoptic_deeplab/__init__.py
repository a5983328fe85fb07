"""Panoptic-DeepLab: a simple, strong, and fast baseline for bottom-up panoptic segmentation (Cheng et al., CVPR 2020).

A backbone with atrous convolution feeds two branches, each with its own ASPP and decoder. One predicts the class of
every pixel. The other predicts, without classes, a heat map of the instances' centers of mass and, for every pixel, the
offset to its center. Pixels of things go to the center nearest to where their offset points; the majority of the
pixels' classes gives the class of the instance.

Read in this order: `config.py`, `system.py`, `targets.py`, `network.py`, `losses.py`, `postprocess.py`, `oracle.py`,
`views.py` (flips, scales and resized images).

Choices where the paper is silent, and differences from the implementation in Detectron2:

- Image pooling in the ASPP averages the whole image. Detectron2 averages a window as large as its training crop; set
  `aspp.pooling_window` for its released weights.
- Crowd regions have neither a Gaussian nor offsets; in Detectron2 they have both, and only their own pixels are left
  out of the losses. With `loss.crowd_as_instance` they are instances.
- Semantic weights for small instances leave crowd regions out.
- All of the `top_k` best centers are kept; Detectron2 keeps those strictly better than the last of them.
- The class probability of an instance's score is read at the resolution of the logits, and its objectness is the heat
  of the center itself; Detectron2 reads the heat at the center of the predicted mask.
- The hardest pixels are chosen in each image, as in DeepLab2, and their sum is divided by their number; DeepLab2
  divides by the number of those whose loss is not zero. Detectron2 chooses them in the batch of a device
  (`loss.top_k_over: batch`).
- The number of hardest pixels is rounded; Detectron2 truncates it.
- Images are padded to a multiple of 32 with the mean color, and half-pixel centers are used for all upsampling;
  DeepLab2 wants sizes of `stride * k + 1` and aligns corners.
"""

from typing import TYPE_CHECKING

from deeplab2_like.lazy import lazy_exports

if TYPE_CHECKING:
    from deeplab2_like.model.panoptic_deeplab.config import PanopticDeepLabConfig
    from deeplab2_like.model.panoptic_deeplab.system import PanopticDeepLab

__all__ = ["PanopticDeepLab", "PanopticDeepLabConfig"]
__getattr__ = lazy_exports(__name__, {"PanopticDeepLab": ".system", "PanopticDeepLabConfig": ".config"})
