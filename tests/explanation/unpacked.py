"""Arrays of a page, read as `rows.js` reads them."""

import base64
import zlib

import numpy as np

TYPES = {"u1": np.uint8, "i1": np.int8, "f4": np.float32}


class Unpacked:
    """A pack's numbers. `spread` and `row` follow the functions of the same names and purposes in rows.js."""

    def __init__(self, text):
        self.data = zlib.decompress(base64.b64decode(text))

    def array(self, place):
        count = int(np.prod(place["shape"]))
        return np.frombuffer(self.data, TYPES[place["type"]], count, place["at"]).reshape(place["shape"])

    def rows(self, place):
        """Quantised rows (…, C) as numbers, and the step of each row."""
        steps = self.array(place["steps"]).astype(np.float64)
        return self.array(place["values"]) * steps[..., None], steps

    def projection(self, projection):
        """(M, k, N), and the step of each row (M, k), 0 for separable ones, which are not quantised."""
        if "dense" in projection:
            return self.rows(projection["dense"])
        rows, columns = (self.array(projection[name]).astype(np.float64) for name in ("rows", "columns"))
        dense = np.einsum("mih,mjw->mijhw", rows, columns).reshape(projection["maps"], projection["k"], -1)
        return dense, np.zeros(dense.shape[:2])


def token_row(model, shared, image, place, *, layer, token):
    """Where a token looks, over all tokens, mean over heads (T), and the largest error that rounding allows.

    `model` and `shared` are the page's model and its pack, `place` and `image` one image's layers and its pack.
    """
    about = model["layers"][layer]
    weights, steps = image.rows(place[layer]["tokens"])
    weights, steps = weights[:, token], steps[:, token]
    if about["values"] is None:
        return weights.mean(0), steps.max() / 2
    F, F_steps = shared.projection(model["projections"][about["values"]])
    prefix = about["prefix"]
    own, keys = weights[:, :prefix], weights[:, prefix:]
    if len(F) == 1:
        # All heads share F, so the page takes the mean first.
        keys, own, steps = keys.mean(0, keepdims=True), own.mean(0, keepdims=True), steps.mean(keepdims=True)
    patches = np.einsum("mk,mkn->n", keys, F) / len(F)
    error = (steps[:, None] / 2 * np.abs(F).sum(1)).max() + (np.abs(keys) * F_steps / 2).sum(1).max()
    return np.concatenate([own.mean(0), patches]), error + steps.max() / 2
