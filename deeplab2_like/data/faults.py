"""Faults of labels that do not keep them from being read; `inspect` and `convert --check` list them."""

import dataclasses

# Kind -> whether it is an error, which makes training or evaluation wrong. The others may be intended.
KINDS = {
    "damaged record": True,
    "id out of range": True,
    "segment differs from JSON": True,
    "image in several splits": True,
    "two classes of one color": False,
    "instance without pixels": False,
    "image without labels": False,
    "image twice in a split": False,
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault of the labels.

    Attributes:
        kind: One of `KINDS`.
        where: The image and record, or the part of the data set.
        text: The fault in one sentence.
    """

    kind: str
    where: str
    text: str

    @property
    def is_error(self) -> bool:
        """Whether it must be fixed before training."""
        return KINDS[self.kind]
