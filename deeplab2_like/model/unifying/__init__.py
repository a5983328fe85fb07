"""Unifying training and inference for panoptic segmentation (Li et al., CVPR 2020): the best slot of each pixel.

A feature pyramid feeds a detector, with or without masks, and a semantic head. Their predictions are combined, for each
pixel, into the potential of each detection and of each stuff class: the slots of the pixel. Affinities between pixels,
learned from the panoptic map alone, spread potentials among the pixels of the same object, so that parts outside of a
box that is too small are found, too. Training matches detections with the label and puts the loss on the potentials, so
that inference is an argmax over slots. Two thresholds select the slots, see below.

Read in this order: `config.py`, `system.py`, `targets.py`, `network.py`, `potential.py`, `losses.py`, `postprocess.py`,
`oracle.py`, `views.py` (flips and scales); then the parts in `deeplab2_like/model` that systems share: `fpn.py`,
`semantic.py`, the detector in `detection`, `segments.py`.

There is no public code. Where the paper is silent, this follows UPSNet and Panoptic FPN, and chooses:

- Potentials and affinities are not negative in variants b and c, so the probability of a slot is its share of their
  sum; in variant a, of logits, it is their softmax. A softmax of values between 0 and 1 would be nearly uniform.
- The activations of the two factors of the affinities, see `AffinityHead`.
- The default is variant c, which gives the built-in scenes a higher PQ than b. Stuff has no mask: in variant c the
  potential of its slots is its probability alone.
- Boxes have no gradient through the panoptic submodule; scores, masks and semantic probabilities have.
- The label is compared at the resolution of the semantic map, at the pixel in the middle of each cell. Instances beyond
  `loss.max_instances`, crowds and void are left out.
- In training every detection above `roi.score_threshold` is a slot, so that the loss lowers the scores of wrong ones,
  and the matching with the label removes duplicates. The map has no label to match with. There, detections below
  `postprocess.score_threshold` are no slots, as in UPSNet, whose threshold is 0.6, and neither are detections whose
  mask is covered by better ones by more than `postprocess.overlap_threshold`. These two rules are the difference
  between training and inference.
- The map is made at full size, as in UPSNet: there boxes and masks are pasted, and class probabilities and affinity
  updates are upsampled bilinearly. Affinities are applied at the resolution of the semantic map.
- Each detection is matched with the instance that it overlaps most, where equation 5 asks for the best of all
  assignments; of several detections of one instance only the best is a slot. With `loss.detections: truth` each
  instance is its own slot.
- Without masks, those of `instances` are the segments of the panoptic map.
- Images are padded to a multiple of 32 with the mean color. The network sees them at their own size unless `resize` is
  set; then they are resized without antialiasing.
"""

from typing import TYPE_CHECKING

from deeplab2_like.lazy import lazy_exports

if TYPE_CHECKING:
    from deeplab2_like.model.unifying.config import UnifyingConfig
    from deeplab2_like.model.unifying.system import Unifying

__all__ = ["Unifying", "UnifyingConfig"]
__getattr__ = lazy_exports(__name__, {"Unifying": ".system", "UnifyingConfig": ".config"})
