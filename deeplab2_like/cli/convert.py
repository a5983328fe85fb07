"""`deeplab2-like convert SOURCE`."""

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deeplab2_like.cli.arguments import (
    add_command,
    add_image_options,
    add_workers,
    find_folders,
    image_size,
    positive_int,
    share,
)


class Source(NamedTuple):
    """A kind of data set that `convert` reads.

    Attributes:
        summary: One sentence for the help.
        add_options: Adds the options of this source, which are the arguments of its converter, to a parser.
    """

    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]


def add_parser(commands: Any) -> None:
    """Adds the command with a command of its own for each source."""
    parser = commands.add_parser("convert", help="Convert a data set to TFRecords.", description="Convert a data set.")
    sources = parser.add_subparsers(required=True, metavar="SOURCE")
    for name, source in SOURCES.items():
        source_parser = add_command(sources, name, run, source.summary)
        source_parser.set_defaults(source=name)
        source.add_options(source_parser)
        source_parser.add_argument("--check", action="store_true", help="find faults in the labels, as inspect does")


def run(options: argparse.Namespace) -> None:
    """Converts a data set, and checks the labels if asked to."""
    if options.source == "deeplab2-records":
        _describe_deeplab2_records(options)
        return
    from deeplab2_like.data.convert.common import ConversionReport
    from deeplab2_like.data.convert.summary import print_summary
    from deeplab2_like.progress import progress_bar

    folders = [name for name in ("images", "panoptic", "stuff_pngs") if name in vars(options)]
    if "json_file" in vars(options):
        find_folders(options, options.json_file, *folders)
    # `convert_NAME` in `data/convert/NAME.py`; the options are its arguments.
    name = options.source.replace("-", "_")
    converter = getattr(importlib.import_module(f"deeplab2_like.data.convert.{name}"), f"convert_{name}")
    arguments = {
        key: value for key, value in vars(options).items() if key not in ("run", "source", "check", "max_pixels")
    }
    with progress_bar("convert") as progress:
        reports = converter(**arguments, progress=progress)
    reports = [reports] if isinstance(reports, ConversionReport) else reports
    print_summary(reports, options.output_dir, options=arguments)
    if options.check:
        faults = _check_coco_pngs(options) if options.source == "coco-panoptic" else ()
        _check_records(options.output_dir, workers=options.workers, more_faults=faults)


def _describe_deeplab2_records(options: argparse.Namespace) -> None:
    from deeplab2_like.data.convert.deeplab2_records import describe_deeplab2_records
    from deeplab2_like.printing import counted

    counts = describe_deeplab2_records(
        options.records,
        options.data_set,
        json_file=options.json_file,
        label_divisor=options.label_divisor,
        ignore_label=options.ignore_label,
        encoding=options.encoding,
    )
    for split, count in counts.items():
        print(f"Split '{split}': {counted(count, 'image')}.")
    print(f"Records in {options.records} can be trained on.")
    if options.check:
        advice = "Fix the labels, and make the records again with DeepLab2."
        _check_records(options.records, splits=list(counts), workers=options.workers, advice=advice)


def _check_coco_pngs(options: argparse.Namespace) -> Sequence[Any]:
    """Returns the faults of the panoptic PNGs that the records no longer show."""
    from deeplab2_like.data.convert.coco_panoptic import check_segments
    from deeplab2_like.progress import progress_bar

    with progress_bar("check PNGs") as progress:
        return check_segments(
            panoptic=options.panoptic,
            json_file=options.json_file,
            encoding=options.encoding,
            workers=options.workers,
            progress=progress,
        )


