"""A server that classifies an uploaded picture and shows where it looked.

pip install '.[models]' fastapi python-multipart uvicorn
python examples/serve_fastapi.py torchvision/resnet50 --weights DEFAULT
curl -F image=@cat.jpg http://127.0.0.1:8000/explain
"""

import argparse
import base64
import tempfile
from typing import Annotated, Any

from fastapi import FastAPI, File, HTTPException, Request, UploadFile
from fastapi.responses import JSONResponse

from pyfast_xai import InputError, render
from pyfast_xai.images import ImageError, load_image
from pyfast_xai.models import LoadedModel, load_model
from pyfast_xai.serve import Explained


def app_for(loaded: LoadedModel, method: str = "grad-cam", most_bytes: int = 10_000_000, most_pixels: int = 50_000_000):
    """The application.

    Args:
        loaded: the network, its preprocessing and the names of its classes.
        method: explainer.
        most_bytes: of an upload.
        most_pixels: of a picture.
    """
    app = FastAPI(title="Explained pictures")
    explained = Explained(loaded.model, method)

    @app.middleware("http")
    async def bounded(request: Request, call_next: Any):
        # Forms are read as a whole before any function of ours runs.
        length = request.headers.get("content-length", "")
        if request.method == "POST":
            if not length.isdecimal():
                return JSONResponse({"detail": "upload must say its length, got none"}, 411)
            if int(length) > most_bytes + 10_000:  # what a form adds to its file
                return JSONResponse({"detail": f"image must have at most {most_bytes:,} bytes, got more"}, 413)
        return await call_next(request)

    # Not `async`: the framework then runs each request on a thread of its pool, and `Explained` takes any number.
    @app.post("/explain")
    def explain(image: Annotated[UploadFile, File()]) -> dict[str, Any]:
        content = image.file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise HTTPException(413, f"image must have at most {most_bytes:,} bytes, got more")
        try:
            picture = _opened(content, most_pixels)
            seen, _ = loaded.preprocess(picture)
            logits, explanation = explained(seen[None])
        except InputError as error:
            raise HTTPException(400, str(error)) from None
        best = int(logits[0].argmax())
        box = loaded.preprocess.boxes_in(explanation.boxes().cpu(), picture.size)[0]
        overlay = explanation.overlay(loaded.preprocess.shown(picture)[None])[0]
        return {
            "class": loaded.labels[best] if loaded.labels else str(best),
            "score": float(logits[0].float().softmax(0)[best]),
            "box": None if bool(box.isnan().any()) else box.tolist(),  # in pixels of the picture
            "overlay": base64.b64encode(render.png_bytes(render.to_pil(overlay))).decode(),
        }

    return app


def _opened(content: bytes, most_pixels: int) -> Any:
    """An upload as an RGB picture; what the sender called it is not asked."""
    with tempfile.NamedTemporaryFile(prefix="upload") as file:
        file.write(content)
        file.flush()
        try:
            return load_image(file.name, max_pixels=most_pixels)
        except ImageError as error:
            raise ImageError(str(error).replace(repr(file.name), "uploaded")) from None


if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--method", default="grad-cam")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    uvicorn.run(app_for(load_model(given.model, given.weights), given.method), port=given.port)
