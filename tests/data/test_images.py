"""Image files: orientation, decoding, PNGs, label PNGs."""

import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from deeplab2_like.data import image_headers
from deeplab2_like.data.exif import find_orientation
from deeplab2_like.data.images import (
    decode_image,
    decode_label,
    encode_jpeg,
    encode_png,
    find_bit_depth,
    list_images,
    read_color_png,
    read_id_png,
    read_image,
    read_value_png,
    turn_upright,
    write_png,
)
from deeplab2_like.data.panoptic_label import ids_to_rgb
from deeplab2_like.errors import UserError

# Smooth, as for JPEG: bright towards one corner.
PIXELS = (np.add.outer(np.arange(16) * 9, np.arange(24) * 4)[..., None] + np.zeros(3)).astype(np.uint8)


def save(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(path, exif=exif, quality=100, lossless=True)
    return path


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_pillows(tmp_path: Path, orientation: int, ending: str) -> None:
    file = save(tmp_path / f"a{ending}", orientation)
    with Image.open(file) as image:
        # Pillow has turned a TIFF by itself.
        expected = np.asarray(image if ending == ".tif" else ImageOps.exif_transpose(image))
    found = read_image(file)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=5)  # Decoders of JPEG differ a little.
    content = file.read_bytes()
    assert find_orientation(content) == orientation
    turned = turn_upright(content, file.name)
    np.testing.assert_array_equal(decode_image(turned, file.name), found)
    assert (turned == content) == (orientation == 1)
    assert find_orientation(turned) == 1
    assert decode_image(content, file.name).shape == PIXELS.shape


@pytest.mark.parametrize(("beginning", "order"), [(b"II*\0", "<"), (b"MM\0*", ">")])
def test_byte_orders(beginning: bytes, order: str) -> None:
    # A header, a directory of one entry, the orientation 6 as a number of 16 bits, and no further directory.
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 6, 0)
    block = b"Exif\0\0" + beginning + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)
    jpeg = encode_jpeg(PIXELS)
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    assert find_orientation(jpeg[:2] + segment + jpeg[2:]) == 6
    for length in range(6, 28):  # Cut off before the end of the entry.
        cut = b"\xff\xe1" + struct.pack(">H", length + 2) + block[:length]
        assert find_orientation(jpeg[:2] + cut + jpeg[2:]) == 1


def test_orientation_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", 8)
    content = file.read_bytes()
    first = content.index(b"eXIf") - 4
    end = first + 12 + int.from_bytes(content[first : first + 4], "big")
    last = content.index(b"IEND") - 4
    moved = content[:first] + content[end:last] + content[first:end] + content[last:]
    assert find_orientation(moved) == 8


@pytest.mark.parametrize("content", [b"", b"nothing", b"\xff\xd8\xff\xe1\0\x10Exif\0\0II*\0", b"II*\0\xff\xff\xff\xff"])
def test_nonsense_is_no_orientation(content: bytes) -> None:
    assert find_orientation(content) == 1


def test_unknown_orientations_do_not_count(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", 9)
    np.testing.assert_array_equal(read_image(file), PIXELS)


def test_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match=r"a\.jpg' is not a readable image, or cut short"):
        read_image(tmp_path / "a.jpg")


IMAGE = np.zeros((2, 3, 3), np.uint8)
IMAGE[0, 1] = 255, 128, 0


def test_png_holds_red_green_blue() -> None:
    decoded = cv2.imdecode(np.frombuffer(encode_png(IMAGE), np.uint8), cv2.IMREAD_UNCHANGED)  # blue, green, red
    np.testing.assert_array_equal(decoded[:, :, ::-1], IMAGE)


