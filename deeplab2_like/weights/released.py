"""Released checkpoints that `import-weights` can read, for its `--list`. Facts are from the pages that release them."""

from typing import NamedTuple


class Released(NamedTuple):
    """A released checkpoint.

    Attributes:
        model: The model, the data set, the backbone and the schedule.
        quality: PQ that the page of the release states, in percent, on the validation split; empty if none.
        config: The config for it.
        where: Where users get the file.
    """

    model: str
    quality: str
    config: str
    where: str


_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2"
_FPN = f"{_DETECTRON2}/COCO-PanopticSegmentation"
_DEEPLAB = f"{_DETECTRON2}/PanopticDeepLab"
_CITYSCAPES = "Cityscapes-PanopticSegmentation/panoptic_deeplab_R_52_os16_mg124_poly_90k_bs32"
_COCO = "COCO-PanopticSegmentation/panoptic_deeplab_R_52_os16_mg124_poly_200k_bs64_crop_640_640_coco_dsconv"
_DEEPLAB2 = "http://storage.googleapis.com/gresearch/tf-deeplab/checkpoint"
_TRAINFINE = "panoptic_deeplab_cityscapes_trainfine.tar.gz"
# The table of github.com/dvlab-research/PanopticFCN links these files. 400 and 512 share one.
_FCN = "https://drive.google.com/file/d"

RELEASED = (
    Released(
        "Panoptic FPN, COCO, R50, 1x",
        "39.4",
        "panoptic_fpn/coco_detectron2",
        f"{_FPN}/panoptic_fpn_R_50_1x/139514544/model_final_dbfeb4.pkl",
    ),
    Released(
        "Panoptic FPN, COCO, R50, 3x",
        "41.5",
        "panoptic_fpn/coco_detectron2",
        f"{_FPN}/panoptic_fpn_R_50_3x/139514569/model_final_c10459.pkl",
    ),
    Released(
        "Panoptic FPN, COCO, R101, 3x",
        "43.0",
        "panoptic_fpn/coco_detectron2",
        f"{_FPN}/panoptic_fpn_R_101_3x/139514519/model_final_cafdb1.pkl",
    ),
    Released(
        "Panoptic-DeepLab, Cityscapes, R52",
        "60.3",
        "panoptic_deeplab/cityscapes_detectron2",
        f"{_DEEPLAB}/{_CITYSCAPES}/model_final_bd324a.pkl",
    ),
    Released(
        "Panoptic-DeepLab, Cityscapes, R52, dsconv",
        "60.3",
        "panoptic_deeplab/cityscapes_detectron2",
        f"{_DEEPLAB}/{_CITYSCAPES}_crop_512_1024_dsconv/model_final_23d03a.pkl",
    ),
    Released(
        "Panoptic-DeepLab, COCO, R52, dsconv",
        "35.5",
        "panoptic_deeplab/coco_detectron2",
        f"{_DEEPLAB}/{_COCO}/model_final_5e6da2.pkl",
    ),
    Released(
        "Panoptic FCN, COCO, R50, 1x",
        "41.1",
        "panoptic_fcn/coco_detectron2",
        f"{_FCN}/1tD1A5Zwbtri5OejlIz9MLKwzOzjtIMHQ",
    ),
    Released(
        "Panoptic FCN-400, COCO, R50, 3x",
        "41.0",
        "panoptic_fcn/coco_400_detectron2",
        f"{_FCN}/1QBYMAznZDDX7A0Mnaq3euB23rTBzwUCf",
    ),
    Released(
        "Panoptic FCN-512, COCO, R50, 3x",
        "42.3",
        "panoptic_fcn/coco_512_detectron2",
        f"{_FCN}/1QBYMAznZDDX7A0Mnaq3euB23rTBzwUCf",
    ),
    Released(
        "Panoptic FCN-600, COCO, R50, 3x",
        "42.7",
        "panoptic_fcn/coco_600_detectron2",
        f"{_FCN}/1gIUxy1DJ_V91IwL5_jHQDMOIgHoWn_O1",
    ),
    Released(
        "Panoptic FCN, COCO, R50, 3x",
        "43.6",
        "panoptic_fcn/coco_detectron2",
        f"{_FCN}/18Re3keEkIiy7EVS-uFCNPBfT1BfT8Ng3",
    ),
    Released(
        "Panoptic FCN*, COCO, R50, 3x",
        "44.2",
        "panoptic_fcn/coco_detectron2",
        f"{_FCN}/1_VkJIhbQg9uqN49L3cDAW66zZKJE0fkI",
    ),
    Released(
        "Panoptic-DeepLab (DeepLab2), Cityscapes, R50",
        "60.2",
        "panoptic_deeplab/cityscapes_deeplab2",
        f"{_DEEPLAB2}/resnet50_os32_{_TRAINFINE}",
    ),
    Released(
        "Panoptic-DeepLab (DeepLab2), Cityscapes, R50-Beta",
        "61.2",
        "panoptic_deeplab/cityscapes_deeplab2",
        f"{_DEEPLAB2}/resnet50_beta_os32_{_TRAINFINE}",
    ),
)
