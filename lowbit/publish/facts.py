"""What is known about a quantized folder: its headers, `lowbit_report.json`, and the card of the base model.

Folders of other tools have no report, and models of one's own have no card: whatever is missing is None or empty, and
nothing is made up in its place.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path, PureWindowsPath

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lowbit.checkpoint.manifest import REPORT_NAME
from lowbit.checkpoint.side_files import side_files
from lowbit.errors import InputError, LowbitError, UsageError, first_line
from lowbit.folders.opened import summarize
from lowbit.guards.lenient import mapping, text
from lowbit.guards.reading import read_bytes, read_json
from lowbit.guards.records import record
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.publish.fields import CardFields, ConfigFields, QualityFields, ReportFields

CARD_NAME = "README.md"
QUANTIZED = "quantized"  # what `base_model_relation` says of a model like ours
# A model in the Hub's cache: models--org--name/snapshots/<revision>
_CACHED = re.compile(r"models--(?P<name>[^/]+)/snapshots/")


@dataclass(frozen=True)
class Facts:
    """summary: of the headers. report: `lowbit_report.json`, or {}. config: config.json. recipe: of the report.

    card: metadata of the README.md in the folder, which is the card of the base model unless it says of itself that it
    is a quantization (`is_own_card`). base_model: a Hub id. quality: perplexity and so on, as `lowbit eval` prints it.
    """

    folder: Path
    summary: dict
    report: dict
    config: dict
    recipe: Recipe | None
    card: ModelCardData
    base_model: str | None
    quality: dict
    trust_remote_code: bool = False  # of the model in the folder

    @classmethod
    def of(
        cls,
        folder: Path,
        base_model: str | None = None,
        quality: dict | None = None,
        trust_remote_code: bool = False,
    ) -> "Facts":
        """base_model and quality win over what the folder says. Raises InputError for files that cannot be read."""
        if not folder.is_dir():
            raise InputError(f"no such folder: {folder} (expected a quantized model that is there)")
        summary = summarize(folder)
        if not summary["layers"]:
            raise InputError(f"nothing is quantized in {folder}: `hf upload` publishes it as it is")
        report = read_object(folder / REPORT_NAME, ReportFields) if (folder / REPORT_NAME).is_file() else {}
        config, card = read_object(folder / "config.json", ConfigFields), _card(folder)
        record(QualityFields, quality or {}, "quality")
        if base_model is not None and not is_hub_id(base_model):
            raise UsageError(f"base model is {base_model!r}; expected a Hub id such as org/name")
        base_model = base_model or _base_model(report, card)
        quality = mapping(quality or report.get("quality"))
        return cls(folder, summary, report, config, _recipe(report), card, base_model, quality, trust_remote_code)

    @property
    def is_own_card(self) -> bool:
        return _describes_quantization(self.card)

    @property
    def has_base_card(self) -> bool:
        return _has_card(self.folder) and not self.is_own_card

    @property
    def base_name(self) -> str | None:
        source = self.base_model or text(self.report.get("source"))
        return PureWindowsPath(source).name or None

    @property
    def calibration(self) -> dict:
        return mapping(self.report.get("calibration"))

    @property
    def calibration_set(self) -> str | None:
        """Hub id of the data set; files, and text of the model's own, have no page there."""
        name = text(self.calibration.get("source")).split(",")[0].split(":")[0]
        return name if is_hub_id(name) else None

    @property
    def hub_ids(self) -> set[str]:
        """What in the report is a name on the Hub, however much it looks like a path."""
        return {name for name in (self.base_model, self.calibration_set) if name}

    @property
    def scheme(self) -> Scheme:
        """Of the recipe; where there is none, of most quantized parameters."""
        if self.recipe:
            return self.recipe.scheme
        parameters = Counter()
        for layer in self.summary["layers"]:
            parameters[layer["scheme"]] += math.prod(layer["shape"])
        return Scheme.parse(parameters.most_common(1)[0][0])

    @property
    def quantized_bits(self) -> float:
        """Stored bits for each quantized parameter: codes, scales and zeros."""
        layers = self.summary["layers"]
        return 8 * sum(layer["bytes"] for layer in layers) / sum(math.prod(layer["shape"]) for layer in layers)

    @property
    def suggested_name(self) -> str:
        """{base}-W4A16-G128[-GPTQ], {base}-bpw4.25 where the recipe mixes schemes; the folder's where the base is not
        known."""
        if self.base_name is None:
            return self.folder.resolve().name
        if self.recipe and self.recipe.overrides:
            return f"{self.base_name}-bpw{self.quantized_bits:.2f}"
        method = f"-{self.recipe.method.upper()}" if self.recipe and self.recipe.method != "rtn" else ""
        return f"{self.base_name}-{self.scheme.name}{method}"


def read_object(path: Path, kind: type = dict) -> dict:
    """The object in a file, whose fields have the types that `kind` says. Raises InputError."""
    data = read_json(path)
    record(kind, data, str(path))
    return data


def is_hub_id(name: str) -> bool:
    """Whether `name` reads like org/name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None


def hub_id(source: str) -> str | None:
    """The Hub id of a model that was named by its id, or by its folder in the Hub's cache. A run that was given a local
    folder has recorded where that is, from the root on."""
    if cached := _CACHED.search(source):
        name = cached["name"].replace("--", "/", 1)
        return name if is_hub_id(name) else None
    # a local folder of that name is what `resolve` took
    return source if is_hub_id(source) and not Path(source).is_dir() else None


def _card(folder: Path) -> ModelCardData:
    path = folder / CARD_NAME
    if not _has_card(folder):
        return ModelCardData()
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeError as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None
    if not text.startswith("---"):
        return ModelCardData()
    try:
        card = ModelCard(text, ignore_metadata_errors=True).data
    except Exception as error:  # the YAML of strangers: its parser has errors of its own
        raise InputError(f"the metadata of {path} cannot be read: {first_line(error)}") from None
    record(CardFields, {field.name: card.get(field.name) for field in fields(CardFields)}, f"the metadata of {path}")
    return card


def _has_card(folder: Path) -> bool:
    """One of its own: what a link leads to outside of the folder is not published."""
    return Path(CARD_NAME) in side_files(folder)


def _describes_quantization(card: ModelCardData) -> bool:
    return card.get("base_model_relation") == QUANTIZED


def _base_model(report: dict, card: ModelCardData) -> str | None:
    """From the card where it is the folder's own, or the report: where it was given as a Hub id. The `_name_or_path`
    that older transformers left in config.json is whatever was typed, as often a folder as an id."""
    if _describes_quantization(card):
        base = card.get("base_model")
        base = base[0] if isinstance(base, list) and base else base
        return base if isinstance(base, str) and is_hub_id(base) else None
    source = text(report.get("source"))
    return hub_id(source) if source else None


def _recipe(report: dict) -> Recipe | None:
    if not report.get("recipe"):
        return None
    try:
        return Recipe.from_dict(report["recipe"])
    except (LowbitError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the recipe in {REPORT_NAME} is not understood: {first_line(error)}") from None
