"""The web application: the requests that it takes, their form, and its answers."""

import contextlib
import importlib.resources
from functools import partial
from typing import Annotated

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field

from tinyvit.pretrained.pictures import PictureError, Prepared, prepare_strokes
from tinyvit.server.guard import MOST_BYTES, Guard
from tinyvit.server.reader import Busy, Reader

PAGE = importlib.resources.files("tinyvit") / "page"
FILES = {  # address: file of the page and its type; the server reads them once, at its start
    "/": ("index.html", "text/html; charset=utf-8"),
    "/api": ("api.html", "text/html; charset=utf-8"),
    "/app.css": ("app.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
MOST_STROKES, MOST_POINTS = 100, 2000  # points: of one stroke

# ---- requests ----
# FailFast: of twenty thousand wrong points only the first is reported, so that there are not as many errors.

Coordinate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Point = Annotated[list[Coordinate], Field(min_length=2, max_length=2, description="x and y; y runs downwards")]
Stroke = Annotated[
    list[Point], Field(min_length=1, max_length=MOST_POINTS, description="one point is a dot"), FailFast()
]
Level = Annotated[int, Field(ge=0, le=255)]


def whole(row):
    """Return a row with 7.0 as 7, the same number in JSON; validation reports what is not a row."""
    if not isinstance(row, list):
        return row
    return [int(level) if isinstance(level, float) and level.is_integer() else level for level in row]


Row = Annotated[list[Level], Field(min_length=28, max_length=28), FailFast(), BeforeValidator(whole)]


class Strict(BaseModel):
    """A body in which a string is not a number, and an unknown name is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Drawing(Strict):
    """Pen strokes on a square of side 1."""

    strokes: Annotated[list[Stroke], Field(min_length=1, max_length=MOST_STROKES), FailFast()]


class Image(Strict):
    """An image as MNIST has them: 28 rows of 28 grey levels, 0 is background. It is read as it is."""

    pixels: Annotated[list[Row], Field(min_length=28, max_length=28), FailFast()]


# ---- answers ----


class Frame(BaseModel):
    """Where in the drawing, whose side is 1, the square of 28 x 28 pixels lies; it may reach beyond."""

    left: float
    top: float
    side: float


class Reading(BaseModel):
    """The model's answer, its input, and where it looked."""

    digit: int = Field(description="the most probable digit")
    probabilities: list[float] = Field(description="of the digits 0 to 9; they sum to 1")
    pixels: list[list[int]] = Field(description="the 28 x 28 grey levels, 0 to 255, that the model read")
    frame: Frame
    attention: list[list[list[float]]] = Field(
        description="of every layer and every head: how the class token shares its attention between itself, which "
        "comes first, and the patches, row by row; a head's shares sum to 1"
    )
    rollout: list[float] = Field(
        description="attention rollout (Abnar and Zuidema 2020): how much of what the class token holds in the end "
        "came from each patch, row by row; what lacks of 1 is its own beginning"
    )


class Limits(BaseModel):
    strokes: int
    points_per_stroke: int
    body_bytes: int


class Model(BaseModel):
    """The model, and the limits of a request."""

    name: str
    parameters: int
    layers: int
    heads: int
    patches_per_side: int
    test_accuracy: float | None = Field(description="share of MNIST's test images that it reads rightly, if known")
    limits: Limits


class Sample(BaseModel):
    """A digit of MNIST's test set to try."""

    index: int = Field(description="its place in the test set, from 0")
    label: int
    kind: str = Field(description="'plain', 'barely read' or 'misread', by the model that comes with the package")
    pixels: list[list[int]]


class Problem(BaseModel):
    detail: str = Field(description="what is wrong, in a sentence")


REFUSALS = {
    400: "the body is not JSON",
    408: "the body did not come in time",
    413: f"the body has more than {MOST_BYTES:,} bytes",
    415: "the content-type is not application/json",
    422: "JSON, but not of this form",
    503: "too many digits are waiting: try again after as many seconds as Retry-After says",
}


def create_app(model, name="model", test_accuracy=None, samples=(), most_at_once=16, most_waiting=256):
    """Return the application, a FastAPI behind a `Guard`.

    model: a `VisionTransformer` on the CPU for 28 x 28 pixels and ten classes; name, test_accuracy: what the page
    says of it; samples: `Sample`s; most_at_once, most_waiting: as `Reader` takes them.
    """
    reader = Reader(model, most_at_once, most_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        async with reader:
            yield

    app = FastAPI(
        title="tinyvit reads digits",
        description="Send pen strokes or an image; get the digit, its probabilities, and where the model looked.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # those pages load scripts from other servers; /api is the page of this server
        redoc_url=None,
        redirect_slashes=False,  # a redirect would lead to any host that a request names
    )
    for address, (file, kind) in FILES.items():
        respond = partial(Response, (PAGE / file).read_bytes(), media_type=kind)
        app.add_api_route(address, _page(respond), methods=["GET", "HEAD"], include_in_schema=False)

    config = model.config
    about = Model(
        name=name,
        parameters=int(model.parameters.flat.size),
        layers=config.depth,
        heads=config.heads,
        patches_per_side=config.image_size // config.patch_size,
        test_accuracy=test_accuracy,
        limits=Limits(strokes=MOST_STROKES, points_per_stroke=MOST_POINTS, body_bytes=MOST_BYTES),
    )
    samples = list(samples)

    async def read(prepare):
        try:
            return Response(await reader.read(prepare), media_type="application/json")
        except Busy:
            text = "too many digits are waiting to be read: try again in a second"
            raise HTTPException(503, text, {"Retry-After": "1"}) from None
        except PictureError as error:
            raise HTTPException(422, str(error)) from error

    refusals = {status: {"model": Problem, "description": text} for status, text in REFUSALS.items()}
    answers = {200: {"model": Reading}, **refusals}

    @app.post("/api/predict/strokes", responses=answers, response_class=Response, summary="Read pen strokes")
    async def predict_strokes(drawing: Drawing):
        """Pen strokes are drawn, scaled and centred as MNIST's digits were, and read."""
        return await read(partial(prepare_strokes, drawing.strokes))

    @app.post("/api/predict/pixels", responses=answers, response_class=Response, summary="Read an image")
    async def predict_pixels(image: Image):
        """An image of 28 x 28 pixels is read as it is: white ink on black, already scaled and centred."""
        prepared = Prepared(np.array(image.pixels, np.uint8), (0.0, 0.0, 1.0))
        return await read(lambda: prepared)

    @app.get("/api/model", summary="The model and the limits")
    async def describe_model() -> Model:
        return about

    @app.get("/api/samples", summary="Digits to try")
    async def list_samples() -> list[Sample]:
        """Digits of MNIST's test set: the first of each class, and some that the model reads barely or wrongly."""
        return samples

    app.add_exception_handler(RequestValidationError, _say_what_is_wrong)
    app.add_middleware(Guard)
    return app


def _page(respond):
    async def page():
        return respond()

    return page


async def _say_what_is_wrong(request: Request, error: RequestValidationError):
    """Answer in one sentence; FastAPI's own answer repeats the input, and JSON has no NaN."""
    first, *others = error.errors()
    if first["type"] == "json_invalid":
        return JSONResponse({"detail": "the body is not JSON"}, 400)
    parts = [part for part in first["loc"] if part != "body"]
    place = ".".join(repr(part)[1:-1][:40] if isinstance(part, str) else str(part) for part in parts) or "the body"
    more = f" (and {len(others)} more)" if others else ""
    return JSONResponse({"detail": f"{place}: {first['msg']}{more}"}, 422)


def choose_samples(data, misread, barely, each=5):
    """Return `Sample`s of an `ImageDataset`: the first of each class, and `each` of the two kinds of hard ones.

    misread, barely: indices of test images, the most telling first.
    """
    plain = [int((data.test_labels == digit).argmax()) for digit in range(10)]
    kinds = {"plain": plain, "barely read": list(barely)[:each], "misread": list(misread)[:each]}
    return [
        Sample(index=i, label=int(data.test_labels[i]), kind=kind, pixels=data.test_images[i].tolist())
        for kind, indices in kinds.items()
        for i in indices
    ]
