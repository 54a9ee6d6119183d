"""Task recipes: how the rows of a known data set are read and measured, as YAML files of the package or of the user.

name: sst2
description: one line, with the source of the data
fields: [sentence, label]
settings:
  template: "{sentence} It was"
  labels: {0: terrible, 1: great}
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgezo.config import ANSWER_METRICS, NO_SETTINGS, TASK_SETTINGS, TuneConfig, describe, make_config, parse_values, read_settings
from edgezo.errors import ConfigError, DataError
from edgezo.runtime.data import Row
from edgezo.runtime.tasks import OPTIONS, Kind, find_task

RECIPES = Path(__file__).with_name("recipes")
FILE_SUFFIXES = {".yaml", ".yml", ".json"}


class Recipe(BaseModel):
    """What a recipe file holds. `fields`: those that a row needs; `settings`: by the names of `TASK_SETTINGS`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    description: str = Field(min_length=1, pattern=r"^[^\n]*$")
    fields: list[str] = Field(min_length=1)
    settings: dict[str, Any]


class Summary(NamedTuple):
    """A recipe in a line of a list."""

    name: str
    kind: Kind
    metric: str
    description: str


def task_settings(task: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The settings of a recipe, none for None.

    Raises:
        ConfigError: there is no such recipe, or its file cannot be used.
    """
    return read_recipe(recipe_path(task)).settings if task is not None else dict(NO_SETTINGS)


def recipe_path(task: str | os.PathLike[str], asked: str = "--task") -> Path:
    """The file of a recipe.

    Args:
        task: name of one of the package, or a .yaml, .yml or .json file.
        asked: the option or command it was given to; an error begins with it.

    Raises:
        ConfigError: there is none.
    """
    own = Path(task)
    if own.suffix in FILE_SUFFIXES:
        if not own.is_file():
            raise ConfigError(f"{asked} {task}: no such file; give a recipe of yours, or a name that `edgezo tasks` lists")
        return own
    if str(task) not in recipe_names():
        raise ConfigError(f"{asked} {task}: no such task; there are {', '.join(recipe_names())}, or give a .yaml file")
    return RECIPES / f"{task}.yaml"


def recipe_names() -> list[str]:
    """The recipes of the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigError: a key or setting is unknown, missing or out of range, or a template names a field that `fields` lacks.
    """
    values = read_settings(path)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, str(path), Recipe.model_fields)) from None
    unknown = [name for name in recipe.settings if name not in TASK_SETTINGS]
    if unknown:
        raise ConfigError(f"{path}: settings: {unknown[0]}: no setting of a task; these are {', '.join(TASK_SETTINGS)}")
    _check_settings(recipe, path)
    return recipe


def summarize(recipe: Recipe) -> Summary:
    """Kind and metric as `find_task` and `Objective` take them."""
    kind = _kind(recipe, recipe.name)
    metrics: list[str] = recipe.settings.get("metrics") or list(ANSWER_METRICS)
    metric = ", ".join(metrics) if kind == "answer" else "accuracy" if kind in {"classification", "choice"} else "loss"
    return Summary(recipe.name, kind, metric, recipe.description)


def _check_settings(recipe: Recipe, path: Path) -> None:
    try:
        TuneConfig.model_validate({"data": "", **parse_values(recipe.settings)})
        _kind(recipe, "its rows")
    except ValidationError as error:
        told = describe(error, f"{path}: settings")
        raise ConfigError(told if told.startswith(str(path)) else f"{path}: settings: {told}") from None
    except (ConfigError, DataError) as error:
        raise ConfigError(f"{path}: settings: {error}") from None


def _kind(recipe: Recipe, place: str) -> Kind:
    """The kind of rows that have these fields; two labels, for a recipe that leaves them to the data."""
    config = make_config(None, {"data": ""}, task=recipe.settings)
    rows = [Row(dict.fromkeys(recipe.fields, label), place) for label in ("one", "two")]
    given = {name: getattr(config, name) for name in OPTIONS}
    return find_task(rows, config.template, config.labels, config.label_field, **given).kind
