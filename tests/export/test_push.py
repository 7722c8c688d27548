"""`linvit push` and `hf-hub:` sources, against a local stand-in of the hub."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants as constants
import pytest
import timm
import torch
from tiny_runs import make_images

from linvit.cli import main
from linvit.data.augment.build import InputSpec
from linvit.model.build import create_model
from linvit.runs.folder import load_classifier, save_classifier

NAME = "me/cells"
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub that an upload and a download make."""

    def answer(self, body, status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.calls.append(self.path)
        if self.server.refuses:
            self.answer({"error": "no access"}, status=403)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.address}/{NAME}", "name": NAME})
        elif self.path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {"commitUrl": f"{self.server.address}/{NAME}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )
        else:
            self.answer({"error": "unknown"}, status=404)

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        content = self.server.files.get(name) if "/resolve/" in self.path else None
        if content is None:
            self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created, server.calls, server.refuses = {}, [], [], False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.address = endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = create_model("linvit_mini_patch4_64", num_classes=3, img_size=(32, 24), embed_dim=32, depth=1, k=4).eval()
    folder = tmp_path_factory.mktemp("pushed") / "model"
    spec = InputSpec((32, 24), (0.1, 0.2, 0.3), (0.3,) * 3, "bilinear", 0.8, "border", (0, 4095))
    about = {"epoch": 3, "metrics": {"top1": 71.25, "top5": 99.0}}
    save_classifier(folder, model, class_names=["blue", "green", "red"], spec=spec, about=about)
    return folder


def test_a_pushed_model_is_loaded_by_its_name(folder, hub, tmp_path, capsys):
    evaluation = {"top1": 80.5, "confidence": {"top1": [78.25, 82.75]}, "num_images": 533, "data": "/secret/cells"}
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    arguments = ["push", str(folder), NAME, "--license", "cc-by-4.0", "--eval", str(tmp_path / "eval.json")]
    assert main([*arguments, "--private", "--upload"]) == 0
    assert f"uploaded to {hub.address}/{NAME}" in capsys.readouterr().out
    assert sorted(hub.files) == ["README.md", "config.json", "model.safetensors"]
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    card = hub.files["README.md"].decode()
    for words in ("license: cc-by-4.0", "80.50 % (78.25 to 82.75)", "533 images of `cells`", f"hf-hub:{NAME}"):
        assert words in card
    assert not any(b"/secret" in content for content in hub.files.values())

    found, original = load_classifier(f"hf-hub:{NAME}"), load_classifier(str(folder))
    x = torch.rand(2, 3, 32, 24)
    torch.testing.assert_close(found.model(x), original.model(x), rtol=0, atol=0)
    torch.testing.assert_close(timm.create_model(f"hf-hub:{NAME}", pretrained=True).eval()(x), original.model(x))
    assert found.class_names == ["blue", "green", "red"]
    rows = []
    images = make_images(tmp_path / "data", train=0, val=1) / "val"
    for source in (f"hf-hub:{NAME}", str(folder)):
        assert main(["predict", source, str(images), "-j", "0", "--device", "cpu"]) == 0
        rows.append(capsys.readouterr().out)
    assert rows[0] == rows[1]
    assert rows[0].count("\n") == 3


def test_without_upload_nothing_leaves_the_machine(folder, hub, capsys):
    assert main(["push", str(folder), NAME]) == 0
    out = capsys.readouterr().out
    assert (hub.calls, hub.files) == ([], {})
    for words in (
        "README.md: ",
        "config.json: ",
        "model.safetensors: ",
        "no licence",
        "nothing was uploaded; add --upload",
    ):
        assert words in out


def test_a_model_without_a_classifier_is_a_feature_extractor(tmp_path, hub):
    model = create_model("linvit_mini_patch4_64", num_classes=0, img_size=(32, 24), embed_dim=32, depth=1, k=4).eval()
    spec = InputSpec((32, 24), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.8, "center")
    save_classifier(tmp_path / "model", model, class_names=[], spec=spec, about={})
    assert main(["push", str(tmp_path / "model"), NAME, "--upload"]) == 0
    card = hub.files["README.md"].decode()
    for words in (
        "pipeline_tag: image-feature-extraction",
        "32 features per image",
        f"hf-hub:{NAME}",
        "(B, 3, 32, 24)",
    ):
        assert words in card
    for words in ("classif", "Predictor", "## Metrics", "## Classes"):
        assert words not in card


def test_a_refusal_and_offline_mode_are_one_sentence(folder, hub, monkeypatch, capsys):
    hub.refuses = True
    assert main(["push", str(folder), NAME, "--upload"]) == 1
    error = capsys.readouterr().err
    assert "cannot be uploaded" in error
    assert error.count("\n") == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(folder), NAME, "--upload"]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["cells", "a/b/c", "me/ce lls", "../x/y", "./x", "me/a--b", "me/a.git", f"me/{'a' * 97}"]
)
def test_names_are_checked_first(name, folder, capsys):
    assert main(["push", str(folder), name]) == 2
    assert "give OWNER/NAME" in capsys.readouterr().err


def test_a_licence_is_an_identifier_because_the_header_of_the_card_is_yaml(folder, capsys):
    assert main(["push", str(folder), NAME, "--license", "cc: by"]) == 2
    assert "'cc: by' is not an identifier of a licence" in capsys.readouterr().err
