"""What parameters of notebooks may be: declared once, beside the default, as the type of the assignment.

The cell of a notebook tagged `parameters` holds lines like `limit: AtLeast4 = 96  # pictures`. The type says which
values there are, and whether the value names files on which the outputs depend. The command, the engine and the
notebook itself (`check(globals())`, so that plain papermill is no way around it) go by the same declaration.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from sinkstudy import paths, pictures
from sinkstudy.paths import DEFAULT_MODEL, MODELS, NOTEBOOKS, RESULTS, ROOT, lab_models, model_folder, place, slug


class UserError(Exception):
    """Something the user can put right, said in one line."""


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises ValueError, with the line, where a key is there twice: YAML takes the last."""
    import yaml  # only now: the engine starts without it

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            seen = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise ValueError(f"{path.name}: the key '{key.value}' is there twice, again in line {line}")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506  a SafeLoader


@dataclass(frozen=True)
class Names:
    """What a parameter's value names, so that outputs depend on its content."""

    what: Literal["model", "lab model", "files", "methods", "pictures", "results"]


# ---- checks of single values: each returns the value as notebooks take it, or raises ValueError


def check_model(name: str) -> str:
    """A model's name as notebooks take it (folders made absolute)."""
    folder = model_folder(name)
    return name if folder is None or name in lab_models() else str(folder.resolve())


def _lab_model(name: str) -> str:
    if (name := check_model(name)) not in lab_models():
        raise ValueError(f"this notebook is about the lab's models or all runs, and {name} is no lab model")
    return name


def check_device(device: str) -> str:
    """cpu, auto, or a cuda, cuda:1 or mps that this machine has."""
    if device not in ("cpu", "auto"):
        from sinkstudy import devices  # only now: torch takes seconds

        devices.check(device)
    return device


def _there(text: str) -> str:
    if not text or not place(text).exists():
        raise ValueError(f"there is no file or folder {text!r}")
    return text


def _folder_if_any(text: str) -> str:
    if text and not place(text).is_dir():
        raise ValueError(f"there is no folder {text!r}")
    return text


def _different(values: list) -> list:
    if len({str(value) for value in values}) < len(values):
        raise ValueError(f"{values} names one twice")
    return values


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return text


# ---- the types

_Model = Annotated[str, AfterValidator(check_model)]
Model = Annotated[_Model, Names("model")]
LabModel = Annotated[str, AfterValidator(_lab_model), Names("lab model")]  # of a notebook that is not about one model
Models = Annotated[list[_Model], AfterValidator(_different), Names("model")]
SomeModels = Annotated[list[_Model], Field(min_length=1), AfterValidator(_different), Names("model")]
Device = Annotated[str, AfterValidator(check_device)]
Dtype = Literal["float32", "bfloat16", "float16"]  # of devices.DTYPES
Revision = Annotated[str, Field(pattern=r"^[\w./-]*$")]

