"""`TrainSettings`: every setting of a training run, once; the flags, the TOML keys and `--print-config` are derived."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.settings import check_values, option, parse_value

DTYPES = ("auto", "fp32", "bf16", "fp8")


_D, _M, _R, _S, _O, _C, _L, _P = (
    "data",
    "model",
    "run",
    "step",
    "optimizer",
    "checkpoints",
    "logging",
    "prediction",
)


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """The settings of `rooflight train`."""

    data: tuple[str, ...] = option(
        (), _D, "files, folders or globs: text, JSONL, Parquet, Hugging Face datasets, token shards", metavar="GLOB"
    )
    text_field: str = option("text", _D, "the field of JSONL and Parquet rows that holds the text")
    tokenizer: str = option(
        "auto", _D, "a tokenizer.json or a directory with one; train: a BPE on the data; auto: the model's, else train"
    )
    vocab_size: int = option(0, _D, "vocabulary of the tokenizer and of a new model (0: the model config's)", least=0)
    holdout: float = option(0.01, _D, "share of the documents held out for evaluation", least=0.0, less_than=1.0)
    data_cache: str = option("", _D, "where token shards are kept (default: OUT/data)", metavar="DIR")

    model: str = option("", _M, "a preset, a config.json (both: from scratch), a checkpoint directory or a hub id")
    from_scratch: bool = option(False, _M, "random weights even where the directory has trained ones")
    context: int = option(0, _M, "tokens a row (0: 1024, or the model's most)", least=0)
    dtype: str = option("auto", _M, "products in this precision (auto: bf16 on a GPU, fp32 on a CPU)", choices=DTYPES)
    device: str = option("auto", _M, "where to run", choices=("auto", "cpu", "cuda"))

    out: str = option("", _R, "directory of the run", metavar="DIR")
    steps: int = option(0, _R, "optimizer steps", least=0)
    tokens: int = option(0, _R, "steps as a number of tokens: 300M, 2B", least=0)
    batch_size: int = option(8, _R, "rows an optimizer step", least=1)
    micro_batch_size: int = option(0, _R, "rows a forward (0: the whole batch); must divide it", least=0)
    seed: int = option(0, _R, "of weights, order of the data, and rounding", least=0)
    skip_nonfinite: bool = option(False, _R, "skip and count steps with a non-finite loss or gradient, and go on")

    recompute: str = option("none", _S, "activations recomputed in the backward", choices=("none", "selective", "full"))
    activation_gib: float = option(
        0.0, _S, "selective: drop the cheapest to recompute, by FLOPs a byte, until activations take this", least=0.0
    )
    clip: float = option(1.0, _S, "largest norm of the gradients (0: not clipped)", least=0.0)
    gradient_dtype: str = option(
        "auto", _S, "gradients of micro-batches add up in this (auto: the weights' own)", choices=("auto", "fp32")
    )
    master_weights: bool = option(True, _S, "keep fp32 weights beside bf16 ones, and update those")
    rounding: str = option(
        "nearest", _S, "how bf16 weights without fp32 masters are rounded", choices=("nearest", "stochastic")
    )
    optimizer_dtype: str = option("fp32", _S, "what the optimizer's moments are kept in", choices=("fp32", "bf16"))

    optimizer: str = option("adamw", _O, "muon: hidden matrices by Muon, the rest by AdamW", choices=("adamw", "muon"))
    lr: float = option(3e-4, _O, "largest learning rate", more_than=0.0)
    min_lr: float = option(0.1, _O, "last learning rate, as a share of the largest", least=0.0, most=1.0)
    schedule: str = option("cosine", _O, "wsd: warm-up, stable, linear decay", choices=("cosine", "wsd", "constant"))
    warmup: int = option(100, _O, "steps of linear warm-up", least=0)
    decay: float = option(0.2, _O, "wsd: share of the steps that decay", least=0.0, most=1.0)
    beta1: float = option(0.9, _O, "AdamW's first decay", least=0.0, less_than=1.0)
    beta2: float = option(0.95, _O, "AdamW's second decay", least=0.0, less_than=1.0)
    eps: float = option(1e-8, _O, "AdamW's ε", more_than=0.0)
    weight_decay: float = option(0.1, _O, "of matrices; norms and biases have none", least=0.0)
    momentum: float = option(0.95, _O, "Muon's", least=0.0, less_than=1.0)

    checkpoint_every: int = option(500, _C, "steps between checkpoints (0: only the last)", least=0)
    keep: int = option(2, _C, "checkpoints kept", least=1)
    async_checkpoint: bool = option(True, _C, "write checkpoints while training goes on")
    export: str = option("", _C, "at the end write a Hugging Face directory here", metavar="DIR")

    log_every: int = option(10, _L, "steps between log lines", least=1)
    eval_every: int = option(0, _L, "steps between evaluations on held-out text (0: only at the end)", least=0)
    eval_rows: int = option(64, _L, "rows an evaluation", least=1)
    sample_every: int = option(0, _L, "steps between samples of text (0: only at the end)", least=0)
    sample_tokens: int = option(64, _L, "tokens a sample", least=1)
    sample_prompt: str = option("", _L, "what samples begin with (default: the start of a held-out document)")
    tensorboard: bool = option(True, _L, "write TensorBoard events where tensorboard is installed")
    profile: int = option(0, _L, "at this step write OUT/profile: a Perfetto trace and the headroom table", least=0)

    document_length: int = option(
        0, _P, "tokens a document, of which rows are packed (0: the data's mean; of --dry: rows are whole)", least=0
    )
    on: str = option("", _P, "machine to predict for (default: here as probed, else this GPU's of the catalog)")

    @property
    def micro(self) -> int:
        """Rows a forward."""
        return self.micro_batch_size or self.batch_size

    @property
    def micro_batches(self) -> int:
        """Forwards an optimizer step."""
        return self.batch_size // self.micro

    def check(self) -> TrainSettings:
        """Raise InvalidValue on values out of range, and on settings that contradict each other."""
        check_values(self)
        if self.batch_size % self.micro:
            allowed = ", ".join(str(d) for d in range(1, self.batch_size + 1) if self.batch_size % d == 0)
            raise InvalidValue(
                f"--micro-batch-size {self.micro} does not divide --batch-size {self.batch_size}; use one of {allowed}"
            )
        if self.steps and self.tokens:
            raise InvalidValue(f"--steps {self.steps} and --tokens {self.tokens} are both given; give one of them")
        if self.rounding == "stochastic" and self.master_weights:
            raise InvalidValue(
                "--rounding stochastic is for bf16 weights without fp32 masters; add --no-master-weights"
            )
        if self.rounding == "stochastic" and self.optimizer == "muon":
            raise InvalidValue("--rounding stochastic is AdamW's; with --optimizer muon use --rounding nearest")
        if self.activation_gib and self.recompute != "selective":
            raise InvalidValue(
                f"--activation-gib {self.activation_gib} does nothing with --recompute {self.recompute}; use selective"
            )
        return self


def from_toml(path: Path) -> dict[str, Any]:
    """The settings that a TOML file gives, keys as the flags with - or _, in tables or not; unknown keys are errors."""
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(f"--config {path} cannot be read ({error}); give a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidValue(f"--config {path} is not TOML: {error}") from error
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    known = {entry.name: entry for entry in fields(TrainSettings)}
    found: dict[str, Any] = {}
    for key, value in flat.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InvalidValue(
                f"--config {path}: {key} is no setting; {hint}`rooflight train --print-config` lists all"
            )
        found[name] = _typed(path, name, value, known[name].default)
    return found


def _typed(path: Path, name: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(item, str) for item in values):
            return tuple(values)
    elif isinstance(default, bool):
        if isinstance(value, bool):
            return value
    elif isinstance(value, bool):
        pass
    elif isinstance(value, str):
        return parse_value(name, value, default)
    elif isinstance(default, int) and isinstance(value, int):
        return value
    elif isinstance(default, float) and isinstance(value, int | float):
        return float(value)
    raise InvalidValue(f"--config {path}: {name} = {value!r} is not of the kind of its default {default!r}")


def to_toml(settings: TrainSettings) -> str:
    """The settings as a TOML file that `--config` reads back, in tables by group, with the help as comments."""
    lines: list[str] = []
    group = ""
    for entry in fields(settings):
        if entry.metadata["group"] != group:
            group = entry.metadata["group"]
            lines += ["" if lines else "# rooflight train --config FILE", f"[{group}]"]
        lines.append(f"{entry.name} = {_write(getattr(settings, entry.name))}  # {entry.metadata['help']}")
    return "\n".join(lines) + "\n"


def _write(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_write(item) for item in value) + "]"
    return repr(value)
