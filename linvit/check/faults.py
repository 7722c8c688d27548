"""Every finding of `linvit check`: what it is, what training, evaluation and prediction do with it, and the fix."""

from typing import Literal, NamedTuple

# A fault costs images or labels, or falsifies a metric. A note is harmless, but good to know.
Severity = Literal["fault", "note"]
# What happens to the image: it cannot be read, is ignored, is used, or the whole data set is refused.
Effect = Literal["unread", "passed over", "used", "refused"]

SMALLEST_SIDE = 16
LARGEST_ASPECT = 10
LARGEST_IMBALANCE = 10


class Fault(NamedTuple):
    """One kind of finding, a fault or a note."""

    severity: Severity
    effect: Effect
    what: str
    training: str
    fix: str
    evaluation: str
    prediction: str


class Finding(NamedTuple):
    """One case of a fault: a file or folder, with its path relative to DATA, and the other files concerned."""

    code: str
    path: str
    detail: str = ""
    others: tuple[str, ...] = ()


_STOPS = "stops and names the file; --on-bad-image skip leaves it out and lists it"
_ERROR_ROW = "reports the error in the row of the file"
_IGNORES = "ignores it"
_REFUSES = "refuses to start and names it"
_LIKE_ANY_OTHER = "uses it like any other image"


def _unread(what: str, fix: str) -> Fault:
    return Fault("fault", "unread", what, _STOPS, fix, _STOPS, _ERROR_ROW)


def _ignored(severity: Severity, what: str, fix: str, *, prediction: str = _IGNORES) -> Fault:
    return Fault(severity, "passed over", what, _IGNORES, fix, _IGNORES, prediction)


def _refused(what: str, fix: str, *, prediction: str = "ignores classes") -> Fault:
    return Fault("fault", "refused", what, _REFUSES, fix, _REFUSES, prediction)


def _used(
    severity: Severity, what: str, training: str, fix: str, *, evaluation: str = "", prediction: str = ""
) -> Fault:
    return Fault(severity, "used", what, training, fix, evaluation or training, prediction or evaluation or training)


def _two_labels(what: str) -> Fault:
    return _used(
        "fault",
        f"{what} under several labels",
        "learns contradictory labels",
        "keep the one with the correct label",
        evaluation="counts at least one of them as wrong",
        prediction=_LIKE_ANY_OTHER,
    )


def _across_splits(what: str) -> Fault:
    return _used(
        "fault",
        f"{what} in several splits",
        "learns an image that it is evaluated on",
        "keep it in one split",
        evaluation="gives optimistic metrics, because the model has seen the image",
        prediction=_LIKE_ANY_OTHER,
    )


