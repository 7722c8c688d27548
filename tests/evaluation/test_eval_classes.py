"""Classes of the data are matched with those of the model by name, WordNet id, lemma or number."""

import pytest

from linvit.evaluation.classes import (
    ClassMatch,
    lemmas,
    match_classes,
    published_subset,
    short_names,
    synsets,
    with_lemma,
)

IMAGENET = list(synsets())
TENCH, GOLDFISH, CRANE_BIRD, CRANE, CHURCH = 0, 1, 134, 517, 497


def match(found: list[str], known: list[str] | None, *, allow_subset: bool = False, num_classes: int = 0) -> ClassMatch:
    num_classes = num_classes or len(known or [])
    return match_classes(found, known, num_classes=num_classes, model="MODEL", data="DATA", allow_subset=allow_subset)


@pytest.mark.parametrize(
    ("found", "known", "labels", "how"),
    [
        (["blue", "green", "red"], ["red", "blue", "green"], (1, 2, 0), "by name"),
        (["Blue", "GREEN", "red"], ["red", "blue", "green"], (1, 2, 0), "by names spelt alike"),
        (["n01440764", "n01443537"], ["n01443537", "n01440764"], (1, 0), "by WordNet id"),
        (["goldfish", "Tench"], ["n01440764", "n01443537"], (1, 0), "by lemma"),
        (["Carassius_auratus", "tench, Tinca tinca"], ["n01440764", "n01443537"], (1, 0), "by lemma"),
        (["n01440764", "n01443537"], ["goldfish", "tench"], (1, 0), "by names spelt alike"),
        (
            ["n01440764", "n01443537"],
            ["goldfish, Carassius auratus", "tench, Tinca tinca"],
            (1, 0),
            "by names spelt alike",
        ),
    ],
)
def test_classes_match_by_name_or_lemma(found: list[str], known: list[str], labels: tuple[int, ...], how: str) -> None:
    made = match(found, known)
    assert made.labels == labels
    assert made.class_names == known
    assert made.how == how
    assert (made.note, made.is_subset) == (None, False)


def test_numbers_are_labels_as_in_imagenet_v2() -> None:
    found = sorted(map(str, range(1000)))
    made = match(found, IMAGENET)
    assert found[:4] == ["0", "1", "10", "100"]
    assert made.labels[:4] == (0, 1, 10, 100)
    assert made.how == "by index"
    assert made.note == "the data's classes are numbers and were used as labels, counted from 0"
    # Counted from 1, all labels would be shifted.
    with pytest.raises(ValueError, match="none of its classes"):
        match([str(number) for number in range(1, 1001)], IMAGENET)


def test_every_class_of_imagenet_is_found_by_its_lemmas() -> None:
    twice = {"crane", "maillot"}
    names = [lemmas()[synset] for synset in IMAGENET]
    kept = [label for label, name in enumerate(names) if name.split(",")[0] not in twice]
    made = match([names[label].replace(" ", "_") for label in kept], IMAGENET, allow_subset=True)
    assert list(made.labels) == kept


def test_a_lemma_of_two_classes_is_refused() -> None:
    sentence = "DATA: the class 'crane' may be 'n02012849 crane' or 'n03126707 crane'; rename it to one of them"
    with pytest.raises(ValueError, match=sentence):
        match(["crane", "tench"], IMAGENET, allow_subset=True)
    # The first lemma of one class wins over another lemma of a second.
    made = match(["missile", "tench"], IMAGENET, allow_subset=True)
    assert made.labels == (IMAGENET.index("n03773504"), TENCH)


def test_a_name_that_the_model_has_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="DATA: the class 'crane' may be 'crane' or 'crane'"):
        match(["crane", "tench"], ["tench", "crane", "crane"], allow_subset=True)
    assert match(["tench"], ["tench", "crane", "crane"], allow_subset=True).is_subset


def test_two_folders_of_one_class_are_refused() -> None:
    with pytest.raises(ValueError, match="DATA: 'n01440764' and 'tench' both match the class 'n01440764'; merge them"):
        match(["n01440764", "tench"], IMAGENET, allow_subset=True)


