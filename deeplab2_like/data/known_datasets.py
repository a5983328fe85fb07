"""Classes of published data sets whose files do not name them.

Ids, names and colors are those of the data sets' own tools. This module does not import TensorFlow.
"""

from pathlib import Path

from deeplab2_like.data.dataset_info import FILE_NAME, Category, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.files import read_json

# https://github.com/mcordts/cityscapesScripts, helpers/labels.py: the classes that are evaluated, with their label ids.
# The train id of a class is its position in this list.
CITYSCAPES = tuple(
    Category(*row)
    for row in (
        (7, "road", False, (128, 64, 128)),
        (8, "sidewalk", False, (244, 35, 232)),
        (11, "building", False, (70, 70, 70)),
        (12, "wall", False, (102, 102, 156)),
        (13, "fence", False, (190, 153, 153)),
        (17, "pole", False, (153, 153, 153)),
        (19, "traffic light", False, (250, 170, 30)),
        (20, "traffic sign", False, (220, 220, 0)),
        (21, "vegetation", False, (107, 142, 35)),
        (22, "terrain", False, (152, 251, 152)),
        (23, "sky", False, (70, 130, 180)),
        (24, "person", True, (220, 20, 60)),
        (25, "rider", True, (255, 0, 0)),
        (26, "car", True, (0, 0, 142)),
        (27, "truck", True, (0, 0, 70)),
        (28, "bus", True, (0, 60, 100)),
        (31, "train", True, (0, 80, 100)),
        (32, "motorcycle", True, (0, 0, 230)),
        (33, "bicycle", True, (119, 11, 32)),
    )
)

