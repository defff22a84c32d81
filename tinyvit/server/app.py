"""The web application: its requests and answers, and their validation."""

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
FILES = {  # address: file of the page and its content type; all are read once, when the server starts
    "/": ("index.html", "text/html; charset=utf-8"),
    "/api": ("api.html", "text/html; charset=utf-8"),
    "/app.css": ("app.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
MOST_STROKES, MOST_POINTS = 100, 2000  # strokes per drawing, points per stroke

# ---- requests ----
# FailFast stops at the first wrong element of a list. Without it twenty thousand wrong points give as many errors.

Coordinate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Point = Annotated[list[Coordinate], Field(min_length=2, max_length=2, description="x and y, where y points down")]
Stroke = Annotated[
    list[Point], Field(min_length=1, max_length=MOST_POINTS, description="a single point is a dot"), FailFast()
]
Level = Annotated[int, Field(ge=0, le=255)]


def whole(row):
    """Return a row in which floats such as 7.0 are integers, because JSON does not distinguish them."""
    if not isinstance(row, list):
        return row
    return [int(level) if isinstance(level, float) and level.is_integer() else level for level in row]


Row = Annotated[list[Level], Field(min_length=28, max_length=28), FailFast(), BeforeValidator(whole)]


class Strict(BaseModel):
    """A body without conversions of types, in which an unknown name is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Drawing(Strict):
    """Pen strokes on a square of side 1."""

    strokes: Annotated[list[Stroke], Field(min_length=1, max_length=MOST_STROKES), FailFast()]


class Image(Strict):
    """An image like those of MNIST: 28 rows of 28 grey levels, where 0 is background. It is not changed."""

    pixels: Annotated[list[Row], Field(min_length=28, max_length=28), FailFast()]


# ---- answers ----


class Frame(BaseModel):
    """The position of the 28 x 28 pixels in the drawing, whose side is 1. They may extend beyond the drawing."""

    left: float
    top: float
    side: float


class Reading(BaseModel):
    """The model's answer, its input, and its attention."""

    digit: int = Field(description="the most probable digit")
    probabilities: list[float] = Field(description="probabilities of the digits 0 to 9, which sum to 1")
    pixels: list[list[int]] = Field(description="the input of the model, 28 x 28 grey levels from 0 to 255")
    frame: Frame
    attention: list[list[list[float]]] = Field(
        description="for every layer and every head, the attention of the class token to itself (the first number) "
        "and to the patches, row by row; the numbers of a head sum to 1"
    )
    rollout: list[float] = Field(
        description="attention rollout (Abnar and Zuidema 2020): an estimate of the share of each patch in the final "
        "class token, row by row; the rest of 1 is the share of the class token itself"
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
    class_names: list[str] = Field(description="the name of each class; for digits their figures")
    test_accuracy: float | None = Field(description="share of MNIST's test images read correctly, if known")
    limits: Limits


class Sample(BaseModel):
    """A digit of MNIST's test set."""

    index: int = Field(description="index in the test set, from 0")
    label: int
    kind: str = Field(description="'plain', 'barely read' or 'misread' by the model in the package")
    pixels: list[list[int]]


class Problem(BaseModel):
    detail: str = Field(description="the error, in one sentence")


REFUSALS = {
    400: "the body is not JSON",
    408: "the body did not arrive in time",
    413: f"the body has more than {MOST_BYTES:,} bytes",
    415: "the content-type is not application/json",
    422: "the JSON does not have the specified form",
    503: "too many digits are waiting: try again after the number of seconds in Retry-After",
}


def create_app(model, name="model", test_accuracy=None, samples=(), most_at_once=16, most_waiting=256):
    """Return the application, a FastAPI application inside a `Guard`.

    model: a `VisionTransformer` on the CPU for 28 x 28 pixels and ten classes; name, test_accuracy: texts about it on
    the page; samples: a list of `Sample`; most_at_once, most_waiting: parameters of `Reader`.
    """
    reader = Reader(model, most_at_once, most_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        async with reader:
            yield

    app = FastAPI(
        title="tinyvit reads digits",
        description="Send pen strokes or an image, and get the digit, its probabilities and the model's attention.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from other servers; this server has its own page, /api
        redoc_url=None,
        redirect_slashes=False,  # a redirect would send the browser to any host that the request names
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
        patches_per_side=config.grid[0],
        class_names=list(config.names),
        test_accuracy=test_accuracy,
        limits=Limits(strokes=MOST_STROKES, points_per_stroke=MOST_POINTS, body_bytes=MOST_BYTES),
    )
    samples = list(samples)

    async def read(prepare):
        try:
            return Response(await reader.read(prepare), media_type="application/json")
        except Busy:
            text = "too many digits are waiting: try again in a second"
            raise HTTPException(503, text, {"Retry-After": "1"}) from None
        except PictureError as error:
            raise HTTPException(422, str(error)) from error

    refusals = {status: {"model": Problem, "description": text} for status, text in REFUSALS.items()}
    answers = {200: {"model": Reading}, **refusals}

    @app.post("/api/predict/strokes", responses=answers, response_class=Response, summary="Read pen strokes")
    async def predict_strokes(drawing: Drawing):
        """Draw pen strokes, scale and centre them like the digits of MNIST, and read the digit."""
        return await read(partial(prepare_strokes, drawing.strokes))

    @app.post("/api/predict/pixels", responses=answers, response_class=Response, summary="Read an image")
    async def predict_pixels(image: Image):
        """Read an image of 28 x 28 pixels with white ink on black, already scaled and centred."""
        prepared = Prepared(np.array(image.pixels, np.uint8), (0.0, 0.0, 1.0))
        return await read(lambda: prepared)

    @app.get("/api/model", summary="The model and the limits")
    async def describe_model() -> Model:
        return about

    @app.get("/api/samples", summary="Sample digits")
    async def list_samples() -> list[Sample]:
        """Return the first digit of each class in MNIST's test set, and some that are hard for the model."""
        return samples

    app.add_exception_handler(RequestValidationError, _say_what_is_wrong)
    app.add_middleware(Guard)
    return app


def _page(respond):
    async def page():
        return respond()

    return page


async def _say_what_is_wrong(request: Request, error: RequestValidationError):
    """Answer in one sentence. FastAPI's own answer repeats the input, which may contain NaN, unlike JSON."""
    first, *others = error.errors()
    if first["type"] == "json_invalid":
        return JSONResponse({"detail": "the body is not JSON"}, 400)
    parts = [part for part in first["loc"] if part != "body"]
    place = ".".join(repr(part)[1:-1][:40] if isinstance(part, str) else str(part) for part in parts) or "the body"
    more = f" (and {len(others)} more)" if others else ""
    return JSONResponse({"detail": f"{place}: {first['msg']}{more}"}, 422)


def choose_samples(data, misread, barely, each=5):
    """Return a list of `Sample` from an `ImageDataset`: the first of each class, and `each` of both hard kinds.

    misread, barely: indices of test images, with the best examples first.
    """
    plain = [int((data.test_labels == digit).argmax()) for digit in range(10)]
    kinds = {"plain": plain, "barely read": list(barely)[:each], "misread": list(misread)[:each]}
    return [
        Sample(index=i, label=int(data.test_labels[i]), kind=kind, pixels=data.test_images[i].tolist())
        for kind, indices in kinds.items()
        for i in indices
    ]
