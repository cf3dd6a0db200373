"""Generate images with MAR (LazyMAR) or LlamaGen (LineAR), and score them: FID, Inception Score.

    python eval.py --model mar_tiny --num_images 100 --lazy_mar            # the bundled models
    python eval.py --model gpt_tiny --num_images 100 --line_ar --line_budget 1/4
    torchrun --nproc_per_node=2 eval.py --num_images 50000 --eval_bsz 128 --num_iter 64 --lazy_mar
    python eval.py --score_only output_dir/mar_huge-lazy_mar-iter64-cfg3.25-50000 --metrics fid,isc,pr

Image i has its own seed, so the same command resumes, and runs of MAR and LazyMAR are paired image by
image. The last line on stdout is one JSON document. Images, contact sheet and results.json are in a
run folder below --output_dir.
"""

import json
from pathlib import Path

from engine import cli
from engine.run import evaluate
from util import metrics, report
from util.errors import run_main
from util.evaluation import run as evaluation
from util.evaluation.config import EvaluationConfig
from util.evaluation.run_folder import RunFolder
from util.files import beside_code

PATHS = ("features_path", "fid_stats")
# Flags that --score_only takes from the run that it scores, unless given.
SCORED_AS = ("model", "num_images", "class_num", "features", "prompts", *PATHS)


def parse() -> tuple[cli.Selection, str | None]:
    """The command line, and the folder of --score_only.

    With --score_only, missing flags of SCORED_AS are taken from the run's last call.
    """
    flags = cli.make_parser("eval", __doc__.splitlines()[0]).parse()
    (folder,) = flags.take("score_only")
    if folder is not None and (manifest := RunFolder(folder).manifest()):
        before = manifest["calls"][-1].get("arguments", {})
        known = {name: before[name] for name in SCORED_AS if before.get(name) is not None}
        known |= {name: beside_code(known[name]) for name in PATHS if name in known}
        flags.given = {**known, **flags.given}
    return cli.select(flags, "eval"), folder


def main() -> None:
    selection, folder = parse()
    flags, host, request = selection.flags, selection.host(), selection.request()
    settings = flags.build(EvaluationConfig)
    place = cli.place(flags)
    conditions = host.conditions(settings.prompts)
    with place.rendezvous() as rendezvous:
        if not settings.no_score:  # before minutes of loading and hours of sampling
            each = conditions.of(range(settings.num_images), settings.num_images)
            metrics.check_ready(request, settings.num_images, each)
        if folder is not None:
            results = evaluation.score_only(
                Path(folder), request, settings.num_images, conditions, rendezvous, place.device
            )
        else:
            results = evaluate(
                host,
                host.load(place.device),
                settings,
                None if settings.no_score else request,
                place.execution,
                rendezvous,
                flags.resolved,
            )
    if place.world.is_main:
        if "method" in results:
            print(report.row(results))
        print(json.dumps(results))


if __name__ == "__main__":
    run_main(main)
