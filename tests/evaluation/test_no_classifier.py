"""Models without a classifier, such as converted ones: no command that predicts takes them."""

import pytest
from tiny_runs import make_images

from linvit.cli import main
from linvit.evaluation.inference import input_spec
from linvit.model.build import create_model
from linvit.runs.folder import Classifier, save_classifier


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    make_images(folder / "data", train=1, val=1)
    model = create_model("linvit_mini_patch4_64", num_classes=0, img_size=32, embed_dim=32, depth=1, k=4).eval()
    spec = input_spec(Classifier(model, None, weights="", settings={}))
    save_classifier(folder / "model", model, class_names=[], spec=spec, about={})
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "MODEL", "DATA"],
        ["predict", "MODEL", "DATA"],
        ["export", "MODEL", "-o", "OUT.pt2"],
        ["export", "MODEL", "-o", "OUT.pt2", "--with-heatmap"],
        ["export", "MODEL", "-o", "OUT", "--format", "hf"],
    ],
    ids=" ".join,
)
def test_it_is_refused_in_one_sentence(arguments, source, tmp_path, capsys):
    places = {"MODEL": source / "model", "DATA": source / "data", "OUT": tmp_path / "m", "OUT.pt2": tmp_path / "m.pt2"}
    assert main([str(places.get(each, each)) for each in arguments]) == 1
    error = capsys.readouterr().err
    assert "is a model without a classifier (num_classes=0), which predicts nothing" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
