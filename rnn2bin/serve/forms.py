"""What is asked and answered, as OpenAPI shows it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rnn2bin.serve.problems import Problem, problem
from rnn2bin.serve.store import Row

ID = re.compile(r"[a-z]{3}_[0-9a-f]{32}")
Line = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
UploadId = Annotated[str, Field(max_length=40, examples=["upl_0123456789abcdef0123456789abcdef"])]
Role = Literal["all", "train", "valid", "test", "vocabulary", "labels"]
State = Literal["queued", "running", "done", "failed", "cancelled"]


class Upload(BaseModel):
    id: str
    name: str = Field(description="as the loaders see it: its end says what it is")
    bytes: int
    sha256: str
    created: str


class Uploads(BaseModel):
    items: list[Upload]


class RecipeRequest(BaseModel):
    """A recipe: a bundled one by name or one's own YAML, and knobs to set."""

    model_config = ConfigDict(extra="forbid")

    recipe: Line = Field("anneal", description="a bundled recipe's name")
    recipe_text: str | None = Field(None, max_length=2**20, description="YAML, instead of a bundled recipe")
    source: Line | None = Field(None, description="a bundled recipe of which `task`, `metric` and `source` alone are taken")
    set: dict[Line, Any] = Field(default_factory=dict, max_length=100, description="knob -> value", examples=[{"train.steps": 8000}])


class ConversionRequest(RecipeRequest):
    model: UploadId = Field(description="the upload that holds the network")
    data: UploadId | dict[Role, UploadId] | None = Field(
        None,
        description="one upload that is split, or one for each part, and with them the names of tokens (`vocabulary`) and of classes "
        "(`labels`), one a line; none where the network's own text will do",
    )
    name: Line = Field("", description="what to call it in the list; default: the model's name")


class Artifact(BaseModel):
    name: str
    bytes: int
    sha256: str
    href: str


class Conversion(BaseModel):
    """A job. `progress` is its last, `result` the report in short, `error` the problem it failed with."""

    id: str
    name: str
    state: State
    stage: str | None
    cancelling: bool
    run: int = Field(description="1; one more with every retry")
    created: str
    started: str | None
    finished: str | None
    model: dict[str, Any]
    data: dict[str, Any]
    recipe: dict[str, Any]
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    error: Problem | None
    artifacts: list[Artifact]
    links: dict[str, str]


class Conversions(BaseModel):
    items: list[Conversion]
    next: str | None = Field(None, description="`before` of the next page")


class Session(BaseModel):
    needs_key: bool
    owner: str | None
    max_jobs: int | None = None
    max_bytes: int | None = None
    jobs: int | None = None
    bytes: int | None = None


class Login(BaseModel):
    model_config = ConfigDict(extra="forbid")
    key: str = Field(max_length=200)


class Validity(BaseModel):
    valid: bool
    reasons: list[str]
    knobs: dict[str, str] = Field(description="knob -> why it cannot have this value")


class RecipeName(BaseModel):
    name: str
    summary: str
    one_network: bool = Field(description="written for the files of one public network: it has a `source`")


class BundledRecipe(BaseModel):
    name: str
    text: str
    values: dict[str, Any]


class Knob(BaseModel):
    knob: str
    section: str
    kind: Literal["choice", "count", "number", "switch", "list", "map", "text"]
    choices: list[Any]
    optional: bool
    low: float | None
    above: float | None
    high: float | None
    below: float | None
    default: Any
    help: str


class Recipes(BaseModel):
    items: list[RecipeName]
    knobs: list[Knob]


class Health(BaseModel):
    status: Literal["ok"]
    version: str
    workers: int


def moment(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def upload(row: Row) -> dict[str, Any]:
    return {**{name: row[name] for name in ("id", "name", "bytes", "sha256")}, "created": moment(row["created"])}


def conversion(job: Row) -> dict[str, Any]:
    here, request = f"/v1/conversions/{job['id']}", job["request"]
    files = job["artifacts"] or {}
    links = {"self": here, "events": f"{here}/events"}
    if files:
        links |= {"artifacts": f"{here}/artifacts", "archive": f"{here}/artifacts.tar"}
    if "report.html" in files:
        links["report"] = f"{here}/artifacts/report.html"
    error = job["error"]
    return {
        **{name: job[name] for name in ("id", "name", "state", "stage", "run", "progress", "result")},
        **{name: moment(job[name]) for name in ("created", "started", "finished")},
        "cancelling": bool(job["cancel"]) and job["state"] == "running",
        "model": request["model"],
        "data": request["data"],
        "recipe": request["recipe"],
        "error": None if error is None else problem(error["code"], error["status"], error["reasons"]),
        "artifacts": artifacts(job),
        "links": links,
    }


def artifacts(job: Row) -> list[dict[str, Any]]:
    here = f"/v1/conversions/{job['id']}/artifacts"
    files = (job["artifacts"] or {}).items()
    return [{"name": name, **one, "href": f"{here}/{name}"} for name, one in files if name != "out.tar"]
