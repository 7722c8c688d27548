"""An HTTP service: POST an image, get its most probable labels as JSON, or status 422 and the reason.

After pip install 'linvit[examples]':
    python examples/fastapi_app.py output/RUN
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
"""

import sys
import tempfile
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

import linvit
from linvit.check.header import format_of, read_header

MAX_BYTES = 20 * 2**20
# A small file can hold a huge image: 50 million pixels take 150 MB.
MAX_PIXELS = 50_000_000
BODY = {"required": True, "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}


def create_app(model: str, **options: Any) -> FastAPI:
    """The service of a model, with options of `linvit.Predictor`; raises ValueError if it cannot be loaded."""
    app, predictor, lock = FastAPI(title="linvit"), linvit.Predictor(model, **options), threading.Lock()

    def classify(data: bytes) -> dict[str, Any]:
        kind = format_of(data)
        header = read_header(data, kind) if kind else None
        if header is None:
            raise HTTPException(422, "the body is not an image")
        if header.width * header.height > MAX_PIXELS:
            raise HTTPException(422, f"the image has more than {MAX_PIXELS:,} pixels")
        # One image at a time: each uses all cores or the GPU.
        with lock, tempfile.NamedTemporaryFile(buffering=0) as file:
            file.write(data)
            (prediction,) = predictor([file.name])
        if prediction.error is not None:
            raise HTTPException(422, f"the image {prediction.error}")
        return {"labels": prediction.labels, "probabilities": prediction.probabilities}

    @app.post("/predict", openapi_extra={"requestBody": BODY})
    async def predict(request: Request) -> dict[str, Any]:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BYTES:
                raise HTTPException(413, f"the body has more than {MAX_BYTES:,} bytes")
        return await run_in_threadpool(classify, bytes(data))

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1]))
