"""Translates TensorFlow's errors about faulty records into `UserError`."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

from deeplab2_like.data.shards import find_damaged_record
from deeplab2_like.errors import UserError

# Every error message of `require` starts with this, by which `report_bad_records` recognizes it.
_BAD_RECORD = "Bad record: "
# TensorFlow's messages about faulty records, and the sentence for the user: first the messages of `require`, which name
# the image, then those of TensorFlow's operations.
_PATTERNS = (
    (re.compile(re.escape(_BAD_RECORD) + r"(.*?)\]\s*(?:\n|$)", re.DOTALL), "{}"),
    (re.compile(r"([^:\n]+)\n\s*\[\[[^\n]*DecodeImage\b"), "an image cannot be decoded ({})."),
    (re.compile(r"([^:\n]+)\n\s*\[\[[^\n]*DecodePng\b"), "a label cannot be decoded ({})."),
    (re.compile(r"Key: (\S+)\. +Data types don't match"), "its feature '{}' has the wrong type."),
    (re.compile(r"Key: (\S+)\. "), "its feature '{}' has the wrong number of values."),
    (re.compile(r"(Could not parse) example input"), "it is not a tf.train.Example."),
    (re.compile(r"([^:\n]+)\n\s*\[\[[^\n]*ParseSingleExample\b"), "its features cannot be read ({})."),
)


def require(condition: tf.Tensor, message: Callable[[], Sequence[str | tf.Tensor]]) -> tf.Tensor:
    """Raises an error with a readable message unless a condition holds; runs in a TensorFlow graph.

    Args:
        condition: bool [].
        message: Returns the parts of one sentence, strings and tensors; their values are read only on failure.

    Returns:
        bool []; make it a control dependency of operations that would fail with a worse message.

    Raises:
        tf.errors.InvalidArgumentError: With the sentence; `report_bad_records` turns it into a `UserError`.
    """

    def fail() -> tf.Tensor:
        parts = []
        for part in message():
            is_text = isinstance(part, str) or part.dtype == tf.string
            parts.append(part if is_text else tf.strings.format("{}", part))
        sentence = tf.strings.join([_BAD_RECORD, *parts])
        with tf.control_dependencies([tf.debugging.Assert(tf.constant(False), [sentence], summarize=1)]):
            return tf.constant(True)

    return tf.cond(condition, lambda: tf.constant(True), fail)


@contextlib.contextmanager
def report_bad_records(files: Sequence[str] = ()) -> Iterator[None]:
    """Turns TensorFlow's errors about faulty records, while a data set is iterated, into one clear `UserError`.

    Other errors pass unchanged.

    Args:
        files: The TFRecord files that are read. TensorFlow names neither file nor record, so they are searched.
    """
    try:
        yield
    except tf.errors.DataLossError as error:
        found = re.search(r"(?:corrupted|truncated) record at (\d+)", error.message)
        if found and (damaged := find_damaged_record(files, int(found[1]))):
            path, number = damaged
            raise UserError(
                f"Record {number} (counted from 0) of '{path}' is damaged; convert the data set again."
            ) from error
        where = f" ({found[0]})" if found else ""
        raise UserError(f"A TFRecord file is damaged{where}; convert the data set again.") from error
    except (tf.errors.InvalidArgumentError, UnicodeDecodeError) as error:
        # TensorFlow quotes the record in its message, which Python then fails to decode as text.
        message = error.object.decode(errors="replace") if isinstance(error, UnicodeDecodeError) else error.message
        for pattern, sentence in _PATTERNS:
            if found := pattern.search(message):
                fault = sentence.format(found[1].strip().replace("\\'", "'"))
                raise UserError(f"{_BAD_RECORD}{fault} Convert the data set again.") from error
        raise