def _check_records(
    records: Path,
    *,
    workers: int,
    splits: Sequence[str] | None = None,
    more_faults: Sequence[Any] = (),
    advice: str = "The records are written; fix the labels and convert again.",
) -> None:
    """Raises `UserError` if the labels of records have faults, or `more_faults` were found before."""
    from deeplab2_like.inspection import inspect_records, print_inspection, raise_if_faulty
    from deeplab2_like.progress import progress_bar

    with progress_bar("check") as progress:
        inspection = inspect_records(
            records, splits=splits, pictures=0, workers=workers, more_faults=more_faults, progress=progress
        )
    print_inspection(inspection)
    raise_if_faulty(inspection, records, advice)


# --- The options of each source. --------------------------------------------------------------------------------------


def _add_coco_panoptic(parser: argparse.ArgumentParser) -> None:
    _add_images(parser)
    parser.add_argument("--panoptic", type=Path, required=True, metavar="DIR", help="folder of the panoptic PNGs")
    _add_json(parser, "the panoptic JSON")
    _add_split(parser, "the JSON")
    _add_label_options(parser)


def _add_scenes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", type=int, required=True, help="number of training scenes")
    parser.add_argument("--val", type=int, required=True, help="number of validation scenes")
    parser.add_argument("--size", type=image_size, required=True, metavar="HxW", help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes")
    _add_output(parser)


def _add_cityscapes(parser: argparse.ArgumentParser) -> None:
    _add_download(parser, "train val; with --coarse train_extra")
    _add_prepared(parser, "cityscapes_panoptic_SPLIT")
    parser.add_argument("--coarse", action="store_true", help="use the coarse labels, gtCoarse")
    _add_label_options(parser)


def _add_coco_instances(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: that of the JSON)")
    _add_json(parser, "the JSON, or a folder of splits, as Roboflow and CVAT export it")
    _add_split(parser, "the JSON")
    _add_classes(parser)
    _add_overlap(parser)
    parser.add_argument(
        "--crowds-are-objects",
        action="store_true",
        help="ignore iscrowd, which some tools set on everything that they write as run lengths",
    )
    parser.add_argument(
        "--keep-groups",
        action="store_true",
        help="keep categories that only group others as their supercategory and have no annotations",
    )
    parser.add_argument(
        "--stuff-pngs", type=Path, metavar="DIR", help="a PNG per image with the class of each pixel, below the objects"
    )
    parser.add_argument(
        "--stuff-classes", type=Path, metavar="FILE", help="the class of each value in the stuff PNGs, or coco-stuff"
    )
    _add_label_options(parser)


def _add_mapillary(parser: argparse.ArgumentParser) -> None:
    _add_download(parser, "train val")
    parser.add_argument("--version", choices=("1.2", "2.0"), help="version of the labels (default: the newest there)")
    _add_label_options(parser)


def _add_ade20k(parser: argparse.ArgumentParser) -> None:
    _add_download(parser, "train val")
    _add_prepared(parser, "ade20k_panoptic_SPLIT.json")
    _add_label_options(parser)


def _add_semantic_pngs(parser: argparse.ArgumentParser) -> None:
    _add_images(parser)
    parser.add_argument("--labels", type=Path, required=True, metavar="DIR", help="folder of the label PNGs")
    parser.add_argument("--classes", type=Path, required=True, metavar="FILE", help="the class of each value")
    _add_split(parser, "the folders")
    parser.add_argument(
        "--ignore",
        type=int,
        nargs="*",
        metavar="VALUE",
        help="values that are void (default: 255, unless it is in the list of classes)",
    )
    _add_ignore_subsets(parser)
    parser.add_argument(
        "--label-ending",
        default=".png",
        metavar="TEXT",
        help="ending of a PNG's name, in place of the image's (default: %(default)s)",
    )
    _add_label_options(parser)


def _add_instance_maps(parser: argparse.ArgumentParser) -> None:
    _add_images(parser)
    parser.add_argument(
        "--labels", type=Path, metavar="DIR", help="folder of the instance maps (default: that of the images)"
    )
    _add_split(parser, "the folders")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--class", dest="class_name", metavar="NAME", help="the only class (default: object)")
    classes.add_argument(
        "--class-map", type=Path, metavar="FILE", help="the class of each object: a table or JSON by image and number"
    )
    classes.add_argument(
        "--class-labels", type=Path, metavar="DIR", help="folder of labels with the class of each pixel"
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="the class of each value in --class-labels or --class-map"
    )
    _add_stuff(parser)
    _add_known_background(parser)
    _add_ignore_subsets(parser)
    parser.add_argument(
        "--label-ending",
        metavar="TEXT",
        help="ending of an instance map's name, in place of the image's, such as _masks.tif (default: found)",
    )
    parser.add_argument(
        "--image-ending",
        metavar="TEXT",
        help="ending of an image's name before its suffix that its instance map lacks, such as _img (default: found)",
    )
    _add_label_options(parser)


def _add_cvat_masks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the unpacked export")
    _add_split(parser, "the folder")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: JPEGImages)")
    _add_ignore_subsets(parser)
    _add_classes(parser)
    _add_label_options(parser)


