"""The classes of the scenes."""

from deeplab2_like.data.dataset_info import Category, DatasetInfo

INFO = DatasetInfo(
    name="scenes",
    # As in most real data sets the ids have gaps and do not start at 0, so that no code mistakes them for class ids.
    categories=(
        Category(id=2, name="sky", is_thing=False, color=(70, 130, 180)),
        Category(id=3, name="building", is_thing=False, color=(110, 90, 85)),
        Category(id=5, name="vegetation", is_thing=False, color=(107, 142, 35)),
        Category(id=8, name="road", is_thing=False, color=(128, 64, 128)),
        Category(id=9, name="sidewalk", is_thing=False, color=(244, 35, 232)),
        Category(id=21, name="car", is_thing=True, color=(20, 40, 200)),
        Category(id=22, name="person", is_thing=True, color=(220, 20, 60)),
        Category(id=30, name="box", is_thing=True, color=(230, 150, 20)),
        Category(id=31, name="ball", is_thing=True, color=(60, 220, 190)),
    ),
)
SKY, BUILDING, VEGETATION, ROAD, SIDEWALK, CAR, PERSON, BOX, BALL = range(INFO.num_classes)


def scenes_info() -> DatasetInfo:
    """Returns the `DatasetInfo` of the scenes: five stuff and four thing classes."""
    return INFO
