"""Command lines of eval.py, main_mar.py, main_cache.py and demo.py: from flags to typed configs.

All four accept every flag, as in the original; some defaults differ.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine import FAMILIES
from engine.base import ComputeConfig, Execution, Family, Host, Preset, WeightsConfig
from util import dist
from util.config import FlagParser, Flags
from util.data.config import DataConfig
from util.device import DeviceConfig, pick_device, pick_dtype, set_threads, slow_bf16
from util.errors import UserError
from util.evaluation.config import EvaluationConfig
from util.evaluation.request import ScoreRequest
from util.files import beside_code
from util.training.config import TrainConfig
from util.training.optimizer import OptimizerConfig

# Defaults of one command: (MAR's main_mar.py and main_cache.py, LazyMAR's eval.py).
DEFAULTS: dict[str, Preset] = {
    "main_mar": {"model": "mar_large", "cfg": 1.0},
    "main_cache": {"model": "mar_huge", "batch_size": 128},
    "eval": {"model": "mar_huge", "eval_bsz": 128},
    "demo": {"model": "mar_tiny"},
    "redundancy": {"model": "mar_tiny", "num_images": 10},
    "ablations": {"model": "mar_huge", "eval_bsz": 128, "output_dir": "./output_dir/ablations"},
}


def make_parser(program: str, description: str = "") -> FlagParser:
    """Parser of "eval", "main_mar", "main_cache" or "demo" with the defaults of this command."""
    defaults = DEFAULTS[program]
    is_script = program in SCRIPTS
    name = f"{program}.py" if is_script else f"python -m benchmarks.{program}"
    parser = FlagParser(name, description, defaults)
    models = ", ".join(name for family in FAMILIES.values() for name in family.presets)
    parser.add_flag("model", f"{models} [{defaults['model']}]", metavar="NAME")
    parser.add_flag("score_only", "score a run folder or a folder of numbered PNGs", metavar="DIR")
    from_model = ("resume", "features", "features_path", "fid_stats")
    training = program in TRAINING
    parser.add(WeightsConfig, "weights", from_model=() if training else from_model)
    for family in FAMILIES.values():
        if family.trains or not training:
            family.add_flags(parser)
    parser.add(EvaluationConfig, "evaluation")
    parser.add(ComputeConfig, "evaluation")
    parser.add(ScoreRequest, "scoring", from_model=from_model)
    parser.add(TrainConfig, "training", hidden=not training)
    parser.add(OptimizerConfig, "optimizer", hidden=not training)
    parser.add(DataConfig, "data", hidden=not training)
    parser.add(DeviceConfig, "device")
    parser.add(dist.LaunchConfig, "processes")
    return parser


TRAINING = ("main_mar", "main_cache")
SCRIPTS = ("main_mar", "main_cache", "eval", "demo")


@dataclass(frozen=True)
class Selection:
    """The flags of a command and what --model selects."""

    flags: Flags
    family: Family
    model: str
    defaults: Preset

    def host(self) -> Host:
        """The model with its settings. UserError if they are invalid."""
        return self.family.host(self.model, self.flags, self.defaults)

    def request(self) -> ScoreRequest:
        """What to score, and against which reference."""
        return self.flags.build(ScoreRequest, self.defaults)


def select(flags: Flags, program: str) -> Selection:
    """Find the family and the preset of --model.

    The training commands use the preset of models with "trains": True; for the others they keep the
    original's defaults. UserError: unknown model, or flags of another family.
    """
    model = flags.value("model", DEFAULTS[program]["model"])
    for family in FAMILIES.values():
        if model in family.presets:
            break
    else:
        known = ", ".join(name for family in FAMILIES.values() for name in family.presets)
        raise UserError(f"--model {model} is unknown; use one of {known}")
    preset = {
        name: beside_code(value) if isinstance(value, str) and "/" in value else value
        for name, value in family.presets[model].items()
    }
    training = program in TRAINING
    if training and not family.trains:
        raise UserError(f"{program}.py is for MAR models; eval.py samples --model {model}")
    flags.refuse_foreign(family.name, model)
    trains = preset.pop("trains", False)
    if training:
        preset = {k: v for k, v in preset.items() if k not in ("cfg", "resume")} if trains else {}
        preset["cfg"] = 1.0
    return Selection(flags, family, model, preset)


@dataclass(frozen=True)
class Place:
    """Where this process computes."""

    world: dist.World
    launch: dist.LaunchConfig
    execution: Execution

    @property
    def device(self) -> torch.device:
        return self.execution.device

    def rendezvous(self) -> dist.Rendezvous:
        """Where the processes of the run meet."""
        return dist.Rendezvous(self.world, self.launch.dist_url, self.launch.patience)


def place(flags: Flags) -> Place:
    """Device, precision, threads and rank of this process."""
    config, launch = flags.build(DeviceConfig), flags.build(dist.LaunchConfig)
    set_threads(config.threads)
    world = dist.world_from_env(launch.dist_on_itp, launch.world_size)
    device = pick_device(config.device, world.local_rank)
    if world.is_main and (text := slow_bf16(device, config.dtype)):
        print(f"note: {text}", file=sys.stderr)
    compute, dtype = flags.build(ComputeConfig), pick_dtype(config.dtype, device)
    return Place(world, launch, Execution(device, dtype, compute, world.is_main))


def parse(program: str, description: str = "", words: Sequence[str] | None = None) -> Selection:
    """The command line of a program, from sys.argv without words."""
    return select(make_parser(program, description).parse(words), program)


def named(model: str, **given: object) -> Selection:
    """A model by name as eval.py selects it, with flags as keyword arguments."""
    return select(make_parser("eval").flags({"model": model, **given}), "eval")