def _add_voc_masks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, required=True, metavar="DIR", help="folder with SegmentationClass and SegmentationObject"
    )
    _add_split(parser, "the folder")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: JPEGImages)")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="the class of each value (default: the 20 of Pascal VOC)"
    )
    _add_ignore_subsets(parser)
    _add_stuff(parser)
    _add_known_background(parser)
    _add_label_options(parser)


def _add_labelme(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the JSONs")
    _add_split(parser, "the folder")
    _add_class_names(parser)
    _add_ignore_subsets(parser)
    _add_classes(parser)
    _add_overlap(parser)
    _add_label_options(parser)


def _add_yolo_seg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="the YAML, with names, train and val")
    parser.add_argument("--split", choices=("train", "val", "test"), help="the only split to convert (default: all)")
    _add_classes(parser)
    _add_overlap(parser)
    _add_label_options(parser)


def _add_label_studio(parser: argparse.ArgumentParser) -> None:
    _add_json(parser, "the export, of type JSON")
    _add_images(parser)
    _add_split(parser, "the JSON")
    _add_class_names(parser)
    _add_classes(parser)
    _add_overlap(parser)
    parser.add_argument(
        "--annotation",
        choices=("last", "first"),
        default="last",
        help="which annotation of a task with several is used, unless one is the ground truth (default: %(default)s)",
    )
    _add_label_options(parser)


def _add_deeplab2_records(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--records", type=Path, required=True, metavar="DIR", help="folder of the records")
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--data-set", metavar="NAME", help="their data set: cityscapes, coco or ade20k")
    kinds.add_argument(
        "--json", type=Path, dest="json_file", metavar="FILE", help="own categories, with the ids in the records"
    )
    parser.add_argument("--label-divisor", type=int, help="with --json: panoptic_label_divisor (default: 1000)")
    parser.add_argument(
        "--ignore-label", type=int, help="with --json: ignore_label (default: 0, or 255 if 0 is the id of a class)"
    )
    _add_encoding(parser)
    add_workers(parser, "number of examples checked at once")


SOURCES = {
    "coco-panoptic": Source("A data set in COCO panoptic format.", _add_coco_panoptic),
    "scenes": Source("The built-in procedural street scenes.", _add_scenes),
    "cityscapes": Source("Cityscapes as downloaded; needs no prepared panoptic PNGs.", _add_cityscapes),
    "coco-instances": Source(
        "A COCO instance JSON: polygons and run lengths, as CVAT and others export it.", _add_coco_instances
    ),
    "mapillary": Source("Mapillary Vistas 1.2 or 2.0 as downloaded.", _add_mapillary),
    "ade20k": Source("ADE20K's challenge data, with or without the panoptic JSONs.", _add_ade20k),
    "semantic-pngs": Source(
        "Labels without instances: a PNG per image with the class of each pixel.", _add_semantic_pngs
    ),
    "instance-maps": Source(
        "Images with the number of the object at each pixel, as Cellpose, StarDist, napari and QuPath write them.",
        _add_instance_maps,
    ),
    "cvat-masks": Source('CVAT\'s export "Segmentation mask".', _add_cvat_masks),
    "voc-masks": Source("Pascal VOC, or PNGs of classes and objects in its layout.", _add_voc_masks),
    "labelme": Source("A folder of labelme, with a JSON per image.", _add_labelme),
    "label-studio": Source("An export of Label Studio as JSON: polygons, brushes and others.", _add_label_studio),
    "yolo-seg": Source("A data set of Ultralytics for segmentation, with a YAML.", _add_yolo_seg),
    "deeplab2-records": Source(
        "Records that DeepLab2 made: writes dataset_info.json beside them, and nothing else.", _add_deeplab2_records
    ),
}


# --- Options that several sources share. ------------------------------------------------------------------------------


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoding", metavar="NAME", help="encoding of files of text that are not UTF-8, such as gbk (default: error)"
    )


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images")


