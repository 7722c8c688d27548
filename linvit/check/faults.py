"""Everything that `linvit check` finds: what it is, what training, evaluation and prediction do with it, the mend."""

from typing import Literal, NamedTuple

Severity = Literal["fault", "note"]
# What becomes of the image: it cannot be read, is never looked at, is used, or the whole set is refused.
Effect = Literal["unread", "passed over", "used", "refused"]

SMALLEST_SIDE = 16
LARGEST_ASPECT = 10
LARGEST_IMBALANCE = 10


class Fault(NamedTuple):
    """One kind of finding.

    A fault costs images, labels or the truth of a metric; a note is dealt with and good to know.
    """

    severity: Severity
    effect: Effect
    what: str
    training: str
    mend: str
    evaluation: str
    prediction: str


class Finding(NamedTuple):
    """One case: the file or folder relative to DATA, and the others that it is about."""

    code: str
    path: str
    detail: str = ""
    others: tuple[str, ...] = ()


_STOPS = "stops and names it; with --on-bad-image skip leaves it out and lists it"
_ROW = "gives a row that says so"
_NEVER = "never looks at it"
_REFUSES = "refuses to start and names it"


def _unread(what: str, mend: str) -> Fault:
    return Fault("fault", "unread", what, _STOPS, mend, _STOPS, _ROW)


def _passed_over(severity: Severity, what: str, mend: str, *, prediction: str = _NEVER) -> Fault:
    return Fault(severity, "passed over", what, _NEVER, mend, _NEVER, prediction)


def _refused(what: str, mend: str, *, prediction: str = "takes no notice of classes") -> Fault:
    return Fault("fault", "refused", what, _REFUSES, mend, _REFUSES, prediction)


def _used(
    severity: Severity, what: str, training: str, mend: str, *, evaluation: str = "", prediction: str = ""
) -> Fault:
    return Fault(severity, "used", what, training, mend, evaluation or training, prediction or evaluation or training)


FAULTS: dict[str, Fault] = {
    "empty_file": _unread("a file of zero bytes", "restore or remove it"),
    "truncated": _unread("an image that was cut off", "restore or remove it"),
    "undecodable": _unread("an image whose data cannot be decoded", "restore or remove it"),
    "not_an_image": _unread("no image, though its ending says so", "restore or remove it"),
    "unreadable_file": _unread("a file that cannot be opened", "give permission to read it, or mend the link"),
    "damaged": _used(
        "fault",
        "decodes, but its data is broken",
        "takes what comes out of the decoder, in part grey, torn or noise",
        "restore or remove it",
    ),
    "decompression_bomb": _used(
        "fault",
        "more pixels than --max-pixels; not decoded here",
        "decodes it whole, at 3 bytes a pixel; from 2^30 pixels on stops as at a broken file",
        "scale it down or cut it up, or raise --max-pixels",
    ),
    "tiny": _used(
        "fault",
        f"a side of less than {SMALLEST_SIDE} px",
        "enlarges it to the model's size",
        "remove it, or find the original",
    ),
    "extreme_aspect": _used(
        "fault",
        f"more than {LARGEST_ASPECT} times as long as wide",
        "crops a piece of at most 4:3 out of it",
        "cut it into pieces, or remove it",
        evaluation=f"sees less than 1/{LARGEST_ASPECT} of it with --crop-mode center",
    ),
    "ignored_image": _passed_over("fault", "an image whose ending is not looked for", "convert or rename it"),
    "loose_image": _passed_over(
        "fault",
        "an image in a split, but in no class folder",
        "move it into its class's folder",
        prediction="takes it like any other",
    ),
    "empty_class": _refused("a class folder without images", "add images or remove the folder"),
    "class_in_one_split": _refused("a class that other splits lack", "give every split images of it, or none")._replace(
        evaluation=f"{_REFUSES}; with --allow-subset takes the classes that are there"
    ),
    "unreadable_folder": _refused(
        "a folder that cannot be listed", "give permission to read it", prediction="refuses to start and names it"
    ),
    "class_case": _used(
        "fault",
        "classes whose names differ only by case",
        "takes them for two classes (macOS and Windows see one folder)",
        "merge or rename them",
    ),
    "link_loop": _refused(
        "a link that leads round in circles",
        "remove the link",
        prediction="goes round once, and stops at a link to itself",
    ),
    "duplicate_two_labels": _used(
        "fault",
        "one file under several labels",
        "learns contradicting labels",
        "keep the right one",
        evaluation="counts at least one of them as wrong",
        prediction="takes it like any other",
    ),
    "duplicate_across_splits": _used(
        "fault",
        "one file in several splits",
        "learns what it will be evaluated on",
        "remove it from one split",
        evaluation="flatters the model: it has seen the answer",
        prediction="takes it like any other",
    ),
    "near_duplicate_two_labels": _used(
        "fault",
        "one picture in other bytes under several labels",
        "learns contradicting labels",
        "keep the right one",
        evaluation="counts at least one of them as wrong",
        prediction="takes it like any other",
    ),
    "near_duplicate_across_splits": _used(
        "fault",
        "one picture in other bytes in several splits",
        "learns what it will be evaluated on",
        "remove it from one split",
        evaluation="flatters the model: it has seen the answer",
        prediction="takes it like any other",
    ),
    "duplicate": _used(
        "note", "one file several times in a class", "counts it as often as it is there", "keep one of them"
    ),
    "near_duplicate": _used(
        "note", "one picture in other bytes several times in a class", "counts it as often as it is there", "keep one"
    ),
    "wrong_extension": _used(
        "note", "an image of another format than its ending says", "reads it by its content", "rename it"
    ),
    "cmyk": _used("note", "a CMYK image", "converts it to RGB", "convert it, if colours matter to the last shade"),
    "sixteen_bit": _used(
        "note", "16 bits a channel", "keeps the upper 8 bits", "stretch dark images to 8 bits yourself"
    ),
    "alpha": _used("note", "transparency", "drops it: the colours under it show", "flatten it, if those are not meant"),
    "palette": _used("note", "a palette image", "converts it to RGB", "nothing to do"),
    "animated": _used("note", "several frames", "takes the first", "store the wanted frames as images"),
    "exif_rotated": _used("note", "a camera's orientation in EXIF", "turns it upright, as viewers do", "nothing to do"),
    "blank": _used("note", "one colour all over", "uses it like any other", "remove it, unless it is meant"),
    "hidden": _passed_over("note", "a hidden file or folder", "remove it, or rename it if it is meant"),
    "nested_folder": _used(
        "note",
        "images in a folder of a class folder",
        "takes them as images of the class",
        "nothing to do, if that is meant",
    ),
    "other_file": _passed_over("note", "a file that is no image", "nothing to do"),
    "link_outside": _used(
        "note", "a link that leads out of DATA", "follows it", "copy what it leads to, before DATA is moved"
    ),
    "file_case": _used(
        "note",
        "names that differ only by case",
        "reads both (macOS and Windows keep one of them)",
        "rename one before copying the set",
    ),
    "class_imbalance": _used(
        "note",
        f"the largest class has over {LARGEST_IMBALANCE} times the images of the smallest",
        "shows large classes more often",
        "try --sampler balanced or --class-weights",
        evaluation="top-1 says little of small classes; see the accuracy per class",
        prediction="favours large classes",
    ),
}
