"""What can be wrong with labels that can nevertheless be read, as `inspect` and `convert --check` list it."""

import dataclasses

# Kind -> whether training on it, or what is measured on it, is wrong. The others may well be meant.
KINDS = {
    "damaged record": True,
    "id out of range": True,
    "segment differs from JSON": True,
    "image in several splits": True,
    "two classes of one colour": False,
    "instance without pixels": False,
    "image without labels": False,
    "image twice in a split": False,
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: One of `KINDS`.
        where: The image and record, or the part of the data set.
        text: What is wrong, one sentence.
    """

    kind: str
    where: str
    text: str

    @property
    def is_error(self) -> bool:
        """Whether it must be mended."""
        return KINDS[self.kind]