def _add_json(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("--json", type=Path, required=True, dest="json_file", metavar="FILE", help=help_text)


def _add_download(parser: argparse.ArgumentParser, default_splits: str) -> None:
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the download")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help=f"splits to convert (default: {default_splits})")


def _add_prepared(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--prepared",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"use {name} (default: if it exists)",
    )


def _add_ignore_subsets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-subsets",
        action="store_true",
        help="put all images into one split, even if the folder or export divides them",
    )


def _add_split(parser: argparse.ArgumentParser, named: str) -> None:
    parser.add_argument(
        "--split",
        help=f"name of the split (default: train, val or test, from the name of {named} or of the folder above; or "
        "else train, if the record folder is empty)",
    )


def _add_class_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="all classes, in order (default: those that occur)"
    )


def _add_stuff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stuff", nargs="+", default=[], metavar="NAME", help="classes that are stuff, not things")


def _add_known_background(parser: argparse.ArgumentParser) -> None:
    """Adds the options of sources whose labels tell the background apart from void."""
    parser.add_argument(
        "--background", default="background", metavar="NAME", help="class of the background (default: %(default)s)"
    )
    parser.add_argument("--void-background", action="store_true", help="make the background void instead")


def _add_classes(parser: argparse.ArgumentParser) -> None:
    _add_stuff(parser)
    parser.add_argument("--background", metavar="NAME", help="class of unlabeled pixels (default: they are void)")


def _add_overlap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overlap",
        choices=("smaller-on-top", "later-on-top"),
        default="smaller-on-top",
        help="which of several overlapping shapes gets a pixel (default: %(default)s)",
    )


def _add_label_options(parser: argparse.ArgumentParser) -> None:
    """Adds `labeled_images.LabelOptions`, the options of all sources of images and labels."""
    _add_output(parser)
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip-annotation", "skip-image", "skip"),
        default="stop",
        help="stop at a fault (default), or leave out the annotation or the image; skip: whatever is smaller",
    )
    parser.add_argument(
        "--val-share",
        type=share,
        metavar="SHARE",
        help="share of the images for a split val, such as 0.1, by file name",
    )
    _add_encoding(parser)
    parser.add_argument(
        "--label-divisor", type=int, help="above the largest number of instances of a class in an image"
    )
    parser.add_argument(
        "--max-side", type=positive_int, metavar="PIXELS", help="downscale images whose longer side is longer"
    )
    add_image_options(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", type=Path, required=True, help="record folder to write")
    parser.add_argument(
        "--label-format",
        choices=("png", "raw"),
        default="png",
        help="how records hold labels; raw is larger, and DeepLab2 reads it (default: %(default)s)",
    )
    parser.add_argument("--shards", type=int, help="number of files (default: one per 500 examples)")
    add_workers(parser, "number of examples converted at once")
    parser.add_argument(
        "--replace", action="store_true", help="replace a split of the same name that was made from other files"
    )
