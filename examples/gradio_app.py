"""A web page that classifies an image and shows where the model looks.

    pip install 'linvit[examples]'
    python examples/gradio_app.py output/RUN

The page is at http://127.0.0.1:7860.
"""

import sys

import gradio as gr
import numpy as np

import linvit
from linvit.data.decode import read_image, resize
from linvit.explanation.explain import Explainer
from linvit.explanation.overlay import LARGEST, blend
from linvit.runs.folder import load_classifier


def create_app(run: str) -> gr.Interface:
    """The page of a model; raises ValueError if the model cannot be loaded."""
    classifier = load_classifier(run)
    predictor, explainer = linvit.Predictor(classifier), Explainer(classifier)

    def classify(path: str | None) -> tuple[dict[str, float], np.ndarray]:
        if path is None:
            raise gr.Error("Choose an image first.")
        (prediction,) = predictor([path])
        if prediction.error is not None:
            raise gr.Error(prediction.error)
        image = read_image(path, input_range=explainer.spec.input_range)
        heat = explainer.explain(image, method="relevance", longest_side=LARGEST).heat
        height, width = heat.shape
        shown = blend(resize(image, height, width, "bilinear"), heat)
        return dict(zip(prediction.labels, prediction.probabilities)), shown

    # Without a mode, Gradio leaves the file as it is, and the prediction is that of `linvit predict`.
    image = gr.Image(type="filepath", image_mode=None, label="Image")
    outputs = [gr.Label(label="Class"), gr.Image(label="Where the model looks")]
    # Flagging would keep visitors' images on the server.
    return gr.Interface(classify, image, outputs, title="linvit", flagging_mode="never")


if __name__ == "__main__":
    create_app(sys.argv[1]).launch()