def test_gray_png_has_one_channel():
    gray = np.array([[0, 7, 255], [1, 2, 3]], np.uint8).T  # [3, 2], not contiguous
    decoded = cv2.imdecode(np.frombuffer(encode_png(gray), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(decoded, [[0, 1], [7, 2], [255, 3]])


def test_png_file_is_all_that_appears(tmp_path):
    write_png(tmp_path / "new" / "a.png", IMAGE)
    assert (tmp_path / "new" / "a.png").read_bytes() == encode_png(IMAGE)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (IMAGE[0, 0], r"shape \(3,\) and type uint8"),
        (IMAGE[:, :, 0].astype(np.int32), r"shape \(2, 3\) and type int32"),
        (IMAGE[:, :, :2], r"shape \(2, 3, 2\) and type uint8"),
        (IMAGE[:0], r"shape \(0, 3, 3\) and type uint8"),
        (IMAGE.astype(np.float32), r"shape \(2, 3, 3\) and type float32"),
    ],
)
def test_other_arrays_are_no_image(tmp_path, image, what):
    with pytest.raises(UserError, match=rf"An array of {what} is not an image; give uint8 \[H, W, 3\] or \[H, W\]\."):
        write_png(tmp_path / "a.png", image)
    assert not list(tmp_path.iterdir())


def test_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write '.*file/a\.png' \(.+\); choose a folder that can be written\."):
        write_png(tmp_path / "file" / "a.png", IMAGE)


def test_ids_in_all_bytes(tmp_path):
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 70_000, 2**24 - 1]])
    cv2.imwrite(str(tmp_path / "a.png"), ids_to_rgb(ids)[..., ::-1])
    read = read_id_png(tmp_path / "a.png")
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, ids)


def test_faulty_files(tmp_path, capfd):
    def write(image):
        cv2.imwrite(str(tmp_path / "a.png"), image)

    with pytest.raises(UserError, match=r"the panoptic PNG '.*a\.png' cannot be read \(No such file"):
        read_id_png(tmp_path / "a.png")
    for image, found in (
        (np.zeros((2, 2), np.uint8), "1 channels;"),
        (np.zeros((2, 2, 4), np.uint8), "4 channels;"),
        (np.zeros((2, 2, 3), np.uint16), "3 channels of 16 bits;"),
    ):
        write(image)
        with pytest.raises(UserError, match=rf"a\.png' has {found} a panoptic PNG is RGB of 8 bits each"):
            read_id_png(tmp_path / "a.png")
    write(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    for length in (0, 60, len(whole) // 2, len(whole) - 20):
        (tmp_path / "a.png").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.png' is not a readable PNG, or cut short"):
            read_id_png(tmp_path / "a.png")
    capfd.readouterr()  # libpng says something about each.


def test_a_pipe_is_no_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe' is a pipe or a device; give an image file or a folder of images"):
        list_images(tmp_path / "pipe")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# --- Formats of photographs. ------------------------------------------------------------------------------------------


def test_bmp_with_a_palette_has_the_colors_of_the_palette() -> None:
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 255, 128, 64, 9, 9, 9])
    image.putpixel((2, 1), 2)
    expected = np.full((2, 3, 3), (255, 128, 64))
    expected[1, 2] = 9
    np.testing.assert_array_equal(decode_image(saved(image, "BMP"), "a.bmp"), expected)


def test_bmp_of_one_bit() -> None:
    content = saved(Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1"), "BMP")
    np.testing.assert_array_equal(decode_image(content, "a.bmp")[0, :, 1], [0, 255, 0])


def test_bmp_of_16_bits() -> None:
    # Headers of 14 and 40 bytes, 16 bits per pixel, with masks of 5, 6 and 5 bits; a row is filled up to 4 bytes.
    pixels = struct.pack("<HH", 31 << 11, 63 << 5)
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    masks = struct.pack("<III", 31 << 11, 63 << 5, 31)
    offset = 14 + len(header) + len(masks)
    content = b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + header + masks + pixels
    np.testing.assert_array_equal(decode_image(content, "a.bmp"), [[[255, 0, 0], [0, 255, 0]]])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(decode_image(content, "a"), np.full((3, 4, 3), (255, 0, 0)))


def test_pages_of_a_tiff_are_refused_but_not_thumbnails() -> None:
    pages = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    content = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match=r"'a\.tif' has 2 pages; save the page to use as an image file of its own\."):
        decode_image(content, "a.tif")
    content = saved(pages[0], "TIFF", save_all=True, append_images=[Image.new("RGB", (2, 1))])
    np.testing.assert_array_equal(decode_image(content, "a.tif"), np.full((3, 4, 3), (255, 0, 0)))


# --- More than 8 bits. ------------------------------------------------------------------------------------------------