# https://github.com/cocodataset/panopticapi, panoptic_coco_categories.json.
COCO_PANOPTIC = tuple(
    Category(*row)
    for row in (
        (1, "person", True, (220, 20, 60)),
        (2, "bicycle", True, (119, 11, 32)),
        (3, "car", True, (0, 0, 142)),
        (4, "motorcycle", True, (0, 0, 230)),
        (5, "airplane", True, (106, 0, 228)),
        (6, "bus", True, (0, 60, 100)),
        (7, "train", True, (0, 80, 100)),
        (8, "truck", True, (0, 0, 70)),
        (9, "boat", True, (0, 0, 192)),
        (10, "traffic light", True, (250, 170, 30)),
        (11, "fire hydrant", True, (100, 170, 30)),
        (13, "stop sign", True, (220, 220, 0)),
        (14, "parking meter", True, (175, 116, 175)),
        (15, "bench", True, (250, 0, 30)),
        (16, "bird", True, (165, 42, 42)),
        (17, "cat", True, (255, 77, 255)),
        (18, "dog", True, (0, 226, 252)),
        (19, "horse", True, (182, 182, 255)),
        (20, "sheep", True, (0, 82, 0)),
        (21, "cow", True, (120, 166, 157)),
        (22, "elephant", True, (110, 76, 0)),
        (23, "bear", True, (174, 57, 255)),
        (24, "zebra", True, (199, 100, 0)),
        (25, "giraffe", True, (72, 0, 118)),
        (27, "backpack", True, (255, 179, 240)),
        (28, "umbrella", True, (0, 125, 92)),
        (31, "handbag", True, (209, 0, 151)),
        (32, "tie", True, (188, 208, 182)),
        (33, "suitcase", True, (0, 220, 176)),
        (34, "frisbee", True, (255, 99, 164)),
        (35, "skis", True, (92, 0, 73)),
        (36, "snowboard", True, (133, 129, 255)),
        (37, "sports ball", True, (78, 180, 255)),
        (38, "kite", True, (0, 228, 0)),
        (39, "baseball bat", True, (174, 255, 243)),
        (40, "baseball glove", True, (45, 89, 255)),
        (41, "skateboard", True, (134, 134, 103)),
        (42, "surfboard", True, (145, 148, 174)),
        (43, "tennis racket", True, (255, 208, 186)),
        (44, "bottle", True, (197, 226, 255)),
        (46, "wine glass", True, (171, 134, 1)),
        (47, "cup", True, (109, 63, 54)),
        (48, "fork", True, (207, 138, 255)),
        (49, "knife", True, (151, 0, 95)),
        (50, "spoon", True, (9, 80, 61)),
        (51, "bowl", True, (84, 105, 51)),
        (52, "banana", True, (74, 65, 105)),
        (53, "apple", True, (166, 196, 102)),
        (54, "sandwich", True, (208, 195, 210)),
        (55, "orange", True, (255, 109, 65)),
        (56, "broccoli", True, (0, 143, 149)),
        (57, "carrot", True, (179, 0, 194)),
        (58, "hot dog", True, (209, 99, 106)),
        (59, "pizza", True, (5, 121, 0)),
        (60, "donut", True, (227, 255, 205)),
        (61, "cake", True, (147, 186, 208)),
        (62, "chair", True, (153, 69, 1)),
        (63, "couch", True, (3, 95, 161)),
        (64, "potted plant", True, (163, 255, 0)),
        (65, "bed", True, (119, 0, 170)),
        (67, "dining table", True, (0, 182, 199)),
        (70, "toilet", True, (0, 165, 120)),
        (72, "tv", True, (183, 130, 88)),
        (73, "laptop", True, (95, 32, 0)),
        (74, "mouse", True, (130, 114, 135)),
        (75, "remote", True, (110, 129, 133)),
        (76, "keyboard", True, (166, 74, 118)),
        (77, "cell phone", True, (219, 142, 185)),
        (78, "microwave", True, (79, 210, 114)),
        (79, "oven", True, (178, 90, 62)),
        (80, "toaster", True, (65, 70, 15)),
        (81, "sink", True, (127, 167, 115)),
        (82, "refrigerator", True, (59, 105, 106)),
        (84, "book", True, (142, 108, 45)),
        (85, "clock", True, (196, 172, 0)),
        (86, "vase", True, (95, 54, 80)),
        (87, "scissors", True, (128, 76, 255)),
        (88, "teddy bear", True, (201, 57, 1)),
        (89, "hair drier", True, (246, 0, 122)),
        (90, "toothbrush", True, (191, 162, 208)),
        (92, "banner", False, (255, 255, 128)),
        (93, "blanket", False, (147, 211, 203)),
        (95, "bridge", False, (150, 100, 100)),
        (100, "cardboard", False, (168, 171, 172)),
        (107, "counter", False, (146, 112, 198)),
        (109, "curtain", False, (210, 170, 100)),
        (112, "door-stuff", False, (92, 136, 89)),
        (118, "floor-wood", False, (218, 88, 184)),
        (119, "flower", False, (241, 129, 0)),
        (122, "fruit", False, (217, 17, 255)),
        (125, "gravel", False, (124, 74, 181)),
        (128, "house", False, (70, 70, 70)),
        (130, "light", False, (255, 228, 255)),
        (133, "mirror-stuff", False, (154, 208, 0)),
        (138, "net", False, (193, 0, 92)),
        (141, "pillow", False, (76, 91, 113)),
        (144, "platform", False, (255, 180, 195)),
        (145, "playingfield", False, (106, 154, 176)),
        (147, "railroad", False, (230, 150, 140)),
        (148, "river", False, (60, 143, 255)),
        (149, "road", False, (128, 64, 128)),
        (151, "roof", False, (92, 82, 55)),
        (154, "sand", False, (254, 212, 124)),
        (155, "sea", False, (73, 77, 174)),
        (156, "shelf", False, (255, 160, 98)),
        (159, "snow", False, (255, 255, 255)),
        (161, "stairs", False, (104, 84, 109)),
        (166, "tent", False, (169, 164, 131)),
        (168, "towel", False, (225, 199, 255)),
        (171, "wall-brick", False, (137, 54, 74)),
        (175, "wall-stone", False, (135, 158, 223)),
        (176, "wall-tile", False, (7, 246, 231)),
        (177, "wall-wood", False, (107, 255, 200)),
        (178, "water-other", False, (58, 41, 149)),
        (180, "window-blind", False, (183, 121, 142)),
        (181, "window-other", False, (255, 73, 97)),
        (184, "tree-merged", False, (107, 142, 35)),
        (185, "fence-merged", False, (190, 153, 153)),
        (186, "ceiling-merged", False, (146, 139, 141)),
        (187, "sky-other-merged", False, (70, 130, 180)),
        (188, "cabinet-merged", False, (134, 199, 156)),
        (189, "table-merged", False, (209, 226, 140)),
        (190, "floor-other-merged", False, (96, 36, 108)),
        (191, "pavement-merged", False, (96, 96, 96)),
        (192, "mountain-merged", False, (64, 170, 64)),
        (193, "grass-merged", False, (152, 251, 152)),
        (194, "dirt-merged", False, (208, 229, 228)),
        (195, "paper-merged", False, (206, 186, 171)),
        (196, "food-other-merged", False, (152, 161, 64)),
        (197, "building-other-merged", False, (116, 112, 0)),
        (198, "rock-merged", False, (0, 114, 143)),
        (199, "wall-other-merged", False, (102, 102, 156)),
        (200, "rug-merged", False, (250, 141, 255)),
    )
)