AtLeast0 = Annotated[int, Field(ge=0)]  # of a limit: 0 is all
AtLeast1 = Annotated[int, Field(ge=1)]
AtLeast4 = Annotated[int, Field(ge=4)]
AtLeast8 = Annotated[int, Field(ge=8)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Switch = bool
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Counts = Annotated[list[AtLeast1], Field(min_length=1), AfterValidator(_different)]
Weights = Annotated[list[NotNegative], Field(min_length=1), AfterValidator(_different)]

Criterion = Literal["absolute", "mean_sd", "percentile", "above_median", "norm_drop"]  # of sinks.NORM_CRITERIA
_Benchmark = Literal["POPE", "MME", "MMStar", "GQA", "ScienceQA-IMG", "TextVQA", "MMMU", "MathVista", "own"]
Benchmark = _Benchmark | Literal[""]  # of benchmarks.SOURCES
Benchmarks = Annotated[list[_Benchmark], Field(min_length=1), AfterValidator(_different)]

Text = Annotated[str, AfterValidator(_said)]
Texts = Annotated[list[Text], Field(min_length=1), AfterValidator(_different)]
Files = Annotated[str, AfterValidator(_there), Names("files")]
Methods = Annotated[str, AfterValidator(_there), Names("methods")]  # a folder with a folder for each model
FolderIfAny = Annotated[str, AfterValidator(_folder_if_any), Names("files")]
PicturesIfAny = Annotated[str, AfterValidator(_folder_if_any), Names("pictures")]
ResultFiles = Annotated[list[Text], Field(min_length=1), Names("results")]


# ---- declarations of a notebook


@dataclass(frozen=True)
class Declared:
    """A parameter: its type, with what `Annotated` says of it, and its default."""

    type: Any
    default: Any

    @property
    def names(self) -> str | None:
        return next((mark.what for mark in get_args(self.type)[1:] if isinstance(mark, Names)), None)

    def fit(self, value: Any) -> Any:
        """`value` as notebooks take it. Raises ValueError, with what it has to be."""
        if isinstance(self.default, tuple) and isinstance(value, list):
            value = tuple(value)
        try:
            return TypeAdapter(self.type).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(_told(error.errors()[0], self.default)) from None


def _told(error: Mapping[str, Any], default: Any) -> str:
    """What is wrong with a value, in words that follow its parameter's name."""
    value, of = error["input"], error.get("ctx", {})
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]} .."
    match error["type"]:
        case "value_error":
            return str(of["error"])
        case "greater_than_equal":
            return f"is {of['ge']} at least, and {shown} is not"
        case "greater_than":
            return f"is more than {of['gt']}, and {shown} is not"
        case "less_than":
            return f"is less than {of['lt']}, and {shown} is not"
        case "finite_number":
            return f"is a finite number, and {shown} is not"
        case "too_short":
            return f"has {of['min_length']} value at least, and {shown} has not"
        case "literal_error" | "string_pattern_mismatch":
            return f"is {of.get('expected', 'a commit, tag or branch')}, and {shown} is not"
        case kind if kind.endswith("_type"):
            inside = "" if not error["loc"] or isinstance(error["loc"][0], str) else "a list of "
            kind = {"string": "str"}.get(kind.removesuffix("_type"), kind.removesuffix("_type"))
            return f"is of type {inside}{kind} (default {default!r}), and {shown} is not"
    return f"does not fit: {error['msg']} ({shown})"


@cache
def declarations(notebook: str) -> Mapping[str, Declared]:
    """The parameters of a notebook, from its cell tagged `parameters`; nothing of it is run.

    Raises:
        UserError: a parameter without a type of this module, or whose default is no plain value.
    """
    found = {}
    for cell in cells(notebook):
        if "parameters" not in cell["metadata"].get("tags", []):
            continue
        for node in ast.parse("".join(cell["source"])).body:
            match node:
                case ast.ImportFrom():
                    continue
                case ast.AnnAssign(target=ast.Name(name), annotation=ast.Name(of_type), value=ast.expr() as value):
                    pass
                case _:
                    raise UserError(f"{notebook}: line {node.lineno} of its parameters is no `name: Type = default`")
            kind = globals().get(of_type)
            if kind is None:
                raise UserError(f"{notebook}: parameter '{name}' has a type that parameters.py does not know")
            try:
                found[name] = Declared(kind, ast.literal_eval(value))
            except ValueError:
                raise UserError(f"{notebook}: parameter '{name}' is no plain value") from None
    return found


@cache
def source(notebook: str) -> dict[str, Any]:
    """A source notebook, which a process reads once."""
    return json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))


def cells(notebook: str) -> list[dict]:
    return source(notebook)["cells"]


def defaults(notebook: str) -> dict[str, Any]:
    """The parameters of a notebook with their default values."""
    return {name: declared.default for name, declared in declarations(notebook).items()}


# ---- values of a run


