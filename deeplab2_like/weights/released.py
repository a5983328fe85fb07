"""Released checkpoints that `import-weights` can read, for its `--list`. Facts are from the pages that release them."""

from typing import NamedTuple


class Released(NamedTuple):
    """A released checkpoint.

    Attributes:
        source: Who released it: Detectron2, DeepLab2, or PanopticFCN (the authors of Panoptic FCN).
        model: The model, its backbone, and its schedule or output stride.
        data_set: The data set that it was trained on.
        quality: PQ in percent on the validation split, as the page of the release states it.
        megabytes: Size of its weights as float32, from their shapes. The file is larger if it also holds the state of
            the optimizer.
        config: The config for it.
        address: Where users get the file.
    """

    source: str
    model: str
    data_set: str
    quality: float
    megabytes: int
    config: str
    address: str


_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2"
_FPN = f"{_DETECTRON2}/COCO-PanopticSegmentation"
_DEEPLAB = f"{_DETECTRON2}/PanopticDeepLab"
_CITYSCAPES = "Cityscapes-PanopticSegmentation/panoptic_deeplab_R_52_os16_mg124_poly_90k_bs32"
_COCO = "COCO-PanopticSegmentation/panoptic_deeplab_R_52_os16_mg124_poly_200k_bs64_crop_640_640_coco_dsconv"


def _panoptic_fpn(model: str, quality: float, megabytes: int, path: str) -> Released:
    model = f"Panoptic FPN, {model}"
    return Released("Detectron2", model, "COCO", quality, megabytes, "panoptic_fpn/coco_detectron2", f"{_FPN}/{path}")


def _panoptic_deeplab(model: str, data_set: str, quality: float, megabytes: int, path: str) -> Released:
    model, config = f"Panoptic-DeepLab, {model}", f"panoptic_deeplab/{data_set.lower()}_detectron2"
    return Released("Detectron2", model, data_set, quality, megabytes, config, f"{_DEEPLAB}/{path}")


def _panoptic_fcn(model: str, quality: float, megabytes: int, config: str, key: str) -> Released:
    # The table of github.com/dvlab-research/PanopticFCN links these files.
    address = f"https://drive.google.com/file/d/{key}"
    return Released("PanopticFCN", model, "COCO", quality, megabytes, f"panoptic_fcn/{config}", address)


def _deeplab2(model: str, data_set: str, quality: float, megabytes: int, config: str, name: str) -> Released:
    model, config = f"Panoptic-DeepLab, {model}", f"panoptic_deeplab/{data_set.lower()}_{config}"
    address = f"https://storage.googleapis.com/gresearch/tf-deeplab/checkpoint/{name}.tar.gz"
    return Released("DeepLab2", model, data_set, quality, megabytes, config, address)


# DeepLab2 states PQ by its own evaluation, too, which is up to 0.6 higher; these are by the official script.
RELEASED = (
    _panoptic_fpn("ResNet-50, 1x", 39.4, 184, "panoptic_fpn_R_50_1x/139514544/model_final_dbfeb4.pkl"),
    _panoptic_fpn("ResNet-50, 3x", 41.5, 184, "panoptic_fpn_R_50_3x/139514569/model_final_c10459.pkl"),
    _panoptic_fpn("ResNet-101, 3x", 43.0, 260, "panoptic_fpn_R_101_3x/139514519/model_final_cafdb1.pkl"),
    _panoptic_deeplab("R-52", "Cityscapes", 60.3, 239, f"{_CITYSCAPES}/model_final_bd324a.pkl"),
    _panoptic_deeplab(
        "R-52, separable", "Cityscapes", 60.3, 121, f"{_CITYSCAPES}_crop_512_1024_dsconv/model_final_23d03a.pkl"
    ),
    _panoptic_deeplab("R-52, separable", "COCO", 35.5, 122, f"{_COCO}/model_final_5e6da2.pkl"),
    _panoptic_fcn("Panoptic FCN, ResNet-50, 1x", 41.1, 148, "coco_detectron2", "1tD1A5Zwbtri5OejlIz9MLKwzOzjtIMHQ"),
    # One file for two sizes of the image.
    _panoptic_fcn(
        "Panoptic FCN-400, ResNet-50, 3x", 41.0, 148, "coco_400_detectron2", "1QBYMAznZDDX7A0Mnaq3euB23rTBzwUCf"
    ),
    _panoptic_fcn(
        "Panoptic FCN-512, ResNet-50, 3x", 42.3, 148, "coco_512_detectron2", "1QBYMAznZDDX7A0Mnaq3euB23rTBzwUCf"
    ),
    _panoptic_fcn(
        "Panoptic FCN-600, ResNet-50, 3x", 42.7, 148, "coco_600_detectron2", "1gIUxy1DJ_V91IwL5_jHQDMOIgHoWn_O1"
    ),
    _panoptic_fcn("Panoptic FCN, ResNet-50, 3x", 43.6, 148, "coco_detectron2", "18Re3keEkIiy7EVS-uFCNPBfT1BfT8Ng3"),
    _panoptic_fcn("Panoptic FCN*, ResNet-50, 3x", 44.2, 156, "coco_detectron2", "1_VkJIhbQg9uqN49L3cDAW66zZKJE0fkI"),
    _deeplab2(
        "MobileNetV3-Small, output stride 16",
        "Cityscapes",
        48.4,
        42,
        "mobilenet_v3_small_deeplab2_os16",
        "mobilenet_v3_small_os16_panoptic_deeplab_cityscapes_dwo",
    ),
    _deeplab2(
        "MobileNetV3-Large, output stride 16",
        "Cityscapes",
        55.3,
        73,
        "mobilenet_v3_large_deeplab2_os16",
        "mobilenet_v3_large_os16_panoptic_deeplab_cityscapes_dwo",
    ),
    _deeplab2(
        "ResNet-50, output stride 32",
        "Cityscapes",
        59.8,
        220,
        "deeplab2",
        "resnet50_os32_panoptic_deeplab_cityscapes_trainfine",
    ),
    _deeplab2(
        "ResNet-50-Beta, output stride 32",
        "Cityscapes",
        60.8,
        221,
        "resnet50_beta_deeplab2",
        "resnet50_beta_os32_panoptic_deeplab_cityscapes_trainfine",
    ),
    _deeplab2(
        "ResNet-50, output stride 32", "COCO", 34.1, 220, "deeplab2", "resnet50_os32_panoptic_deeplab_coco_train_2"
    ),
    _deeplab2(
        "ResNet-50-Beta, output stride 32",
        "COCO",
        34.6,
        221,
        "resnet50_beta_deeplab2",
        "resnet50beta_os32_panoptic_deeplab_coco_train",
    ),
    _deeplab2(
        "ResNet-50, output stride 16", "COCO", 35.1, 220, "deeplab2_os16", "resnet50_os16_panoptic_deeplab_coco_train"
    ),
    _deeplab2(
        "ResNet-50-Beta, output stride 16",
        "COCO",
        35.2,
        221,
        "resnet50_beta_deeplab2_os16",
        "resnet50beta_os16_panoptic_deeplab_coco_train",
    ),
)