TWELVE_BITS = np.array([[0, 15, 16, 2048, 4095]], np.uint16)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bit_depth_scales_to_8_bits(ending: str, channels: int) -> None:
    values = np.repeat(TWELVE_BITS[..., None], channels, axis=-1)
    values[..., 0] //= 2  # Blue.
    content = cv2.imencode(ending, values)[1].tobytes()
    pixels = decode_image(content, f"a{ending}", bit_depth=12)
    # value // 16, so that 4095 is 255.
    np.testing.assert_array_equal(pixels[0, :, 2], [0, 0, 0, 64, 127])
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 0, 64, 127] if channels == 1 else [0, 0, 1, 128, 255])
    np.testing.assert_array_equal(decode_image(content, f"a{ending}")[0, :, 2], [0, 0, 0, 4, 7])  # value // 256
    with pytest.raises(
        UserError, match=r"has values of 0 to \d+, but 10 bits hold 0 to 1023; give another --bit-depth"
    ):
        decode_image(content, f"a{ending}", bit_depth=10)


def test_negative_values_are_refused() -> None:
    content = cv2.imencode(".tif", np.array([[-5, 7]], np.int16))[1].tobytes()
    with pytest.raises(UserError, match=r"'a\.tif' has values of -5 to 7, but 16 bits hold 0 to 65535"):
        decode_image(content, "a.tif")


def test_floating_point_images_are_0_to_1() -> None:
    content = saved(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), "TIFF")
    np.testing.assert_array_equal(decode_image(content, "a.tif")[0, :, 0], [0, 128, 255])
    for values, found in (([0.0, 300.0], "0 to 300"), ([np.nan, 0.0], "nan to nan")):
        content = saved(Image.fromarray(np.array([values], np.float32)), "TIFF")
        with pytest.raises(UserError, match=rf"'a\.tif' has floating-point values of {found}; only 0 to 1"):
            decode_image(content, "a.tif")


def test_largest_value_gives_the_bit_depth(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode_jpeg(PIXELS))
    write_png(tmp_path / "b.png", PIXELS)
    (tmp_path / "c.png").write_bytes(b"nothing")
    files = [tmp_path / "a.jpg", tmp_path / "b.png", tmp_path / "c.png", tmp_path / "missing.tif"]
    assert find_bit_depth(files) is None
    for number, (largest, bits) in enumerate([(200, 8), (1023, 10), (1024, 12), (4096, 14), (16384, 16)]):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.array([[3, largest]], np.uint16))
        files.append(tmp_path / f"{number}.png")
        assert find_bit_depth(files) == bits


# --- Labels. ----------------------------------------------------------------------------------------------------------

