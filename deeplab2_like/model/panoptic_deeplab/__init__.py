"""Panoptic-DeepLab: a simple, strong, and fast baseline for bottom-up panoptic segmentation (Cheng et al., CVPR 2020).

A backbone with atrous convolution feeds two branches, each with its own ASPP and decoder. One predicts the class of
every pixel. The other predicts, without classes, a heat map of the instances' centers of mass and, for every pixel, the
offset to its center. Pixels of things go to the center nearest to where their offset points; the majority of the
pixels' classes gives the class of the instance.

Read in this order: `config.py`, `system.py`, `targets.py`, `network.py`, `losses.py`, `postprocess.py`, `oracle.py`,
`views.py` (flips, scales and resized images).

Choices where the paper is silent, and differences from DeepLab2 and from the implementation in Detectron2:

- The paper does not state the unit of the offsets whose loss it multiplies by 0.25. As in DeepLab2 and Detectron2, they
  are image pixels here, and the weight is 0.01. Offsets divided by 32 pixels and a weight of 0.25 would be nearly the
  same: 0.25 / 32 = 0.008. The loss adds the errors in y and x, as in Detectron2; DeepLab2 averages them, so its 0.01
  is 0.005 here.
- The low-level features of the instance decoder have 32 and 16 channels, as in DeepLab2; the paper does not state them,
  but its Table 1 counts that many multiply-adds. Detectron2 has 64 and 32, as in the semantic decoder.
- The convolution that loses its stride keeps the atrous rate before it, as in DeepLab2; Detectron2 gives it the new
  rate (`backbone.atrous_conversion`).
- The ResNet configs at output stride 16 have Detectron2's multi-grid, which multiplies the rates in the last stage by
  1, 2 and 4. The paper names none, and DeepLab2 has none.
- The convolutions of the ASPP are depthwise separable, as the paper's parameter counts imply and as in Detectron2's
  smaller model; DeepLab2 has full 3x3 convolutions there (`aspp.convolution`). MobileNetV3 has half the channels in its
  last stage, as in the paper and unlike in DeepLab2 (`backbone.halve_last_stage`), and its low-level features are
  outputs of blocks; DeepLab2 takes those of the depthwise convolutions (`backbone.depthwise_features`).
- The paper trains all data sets with a learning rate of 0.001 and uses a window of 7 pixels to suppress centers. On
  COCO, DeepLab2 and Detectron2 use 0.0005 and 41 pixels. The share of the hardest pixels, 0.2, is DeepLab2's; the paper
  refers to its predecessor DeeperLab, and Detectron2 takes all pixels on COCO.
- Image pooling in the ASPP averages the whole image. Detectron2 averages a window as large as its training crop; set
  `aspp.pooling_window` for its released weights.
- Crowd regions have neither a Gaussian nor offsets; in Detectron2 they have both, and only their own pixels are left
  out of the losses. With `loss.crowd_as_instance` they are instances.
- Semantic weights for small instances leave crowd regions out.
- All of the `top_k` best centers are kept; Detectron2 and, if there are more, DeepLab2 keep those strictly better than
  the last of them.
- The class probability of an instance's score is read at the resolution of the logits, and its objectness is the heat
  of the center itself; Detectron2 reads the heat at the center of the predicted mask.
- The hardest pixels are chosen in each image, as in DeepLab2, and their sum is divided by their number; DeepLab2
  divides by the number of those whose loss is not zero. Detectron2 chooses them in the batch of a device
  (`loss.top_k_over: batch`).
- The number of hardest pixels is rounded; Detectron2 truncates it.
- Images are padded to a multiple of 32 with the mean color, and half-pixel centers are used for all upsampling;
  DeepLab2 wants sizes of `stride * k + 1` and aligns corners (`resizing: aligned_corners`).
- Void is not a class, as in DeepLab2 on Cityscapes; on COCO, it is one there (`void_class`).
"""

from typing import TYPE_CHECKING

from deeplab2_like.lazy import lazy_exports

if TYPE_CHECKING:
    from deeplab2_like.model.panoptic_deeplab.config import PanopticDeepLabConfig
    from deeplab2_like.model.panoptic_deeplab.system import PanopticDeepLab

__all__ = ["PanopticDeepLab", "PanopticDeepLabConfig"]
__getattr__ = lazy_exports(__name__, {"PanopticDeepLab": ".system", "PanopticDeepLabConfig": ".config"})