def unsuited(notebook: str, model: str, given: dict[str, Any]) -> str:
    """Why a notebook is none for this model, or for so few pictures, in a few words; empty if it is one.

    Args:
        given: as `fitted` takes it; values that do not fit any notebook are left to it.
    """
    of = declarations(notebook)
    for name, declared in of.items() if model not in lab_models() else ():
        if declared.names == "lab model":
            return f"not about this model: the run {DEFAULT_MODEL} has it"
        folder = str(given.get(name, declared.default))
        if declared.names == "methods" and place(folder).is_dir() and not (place(folder) / slug(model)).is_dir():
            return f"no method in {folder} was trained on this model"
    limit, least = (str(given.get(name, "")) for name in ("limit", "min_pictures"))
    if "limit" in of and limit.isdigit() and int(limit) > 0:
        bounds = [bound.ge for field in get_args(of["limit"].type)[1:] for bound in field.metadata]
        if "min_pictures" in of:
            bounds.append(int(least) if least.isdigit() else of["min_pictures"].default)
        if int(limit) < max(bounds):
            return f"it takes {max(bounds)} pictures at least"
    return ""


def fitted(
    wanted: list[str], model: str, parameters: dict[str, Any], each: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """For each notebook what is given of its parameters, as it takes them; those equal to a default are given too.

    `each` has values for single notebooks, which count where `parameters` has none.
    A value may come from a command line: text for a parameter that is no text is read as JSON.

    Raises:
        UserError: a parameter that no notebook has, or a value that does not fit.
    """
    given, of_each = {"model": model} | parameters, each or {}
    known = {name: declarations(name) for name in wanted}
    for key in given:
        if not any(key in of for of in known.values()):
            names = sorted({name for of in known.values() for name in of})
            raise UserError(f"unknown parameter {key[:80]!r}; the notebooks have: {', '.join(names)}")
    return {
        notebook: fitted_to(of, of_each.get(notebook, {}) | {k: v for k, v in given.items() if k in of}, notebook)
        for notebook, of in known.items()
    }


def fitted_to(declared: Mapping[str, Declared], given: dict[str, Any], notebook: str = "") -> dict[str, Any]:
    """What is given of declared parameters, of a notebook or a command, as these take it.

    Raises:
        UserError: a value that does not fit.
    """
    values = {key: _fit(notebook, key, declared[key], value) for key, value in given.items()}
    if values.get("revision") and model_folder(values["model"]) is not None:
        raise UserError(f"{given['model']} is a folder and has no revision {given['revision']!r}: "
                        "revisions are of hub models")
    try:
        _together({name: of.default for name, of in declared.items()} | values, declared)
    except ValueError as problem:
        raise UserError(f"{notebook}: {problem}" if notebook else str(problem)) from None
    return values


def _fit(notebook: str, key: str, declared: Declared, value: Any) -> Any:
    if isinstance(value, str) and not isinstance(declared.default, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = {"True": True, "False": False, "None": None}.get(value, value)
    try:
        return declared.fit(value)
    except ValueError as problem:
        raise UserError(_line(key, str(problem), notebook)) from None


def _line(key: str, problem: str, notebook: str = "") -> str:
    if key in ("model", "device") or problem.startswith(("unknown model", "the folder")):
        return problem
    where = f" of {notebook}" if notebook else ""
    return f"parameter '{key}'{where}{':' if problem.startswith('there is') else ''} {problem}"


def _together(values: dict[str, Any], of: Mapping[str, Declared]) -> None:
    """What has to hold between parameters. Raises ValueError."""
    if values.get("criterion") == "percentile" and not values["threshold"] < 100:
        raise ValueError(f"the threshold of percentile is below 100, and {values['threshold']:g} is not")
    if values.get("min_pictures", 0) > values.get("limit", float("inf")):
        raise ValueError(f"limit is {values['limit']}, fewer pictures than min_pictures, {values['min_pictures']}")
    if values.get("hub") and values.get("data_dir"):
        raise ValueError(f"public data are those of data_dir, {values['data_dir']!r}, or of the hub: give one of them")
    called: dict[str, str] = {}  # tables and runs call a model so
    for name, declared in of.items():
        models = values[name] if isinstance(values[name], list) else [values[name]]
        for model in models if declared.names == "model" else ():
            if (other := called.setdefault(slug(model), model)) != model:
                raise ValueError(f"{other} and {model} would both be called {slug(model)}: rename a folder")
    for name, declared in of.items():
        if declared.names == "pictures" and values[name]:
            pictures.folder(place(values[name]), _shown(values))


def _shown(values: dict[str, Any]) -> int:
    """How many pictures of a folder a notebook looks at."""
    return values.get("limit", 0) + values.get("fit", 0)


def check(namespace: dict[str, Any]) -> None:
    """Check the parameters of the notebook whose `globals()` these are, by the types of its own assignments.

    Raises:
        ValueError: one that does not fit, however it came there, or one of papermill's that the notebook does not have.
    """
    annotations = namespace.get("__annotations__", {})
    injected = [cell for cell in namespace.get("In", ()) if cell.startswith("# Parameters\n")]  # by papermill
    given = {part.id for cell in injected for part in ast.walk(ast.parse(cell))
             if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    if unknown := sorted(given - set(annotations)):
        raise ValueError(f"unknown parameter {unknown[0]!r}; the notebook has: {', '.join(sorted(annotations))}")
    of = {name: Declared(kind, namespace[name]) for name, kind in annotations.items()}
    for name, declared in of.items():
        try:
            declared.fit(namespace[name])
        except ValueError as problem:
            raise ValueError(_line(name, str(problem))) from None
    _together({name: namespace[name] for name in of}, of)


# ---- files that values name


def model_files(notebook: str, values: dict[str, Any]) -> list[Path]:
    """Files of models of this machine that parameter values name."""
    return [path for text in _named(notebook, values, "model", "lab model") for path in _of_model(text)]


def data_files(notebook: str, values: dict[str, Any]) -> list[Path]:
    """Other files of this machine that parameter values name, but results."""
    folders = [(text, 0) for text in _named(notebook, values, "files", "methods") if text]
    folders += [(text, _shown(values)) for text in _named(notebook, values, "pictures") if text]
    return [path for of in folders for path in _listed(*of)]


def result_files(notebook: str, values: dict[str, Any]) -> list[Path]:
    """Files of results that are there now and that parameter values name."""
    return [file for text in _named(notebook, values, "results") for path in ROOT.glob(text) for file in files(path)]


def _named(notebook: str, values: dict[str, Any], *kinds: str) -> list[str]:
    """What parameters of some kinds name."""
    named = [values[name] for name, declared in declarations(notebook).items() if declared.names in kinds]
    each = [value if isinstance(value, (list, tuple)) else [value] for value in named]
    return [text for of in each for text in of if isinstance(text, str)]


@cache
def _listed(name: str, shown: int) -> list[Path]:
    """Files or so many pictures, if any, that a name stands for. A process lists them once."""
    return [file.path for file in pictures.folder(place(name), shown)[0]] if shown else files(place(name))


@cache
def _of_model(name: str) -> list[Path]:
    """The files of a model but its card, those of an adapter with those of its base; none of a model of the hub."""
    folder = MODELS / name if name in lab_models() else Path(name)
    found = [path for path in files(folder) if path.name != "README.md"]
    if (folder / "config.json").is_file():
        return found
    if not (folder / paths.ADAPTER).is_file():
        return []
    of = json.loads((folder / paths.ADAPTER).read_text(encoding="utf-8"))
    return found + _of_model(str(of.get("base_model_name_or_path")))


def reads(notebook: str, run: str, values: dict[str, Any], others: list[str]) -> list[str]:
    """Those of the other notebooks whose results in `run` the parameters name: they have to be executed before it."""
    patterns = [Path(text).parts for text in _named(notebook, values, "results")]
    folders = [parts[:3] for parts in patterns if parts[:1] == (RESULTS.name,) and len(parts) > 2]
    return [name for name in others if any(fnmatch(run, of) and fnmatch(name, what) for _, of, what in folders)]


def files(path: Path) -> list[Path]:
    """`path` itself or the files under it, also behind links, without hidden ones and caches."""
    if path.is_file():
        return [path]
    inner = ((file, file.relative_to(path).parts) for file in paths.below(path))
    return [file for file, parts in inner if not any(x.startswith(".") or x == "cache" for x in parts)]