VALUES = np.array([[0, 1], [7, 200]], np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF"])
def test_values_of_lossless_formats(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(saved(Image.fromarray(VALUES), kind, optimize=False))
    np.testing.assert_array_equal(read_value_png(tmp_path / "a", "label PNG"), VALUES)


@pytest.mark.parametrize("bits", [1, 4])
def test_palette_bmp_of_few_bits_has_its_indices(bits: int) -> None:
    # Two pixels, indices 1 and 0, in the upper bits of a row of 4 bytes; the palette is white, then red.
    row = bytes([0x80 if bits == 1 else 0x10, 0, 0, 0])
    palette = b"\xff\xff\xff\0\0\0\xff\0"
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, bits, 0, len(row), 0, 0, 2, 0)
    offset = 14 + len(header) + len(palette)
    content = b"BM" + struct.pack("<IHHI", offset + len(row), 0, 0, offset) + header + palette + row
    np.testing.assert_array_equal(decode_label(content, "a.bmp"), [[1, 0]])
    np.testing.assert_array_equal(decode_label(content, "a.bmp", colors=True), [[[255, 0, 0], [255, 255, 255]]])
    np.testing.assert_array_equal(decode_image(content, "a.bmp"), [[[255, 0, 0], [255, 255, 255]]])


@pytest.mark.parametrize("read", [read_value_png, read_color_png, lambda path, what: read_id_png(path)])
@pytest.mark.parametrize(
    ("image", "kind", "options", "text"),
    [
        (Image.fromarray(VALUES), "JPEG", {}, "is a JPEG, which may change the values of pixels; export the label"),
        (Image.new("RGB", (2, 2)), "WEBP", {"lossless": True}, "is a WEBP, which may change the values of pixels"),
        (Image.new("RGB", (2, 2)), "TIFF", {"compression": "jpeg"}, "is a TIFF with jpeg compression, which may"),
        (Image.fromarray(VALUES.astype(np.float32)), "TIFF", {}, "has floating-point values; save it as integers"),
    ],
)
def test_labels_that_are_not_exact_integers(read, image, kind, options, text, tmp_path: Path) -> None:
    (tmp_path / "label").write_bytes(saved(image, kind, **options))
    with pytest.raises(UserError, match=f"label' {text}"):
        read(tmp_path / "label", "label PNG")


def test_labels_of_several_frames() -> None:
    frames = [Image.fromarray(VALUES), Image.fromarray(VALUES // 2)]
    for kind in ("GIF", "TIFF"):
        content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        with pytest.raises(UserError, match=r"'a' has 2 frames or pages; save the one to use as a PNG\."):
            decode_label(content, "'a'")


def test_labels_whose_values_pillow_would_change() -> None:
    white_is_zero = saved(Image.fromarray(VALUES), "TIFF", tiffinfo={262: 0})
    with pytest.raises(UserError, match="'a' is a TIFF in which 0 is white, so its values are inverted"):
        decode_label(white_is_zero, "'a'")
    wide = cv2.imencode(".png", np.full((2, 2, 3), 700, np.uint16))[1].tobytes()
    with pytest.raises(UserError, match="'a' is RGB of 16 bits, not colors; save it as RGB with 8 bits per channel"):
        decode_label(wide, "'a'", colors=True)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PNG", "TIFF"])
def test_a_damaged_label_is_named_with_its_format(kind: str) -> None:
    content = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)), kind)
    with pytest.raises(UserError, match=rf"^the label 'a' is not a readable {kind}, or cut short\.$"):
        decode_label(content[: len(content) * 3 // 4], "the label 'a'")
    with pytest.raises(UserError, match=r"^the label 'a' is not a readable PNG, BMP, GIF or TIFF file, or cut short"):
        decode_label(content[:3], "the label 'a'")


# --- Sizes. -----------------------------------------------------------------------------------------------------------


def png_of_size(height: int, width: int) -> bytes:
    """A PNG whose header gives a size that its pixels do not have."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = saved(Image.new("RGB", (1, 1)), "PNG")
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


@pytest.mark.parametrize(("height", "width"), [(100_000, 100_000), (13_000, 14_000)])
def test_sizes_above_the_limit_are_refused_before_decoding(height: int, width: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_of_size(height, width))
    for read in (read_image, read_id_png, lambda file: read_value_png(file, "PNG"), lambda f: read_color_png(f, "PNG")):
        with pytest.raises(UserError, match=r"a\.png' has .*limit of 178956970.*--max-pixels"):
            read(tmp_path / "a.png")


def test_limit_can_be_set() -> None:
    content = encode_png(np.zeros((3, 4, 3), np.uint8))
    try:
        image_headers.set_max_pixels(11)
        with pytest.raises(
            UserError, match=r"'a\.png' has 3 x 4 pixels \(height x width\), more than the limit of 11;"
        ):
            decode_image(content, "a.png")
        image_headers.set_max_pixels(12)
        assert decode_image(content, "a.png").shape == (3, 4, 3)
    finally:
        image_headers.set_max_pixels(image_headers.DEFAULT_MAX_PIXELS)


def test_devices_and_folders_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("/dev/zero")  # Would never end.
    with pytest.raises(UserError, match=r"the image '.*a\.png' is a pipe or a device; give a regular file\."):
        read_image(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UserError, match=r"the image '.*b\.png' cannot be read \(Is a directory\); check the path\."):
        read_image(tmp_path / "b.png")
    assert find_bit_depth([tmp_path / "a.png", tmp_path / "b.png"]) is None
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"has no image directly in it"):
        list_images(tmp_path)


def test_lack_of_memory_for_an_image_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    path = tmp_path / "a.tif"
    Image.new("RGB", (4, 4)).save(path)
    monkeypatch.setattr(Image.Image, "convert", fail)
    for read in (read_image, lambda file: read_color_png(file, "PNG")):
        with pytest.raises(UserError, match=r"a\.tif' needs more memory than there is; make it smaller, or free some"):
            read(path)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"the image '.*a\.png' is a pipe or a device; give a regular file\."):
        read_image(tmp_path / "a.png")
