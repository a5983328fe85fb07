import io

import numpy as np
import pytest
from PIL import Image

from deeplab2_like.data.images import decode_image, encode_jpeg, encode_png
from deeplab2_like.data.panoptic_label import rgb_to_ids
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.export.image_files import ImageFile, ImageFilePredictor


class Thresholds:
    """Stands for an export: class 1 is where red is above 100; writes down its batches."""

    dataset_info = scenes_info()

    def __init__(self, max_images: int = 100) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.max_images = max_images

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.shapes.append(images.shape)
        if len(images) > self.max_images:
            raise UserError("Not enough memory.")
        rows = len(images)
        return {
            "panoptic": np.where(images[..., 0] > 100, 1000, 0).astype(np.int32),
            "segment_id": np.tile(np.array([1000, 0], np.int32), (rows, 1)),
            "segment_class": np.tile(np.array([1, 0], np.int32), (rows, 1)),
            "segment_score": np.tile(np.array([0.5, 0.25], np.float32), (rows, 1)),
        }


def _red(height: int, width: int, row: int) -> np.ndarray:
    """Black, with one red row."""
    image = np.zeros((height, width, 3), np.uint8)
    image[row, :, 0] = 255
    return image


def _map_of(answer) -> np.ndarray:
    assert answer.status == ""
    return rgb_to_ids(decode_image(answer.panoptic_png, "map").astype(np.int32))


def test_sizes_are_mixed_and_bad_files_fail_alone():
    model = Thresholds()
    files = [
        ImageFile(encode_png(_red(4, 6, 0)), "a.png"),
        ImageFile(encode_png(_red(4, 6, 0))[:40], "cut.png"),
        ImageFile(encode_png(_red(5, 3, 4)), "b.png"),
        ImageFile(b"", "empty.jpg"),
        ImageFile(encode_png(_red(4, 6, 3)), "c.png"),
    ]
    answers = ImageFilePredictor(model)(files)
    assert sorted(model.shapes) == [(1, 5, 3, 3), (2, 4, 6, 3)]
    for index, (height, width, row) in {0: (4, 6, 0), 2: (5, 3, 4), 4: (4, 6, 3)}.items():
        expected = np.zeros((height, width), np.int32)
        expected[row] = 1000
        np.testing.assert_array_equal(_map_of(answers[index]), expected)
        assert answers[index].image_size.tolist() == [height, width]
        assert answers[index].segment_id.tolist() == [1000, 0]
        assert answers[index].segment_score.tolist() == [0.5, 0.25]
    for index, name in {1: "cut.png", 3: "empty.jpg"}.items():
        assert answers[index].status.startswith(f"'{name}' is not a readable image, or cut short")
        assert answers[index].panoptic_png == b""
        assert answers[index].image_size.tolist() == [0, 0]


def test_photographs_are_turned():
    # Orientation 6: the first row is the right side, so a photograph of height 4 and width 6 is shown 6 high.
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(_red(16, 24, 0)).save(buffer, "JPEG", exif=exif, quality=95)
    [answer] = ImageFilePredictor(Thresholds())([ImageFile(buffer.getvalue(), "turned.jpg")])
    panoptic = _map_of(answer)
    assert panoptic.shape == (24, 16)
    assert (panoptic[:, -1] == 1000).all()
    assert (panoptic[:, :8] == 0).all()


def test_a_batch_too_large_for_the_memory_is_taken_apart():
    model = Thresholds(max_images=1)
    files = [ImageFile(encode_jpeg(_red(8, 8, 0)), "a.jpg")] * 3
    answers = ImageFilePredictor(model)(files)
    assert model.shapes == [(3, 8, 8, 3), *[(1, 8, 8, 3)] * 3]
    assert [answer.status for answer in answers] == ["", "", ""]
    model.max_images = 0
    assert [answer.status for answer in ImageFilePredictor(model)(files)] == ["Not enough memory."] * 3


@pytest.mark.parametrize("number", [0, 1])
def test_few_images(number):
    files = [ImageFile(encode_png(_red(2, 2, 0)), "a.png")] * number
    assert len(ImageFilePredictor(Thresholds())(files)) == number