def test_a_subset_needs_permission() -> None:
    found = [IMAGENET[label] for label in (CHURCH, TENCH)]
    with pytest.raises(
        ValueError, match=r"DATA: lacks 'n01443537', .* and 993 more of the 1000 classes of MODEL; add "
    ):
        match(found, IMAGENET)
    made = match(found, IMAGENET, allow_subset=True)
    assert (made.labels, made.present, made.is_subset) == ((CHURCH, TENCH), [TENCH, CHURCH], True)
    assert made.note == "the data has 2 of the model's 1000 classes"


def test_an_unknown_class_needs_permission() -> None:
    with pytest.raises(ValueError, match=r"DATA: 'gren' is not among the 3 classes of MODEL \(is 'gren' 'green'\?\); "):
        match(["blue", "gren", "red"], ["red", "blue", "green"])
    made = match(["blue", "gren", "red"], ["red", "blue", "green"], allow_subset=True)
    assert (made.labels, made.present) == ((1, None, 0), [0, 1])
    assert made.note == (
        "the data has 2 of the model's 3 classes; skipped the images of 'gren', which the model does not know"
    )


def test_nothing_in_common_is_always_an_error() -> None:
    with pytest.raises(ValueError, match=r"DATA: none of its classes \(cat, dog\) is a class of MODEL \(red, blue\); "):
        match(["cat", "dog"], ["red", "blue"], allow_subset=True)


@pytest.mark.parametrize(("name", "some"), [("ImageNet-A", "n01498041"), ("ImageNet-R", "n01484850")])
def test_published_subsets_need_no_permission(name: str, some: str) -> None:
    classes = next(set(found) for found in _subsets() if published_subset(set(found)) == name)
    assert some in classes
    assert len(classes) == 200
    made = match(sorted(classes), IMAGENET)
    assert made.note == f"{name} has 200 of the model's 1000 classes"
    assert published_subset(classes - {some}) is None


def _subsets() -> list[list[str]]:
    from importlib.resources import files

    folder = files("timm.data") / "_info"
    return [(folder / f"imagenet_{letter}_synsets.txt").read_text().split() for letter in "ar"]


def test_the_order_of_the_folders_is_used_and_reported_if_the_model_has_no_names() -> None:
    made = match(["a", "b", "c"], None, num_classes=3)
    assert (made.labels, made.class_names, made.how) == ((0, 1, 2), ["a", "b", "c"], "by order")
    assert (
        made.note
        == "the weights contain no class names: the data's classes, in their order, were used as labels 0, 1, ..."
    )
    with pytest.raises(ValueError, match="MODEL has 4 unnamed classes, but DATA has 3"):
        match(["a", "b", "c"], None, num_classes=4, allow_subset=True)


def test_numbers_are_labels_if_the_model_has_no_names() -> None:
    found = sorted(map(str, range(11)))
    made = match(found, None, num_classes=11)
    assert (made.labels[2], made.class_names[10], made.how) == (10, "10", "by index")
    with pytest.raises(ValueError, match=r"'1' and '01' both match|'01' and '1' both match"):
        match(["01", "1"], None, num_classes=2)


def test_a_thousand_unnamed_classes_are_imagenets_if_the_folders_are() -> None:
    made = match([IMAGENET[GOLDFISH], IMAGENET[CHURCH]], None, num_classes=1000, allow_subset=True)
    assert made.labels == (GOLDFISH, CHURCH)
    assert made.note is not None
    assert "assumed ImageNet's classes in the order of their WordNet ids" in made.note


def test_wordnet_ids_are_shown_with_their_lemma() -> None:
    assert with_lemma("n01440764") == "n01440764 tench"
    assert with_lemma("scratch") == "scratch"


def test_an_ambiguous_order_of_the_folders_is_refused() -> None:
    names = sorted(f"class{number}" for number in range(1, 13))
    with pytest.raises(ValueError, match=r"label 1 is 'class10' in torchvision's .* and 'class2' in timm's; .* timm "):
        match(names, None, num_classes=12)
    # A list of classes in an order of its own is not ambiguous.
    assert match(["Zebra", "apple", "Mango"], None, num_classes=3).how == "by order"


def test_short_names_are_unique_and_keep_the_id_of_both_cranes():
    names = dict(zip(IMAGENET, short_names(IMAGENET)))
    assert len(set(names.values())) == 1000
    assert names["n01440764"] == "tench"
    assert (names["n02012849"], names["n03126707"]) == ("n02012849 crane", "n03126707 crane")
    assert short_names(["n02012849", "cat"]) == ["crane", "cat"]