# The data sets that a name stands for, as `convert` describes them in the records that it writes.
DATA_SETS = {
    "cityscapes": DatasetInfo("cityscapes", CITYSCAPES),
    "coco": DatasetInfo("coco", COCO_PANOPTIC),
}


def find_data_set(name_or_file: str) -> DatasetInfo:
    """Finds the classes of a data set.

    Args:
        name_or_file: One of `DATA_SETS`, or a JSON file: a `dataset_info.json`, or a COCO panoptic JSON.

    Raises:
        UserError: If the name is unknown, or the file does not describe a data set.
    """
    if not name_or_file.endswith(".json"):
        if name_or_file not in DATA_SETS:
            raise UserError(
                f"Data set '{name_or_file}' is unknown; give {', '.join(DATA_SETS)}, or a file that ends in .json."
            )
        return DATA_SETS[name_or_file]
    path = Path(name_or_file)
    if path.name == FILE_NAME:
        return DatasetInfo.load(path.parent)
    content = read_json(path, "JSON file of the data set")
    if not isinstance(content, dict) or not isinstance(content.get("categories"), list):
        raise UserError(f"'{path}' has no list 'categories'; give a {FILE_NAME} or a COCO panoptic JSON.")
    return DatasetInfo.from_coco_categories(content["categories"], name=path.stem)


# https://github.com/nightrome/cocostuff, labels.txt: the stuff classes of COCO-Stuff with their category ids, which
# follow those of COCO's things.
# fmt: off
_COCO_STUFF_NAMES = (
    "banner", "blanket", "branch", "bridge", "building-other", "bush", "cabinet", "cage", "cardboard", "carpet",
    "ceiling-other", "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff",
    "dirt", "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile", "floor-wood",
    "flower", "fog", "food-other", "fruit", "furniture-other", "grass", "gravel", "ground-other", "hill", "house",
    "leaves", "light", "mat", "metal", "mirror-stuff", "moss", "mountain", "mud", "napkin", "net", "paper",
    "pavement", "pillow", "plant-other", "plastic", "platform", "playingfield", "railing", "railroad", "river",
    "road", "rock", "roof", "rug", "salad", "sand", "sea", "shelf", "sky-other", "skyscraper", "snow",
    "solid-other", "stairs", "stone", "straw", "structural-other", "table", "tent", "textile-other", "towel",
    "tree", "vegetable", "wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone", "wall-tile",
    "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood",
)
# fmt: on
COCO_STUFF = tuple(enumerate(_COCO_STUFF_NAMES, start=92))

# http://host.robots.ox.ac.uk/pascal/VOC: the 20 classes of Pascal VOC, all things. The id of a class in the PNGs is its
# position in this list, counted from 1.
# fmt: off
VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on