FAULTS: dict[str, Fault] = {
    "empty_file": _unread("a file of zero bytes", "restore or remove it"),
    "truncated": _unread("an image file whose end is missing", "restore or remove it"),
    "undecodable": _unread("an image file that cannot be decoded", "restore or remove it"),
    "unsupported": _unread(
        "an intact image of a kind that is not supported, such as one of floats",
        "convert it to 8 or 16 bits per channel",
    ),
    "not_an_image": _unread("not an image, despite its extension", "restore or remove it"),
    "unreadable_file": _unread("a file that cannot be opened", "grant read permission, or repair the link"),
    "damaged": _used(
        "fault",
        "an image that can be decoded, but contains corrupt data",
        "uses the decoded pixels, some of which may be grey, shifted or noise",
        "restore or remove it",
    ),
    "decompression_bomb": _used(
        "fault",
        "an image with more pixels than --max-pixels, which the check does not decode",
        "decodes all of it, at 3 bytes per pixel; cannot read an image of 2^30 pixels or more",
        "scale it down, cut it into pieces, or raise --max-pixels",
    ),
    "narrow_range": _used(
        "fault",
        "images of 16 bits that use a quarter of their values or less, such as 12-bit data",
        "sees them nearly black, in a few grey levels",
        "train with the --input-range that the finding names, or with auto; evaluation and prediction then use it",
    ),
    "tiny": _used(
        "fault",
        f"an image with a side of less than {SMALLEST_SIDE} px",
        "enlarges it to the input size of the model",
        "remove it, or find the original",
    ),
    "extreme_aspect": _used(
        "fault",
        f"an image more than {LARGEST_ASPECT} times as long as wide",
        "crops a piece of at most 4:3 from it",
        "cut it into pieces, or remove it",
        evaluation=f"sees less than 1/{LARGEST_ASPECT} of it with --crop-mode center",
    ),
    "ignored_image": _ignored("fault", "an image with an extension that is not supported", "convert or rename it"),
    "loose_image": _ignored(
        "fault",
        "an image in a split, but not in a class folder",
        "move it into the folder of its class",
        prediction=_LIKE_ANY_OTHER,
    ),
    "empty_class": _refused("a class folder without images", "add images, or remove the folder"),
    "class_in_one_split": _refused(
        "a class that is missing from another split", "add images of it to every split, or remove it from all"
    )._replace(evaluation=f"{_REFUSES}; --allow-subset evaluates the classes that are present"),
    "unreadable_folder": _refused(
        "a folder that cannot be listed", "grant read permission", prediction="refuses to start and names it"
    ),
    "class_case": _used(
        "fault",
        "class names that differ only in case",
        "treats them as two classes (macOS and Windows see one folder)",
        "merge or rename them",
    ),
    "link_loop": _refused(
        "a symbolic link that leads back to itself or to a folder above it",
        "remove the link",
        prediction="reads the folder once, but stops at a link to itself",
    ),
    "duplicate_two_labels": _two_labels("the same file"),
    "duplicate_across_splits": _across_splits("the same file"),
    "near_duplicate_two_labels": _two_labels("the same image, stored differently,"),
    "near_duplicate_across_splits": _across_splits("the same image, stored differently,"),
    "duplicate": _used("note", "the same file several times in a class", "uses every copy", "keep one of them"),
    "near_duplicate": _used(
        "note", "the same image, stored differently, several times in a class", "uses every copy", "keep one of them"
    ),
    "wrong_extension": _used(
        "note", "an image whose extension names another format", "reads it by its content", "rename it"
    ),
    "cmyk": _used("note", "a CMYK image", "converts it to RGB", "convert it yourself if exact colours matter"),
    "sixteen_bit": _used(
        "note",
        "an image with 16 bits per channel",
        "keeps the upper 8 bits, or the values of --input-range",
        "set --input-range if the images are dark",
    ),
    "alpha": _used(
        "note",
        "an image with transparency",
        "drops the alpha channel, so the colours beneath it appear",
        "flatten it if those colours are unwanted",
    ),
    "palette": _used("note", "a palette image", "converts it to RGB", "nothing to do"),
    "animated": _used(
        "note", "an image with several frames", "uses the first frame", "save the frames you want as single images"
    ),
    "exif_rotated": _used(
        "note", "an image with an EXIF orientation", "turns it upright, as image viewers do", "nothing to do"
    ),
    "blank": _used("note", "an image of a single colour", _LIKE_ANY_OTHER, "remove it, unless it is intended"),
    "hidden": _ignored("note", "a hidden file or folder", "remove it, or rename it if it belongs to the data"),
    "nested_folder": _used(
        "note",
        "a folder of images inside a class folder",
        "uses them as images of the class",
        "nothing to do if this is intended",
    ),
    "repeated_folder": _ignored(
        "note", "a link to a folder of the same class that was read already", "nothing to do if this is intended"
    ),
    "other_file": _ignored("note", "a file that is not an image", "nothing to do"),
    "link_outside": _used(
        "note", "a link to a target outside DATA", "follows it", "before you move DATA, copy the target into it"
    ),
    "file_case": _used(
        "note",
        "file names that differ only in case",
        "reads both (macOS and Windows keep only one of them)",
        "rename one before you copy the data",
    ),
    "class_imbalance": _used(
        "note",
        f"the largest class has more than {LARGEST_IMBALANCE} times as many images as the smallest",
        "sees large classes more often",
        "try --sampler balanced or --class-weights",
        evaluation="gives a top-1 that says little about small classes; see the accuracy per class",
        prediction="favours large classes",
    ),
}