# http://sceneparsing.csail.mit.edu: the 150 classes of ADE20K's challenge. The id of a class in the PNGs is its
# position in this list, counted from 1.
ADE20K_NAMES = (
    "wall",
    "building",
    "sky",
    "floor",
    "tree",
    "ceiling",
    "road, route",
    "bed",
    "window",
    "grass",
    "cabinet",
    "sidewalk, pavement",
    "person",
    "earth, ground",
    "door",
    "table",
    "mountain, mount",
    "plant",
    "curtain",
    "chair",
    "car",
    "water",
    "painting, picture",
    "sofa",
    "shelf",
    "house",
    "sea",
    "mirror",
    "rug",
    "field",
    "armchair",
    "seat",
    "fence",
    "desk",
    "rock, stone",
    "wardrobe, closet, press",
    "lamp",
    "tub",
    "rail",
    "cushion",
    "base, pedestal, stand",
    "box",
    "column, pillar",
    "signboard, sign",
    "chest of drawers, chest, bureau, dresser",
    "counter",
    "sand",
    "sink",
    "skyscraper",
    "fireplace",
    "refrigerator, icebox",
    "grandstand, covered stand",
    "path",
    "stairs",
    "runway",
    "case, display case, showcase, vitrine",
    "pool table, billiard table, snooker table",
    "pillow",
    "screen door, screen",
    "stairway, staircase",
    "river",
    "bridge, span",
    "bookcase",
    "blind, screen",
    "coffee table",
    "toilet, can, commode, crapper, pot, potty, stool, throne",
    "flower",
    "book",
    "hill",
    "bench",
    "countertop",
    "stove",
    "palm, palm tree",
    "kitchen island",
    "computer",
    "swivel chair",
    "boat",
    "bar",
    "arcade machine",
    "hovel, hut, hutch, shack, shanty",
    "bus",
    "towel",
    "light",
    "truck",
    "tower",
    "chandelier",
    "awning, sunshade, sunblind",
    "street lamp",
    "booth",
    "tv",
    "plane",
    "dirt track",
    "clothes",
    "pole",
    "land, ground, soil",
    "bannister, banister, balustrade, balusters, handrail",
    "escalator, moving staircase, moving stairway",
    "ottoman, pouf, pouffe, puff, hassock",
    "bottle",
    "buffet, counter, sideboard",
    "poster, posting, placard, notice, bill, card",
    "stage",
    "van",
    "ship",
    "fountain",
    "conveyer belt, conveyor belt, conveyer, conveyor, transporter",
    "canopy",
    "washer, automatic washer, washing machine",
    "plaything, toy",
    "pool",
    "stool",
    "barrel, cask",
    "basket, handbasket",
    "falls",
    "tent",
    "bag",
    "minibike, motorbike",
    "cradle",
    "oven",
    "ball",
    "food, solid food",
    "step, stair",
    "tank, storage tank",
    "trade name",
    "microwave",
    "pot",
    "animal",
    "bicycle",
    "lake",
    "dishwasher",
    "screen",
    "blanket, cover",
    "sculpture",
    "hood, exhaust hood",
    "sconce",
    "vase",
    "traffic light",
    "tray",
    "trash can",
    "fan",
    "pier",
    "crt screen",
    "plate",
    "monitor",
    "bulletin board",
    "shower",
    "radiator",
    "glass, drinking glass",
    "clock",
    "flag",
)
# The classes of the instance challenge, by those ids. The instance challenge's own ids are the positions in this list,
# counted from 1, too.
# fmt: off
ADE20K_THINGS = (
    8, 9, 11, 13, 15, 16, 19, 20, 21, 23, 24, 25, 28, 31, 32, 33, 34, 36, 37, 38, 39, 40, 42, 43, 44, 45, 46, 48,
    50, 51, 54, 56, 57, 58, 59, 63, 65, 66, 67, 68, 70, 71, 72, 73, 74, 75, 76, 77, 79, 81, 82, 83, 84, 86, 87, 88,
    89, 90, 91, 93, 94, 96, 98, 99, 103, 104, 105, 108, 109, 111, 112, 113, 116, 117, 119, 120, 121, 122, 124, 125,
    126, 127, 128, 130, 131, 133, 134, 135, 136, 137, 138, 139, 140, 143, 144, 145, 147, 148, 149, 150,
)
# fmt: on


def ade20k_info() -> DatasetInfo:
    """Returns the classes of ADE20K, with ids as in the panoptic JSON, from 0."""
    categories = [
        {"id": number - 1, "name": name, "isthing": int(number in ADE20K_THINGS)}
        for number, name in enumerate(ADE20K_NAMES, start=1)
    ]
    return DatasetInfo.from_coco_categories(categories, name="ade20k")
